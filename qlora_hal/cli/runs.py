"""`qlora-hal runs`: the runs of a folder, one line each; nothing is written."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qlora_hal.cli.arguments import Switch
from qlora_hal.errors import figures
from qlora_hal.errors.terminal_text import show, show_json, visible_line

if TYPE_CHECKING:
    from qlora_hal.run.listing import RunSummary

_TITLES = ("run", "state", "model", "backend", "steps", "loss", "evaluation", "time")
_WIDEST = 40


def runs(
    folder: Annotated[Path, Parameter(help="The folder that holds the runs.")] = Path("runs"),
    /,
    *,
    json: Annotated[bool, Switch, Parameter(help="Print as JSON.")] = False,
) -> int:
    """List the runs in a folder and below it, the newest last: qlora-hal runs, qlora-hal runs experiments/."""
    from qlora_hal.run.listing import runs_below

    found = runs_below(folder)
    if json:
        show_json({"folder": str(folder), "runs": [run.as_json() for run in found]})
    else:
        show(runs_as_text(found, folder))
    return 0


def runs_as_text(found: list[RunSummary], folder: Path) -> str:
    """A table; below it, what is wrong with broken ones, and how to go on with one that was interrupted."""
    if not found:
        return f"no runs in {folder} (searched four levels deep)"
    rows = [_TITLES, *(_cells(run, folder) for run in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_TITLES))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for run in found:
        if run.problem:
            lines.append(f"{_name(run, folder)} is broken: {visible_line(run.problem)}")
        elif run.state == "interrupted":
            lines.append(f"{_name(run, folder)} was interrupted; to go on: qlora-hal resume {quote(str(run.folder))}")
    return "\n".join(lines)


def _cells(run: RunSummary, folder: Path) -> tuple[str, ...]:
    steps = f"{run.steps}" if run.total_steps in (None, run.steps) else f"{run.steps} of {run.total_steps}"
    return (
        _name(run, folder),
        run.state,
        _short(Path(run.model).name or run.model),
        run.backend or "-",
        steps,
        _change(run.first_loss, run.last_loss),
        _change(run.eval_loss_before, run.eval_loss_after),
        "-" if run.seconds is None else figures.duration(run.seconds),
    )


def _name(run: RunSummary, folder: Path) -> str:
    inside = run.folder != folder and run.folder.is_relative_to(folder)
    return visible_line(str(run.folder.relative_to(folder) if inside else run.folder))


def _change(before: float | None, after: float | None) -> str:
    return "-" if before is None and after is None else f"{figures.loss(before)} -> {figures.loss(after)}"


def _short(text: str) -> str:
    text = visible_line(text) or "-"
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."
