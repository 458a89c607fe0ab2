"""`qlora-hal adapter convert`: an adapter for the other tool."""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from qlora_hal.cli.arguments import Switch
from qlora_hal.errors.terminal_text import show, show_json

if TYPE_CHECKING:
    from qlora_hal.export.converting import Conversion

adapter = App(name="adapter", help="Convert an adapter between PEFT's layout and mlx-lm's.", help_format="plaintext")


@adapter.command
def convert(
    source: Annotated[Path, Parameter(name="SOURCE", help="An adapter's folder in either layout, or a run's folder.")],
    out: Annotated[Path, Parameter(name="OUT", help="A new folder for the converted adapter.")],
    /,
    *,
    to: Annotated[Literal["mlx", "peft"], Parameter(help="The layout to write.")],
    model: Annotated[
        str | None,
        Parameter(
            help="The base: names and shapes are checked against it. A folder or a hub id; default: a run's own."
        ),
    ] = None,
    revision: Annotated[str | None, Parameter(help="Revision of a base on the hub.")] = None,
    json: Annotated[bool, Switch, Parameter(help="Print the result as JSON.")] = False,
) -> int:
    """Write an adapter for mlx-lm or for PEFT: qlora-hal adapter convert runs/first first-mlx --to mlx."""
    from qlora_hal.export.converting import convert_adapter
    from qlora_hal.files.refused_paths import expanded, named_path
    from qlora_hal.model.source import resolve_model

    base = resolve_model(model, revision=revision, trust_remote_code=False) if model else None
    done = convert_adapter(named_path(source), expanded(out), to=to, model=base)
    for note in done.notes:
        show(f"note: {note}", stream=sys.stderr)
    if json:
        show_json(done.as_json())
    else:
        show(as_text(done))
    return 0


def as_text(done: Conversion) -> str:
    """What was written, and the command that opens it."""
    config = done.adapter.config
    scale = f"alpha {config.alpha:g}, scale {config.scale:g}" + (" (rsLoRA)" if config.use_rslora else "")
    base = done.base_name or "BASE"
    opened = {
        "mlx": f'mlx_lm.generate --model {quote(base)} --adapter-path {quote(str(done.out))} --prompt "..."',
        "peft": f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{done.out}")',
    }
    return (
        f"{done.out}: {len(config.target_modules)} modules, rank {config.r}, {scale}\n"
        f"open it with: {opened[done.layout]}"
    )
