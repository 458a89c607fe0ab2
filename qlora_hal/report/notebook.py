"""What a run shows in a notebook: one display that is drawn anew in its place, in the stead of a line for each step.

IPython's display handles do it, which every front end has; no widgets, no scripts. Every text goes through jinja2's
autoescape: prompts, names and paths come from outside.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qlora_hal.errors import figures
from qlora_hal.errors.terminal_text import visible
from qlora_hal.errors.way_on import in_notebook
from qlora_hal.report.console import RunConsole, next_commands, summary
from qlora_hal.report.metrics import smoothed
from qlora_hal.report.series import Points, read_series
from qlora_hal.report.svg import Curve, chart

if TYPE_CHECKING:
    from rich.text import Text

    from qlora_hal.run.result import RunView, TrainResult

_TEMPLATE = "notebook.html.jinja"
_SECONDS_BETWEEN_DRAWINGS = 0.5
"""A drawing is some ten kilobytes, which a front end may be sent over a slow line."""


def console_here(console: RunConsole | None = None, *, quiet: bool = False) -> RunConsole:
    """What shows a run to whoever called it from Python: `console` where one was given, one display in a notebook,
    lines on standard error elsewhere. `quiet` leaves it all to the logger."""
    if console is not None:
        console.quiet, console.silent = console.quiet or quiet, console.silent or quiet
        return console
    if quiet:
        return RunConsole(silent=True)
    return NotebookConsole() if in_notebook() else RunConsole()


def result_html(result: TrainResult) -> str:
    """The key figures of a finished or stopped run, with its curve."""
    series = read_series(result.run_dir)
    rows = summary(result, result.paths)
    return _page(curve=_curve(series.loss, series.eval_loss), rows=rows)


class NotebookConsole(RunConsole):
    """Shows one run in a display of its own. `environ` without a TERM keeps the live line of terminals away."""

    def __init__(self) -> None:
        super().__init__(environ={})
        self._begin()

    def _begin(self) -> None:
        self._display = ""
        self._lines: list[str] = []
        self._told: list[str] = []
        self._rows: Sequence[tuple[str, str]] = ()
        self._progress: tuple[int, int, Sequence[str]] = (0, 0, ())
        self._losses: Points = []
        self._evaluations: Points = []
        self._drawn_at = 0.0

    def note(self, text: str) -> None:
        self._told.append(visible(text))
        super().note(text)

    def evaluated(self, step: int, loss: float, label: str, metrics: Mapping[str, float] | None = None) -> None:
        self._evaluations.append((float(step), loss))
        super().evaluated(step, loss, label, metrics)

    def finished(self, result: TrainResult, paths: Mapping[str, Path]) -> None:
        rows = [*summary(result, paths), *(("next", call) for call in next_commands(result))]
        for name, text in rows:
            self._print(f"{name:<12}{text}")
        self._rows = [(name, visible(text)) for name, text in rows]
        self._draw()

    def close(self) -> None:
        if self._display:
            self._draw()
        self._begin()
        super().close()

    def _show_step(self, run: RunView, step: int, loss: float, parts: Sequence[str], line: str) -> None:
        self._losses.append((float(step), loss))
        self._progress = step, run.total_steps, parts
        if line:
            self._lines.append(visible(line))
        self._draw_if_due()

    def _show(self, content: str | Text) -> None:
        self._lines.append(visible(content if isinstance(content, str) else content.plain))
        self._draw_if_due()

    def _draw_if_due(self) -> None:
        if time.monotonic() - self._drawn_at >= _SECONDS_BETWEEN_DRAWINGS:
            self._draw()

    def _draw(self) -> None:
        from IPython.display import display, update_display

        step, total, parts = self._progress
        page = _page(
            step=step,
            total=total,
            figures=[visible(part) for part in parts],
            notes=self._told,
            curve=_curve(self._losses, self._evaluations),
            rows=self._rows,
            lines=self._lines,
        )
        shown = {"text/html": page, "text/plain": "\n".join(self._lines)}
        if self._display:
            update_display(shown, raw=True, display_id=self._display)
        else:
            self._display = uuid.uuid4().hex
            display(shown, raw=True, display_id=self._display)
        self._drawn_at = time.monotonic()


def _curve(losses: Points, evaluations: Points) -> Markup:
    averages = smoothed([loss for _, loss in losses])
    average = [(step, value) for (step, _), value in zip(losses, averages, strict=True) if value is not None]
    curves = [
        Curve("training loss", losses, "faint"),
        Curve("its average", average),
        Curve("validation loss", evaluations, "marks"),
    ]
    return Markup(chart("Loss", curves, number=figures.loss))  # svg.py escapes what it writes


def _page(**content: object) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    empty: dict[str, object] = {"step": 0, "total": 0, "figures": [], "notes": [], "lines": []}
    return environment.get_template(_TEMPLATE).render(**{**empty, **content})
