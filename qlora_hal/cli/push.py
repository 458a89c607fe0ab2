"""`qlora-hal push`: a finished run's adapter, or the merged model, to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qlora_hal.cli.arguments import Switch
from qlora_hal.errors import figures
from qlora_hal.errors.terminal_text import show, show_json

if TYPE_CHECKING:
    from qlora_hal.export.publishing import PushResult


def push(
    run: Annotated[Path, Parameter(name="RUN", help="The folder of a finished run.")],
    repository: Annotated[str, Parameter(name="REPOSITORY", help="Where to, as owner/name.")],
    /,
    *,
    merged: Annotated[
        Path | None, Parameter(help="Upload the model that merge wrote to this folder, not the adapter.")
    ] = None,
    base_model: Annotated[
        str | None, Parameter(help="The base's name on the hub, where the run was trained on a folder.")
    ] = None,
    certificate: Annotated[
        Path | None, Parameter(help="A certificate of the run's backend: verified, then named on the card.")
    ] = None,
    private: Annotated[bool, Switch, Parameter(help="Make the new repository private.")] = False,
    exist_ok: Annotated[bool, Switch, Parameter(help="Add a commit to a repository that exists.")] = False,
    dry_run: Annotated[
        bool, Switch, Parameter(help="Print what would be uploaded, and ask nothing of the hub.")
    ] = False,
    quiet: Annotated[bool, Switch, Parameter(help="Print only notes and errors.")] = False,
    json: Annotated[bool, Switch, Parameter(help="Print the result as JSON.")] = False,
) -> int:
    """Upload a run's adapter with its model card: qlora-hal push runs/first me/first --private."""
    from qlora_hal import api
    from qlora_hal.cli.json_output import kept_for_json
    from qlora_hal.report.console import RunConsole

    with kept_for_json(json):
        result = api.push(
            run,
            repository,
            merged=merged,
            base_model=base_model,
            certificate=certificate,
            private=private,
            exist_ok=exist_ok,
            dry_run=dry_run,
            console=RunConsole(quiet=quiet, json=json),
        )
    if json:
        show_json(result.as_json())
    elif not quiet:
        show(as_text(result))
    return 0


def as_text(result: PushResult) -> str:
    """The files with their sizes, and where they are now; of a dry run the card as well."""
    widest = max(map(len, result.files))
    files = [f"  {name:<{widest}}  {figures.size(size)}" for name, size in result.files.items()]
    if not result.commit:
        return "\n".join([f"would go to {result.repository}; nothing was sent:", *files, "", result.card.rstrip()])
    new = "a new" if result.created else "the"
    seen = "private" if result.private else "public"
    return "\n".join([f"uploaded to {new} {seen} repository {result.repository}:", *files, result.url])
