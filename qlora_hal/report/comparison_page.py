"""Two runs on one page: their curves in one chart, figures, settings that differ. One file, no script, no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qlora_hal.errors import figures
from qlora_hal.report.comparison import ComparedRun, Comparison
from qlora_hal.report.series import Points, RunSeries
from qlora_hal.report.svg import Curve, chart

_TEMPLATE = "comparison.html.jinja"
_WIDTH, _HEIGHT = 1080, 320


def render_comparison(comparison: Comparison) -> str:
    """The page as text; every text of a run is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        names=_names(comparison.runs),
        charts=_charts(comparison.runs),
        figures=comparison.figures,
        settings=comparison.settings,
        resolved=comparison.resolved,
        shown=shown_value,
    )


def shown_value(value: object) -> str:
    """A value of a configuration as people write it."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _names(runs: tuple[ComparedRun, ComparedRun]) -> tuple[str, str]:
    """The folders' names, or their whole paths where the names are the same."""
    first, second = (run.folder.resolve() for run in runs)
    return (first.name, second.name) if first.name != second.name else (str(first), str(second))


def _charts(runs: tuple[ComparedRun, ComparedRun]) -> list[tuple[str, Markup]]:
    wanted: list[tuple[str, list[Curve]]] = [
        ("Training loss", _curves(runs, lambda s: s.loss, "faint") + _curves(runs, lambda s: s.loss_average, "line")),
        ("Evaluation loss", _curves(runs, lambda s: s.eval_loss, "marks")),
        ("Gradient norm before clipping", _curves(runs, lambda s: s.grad_norm, "line")),
        ("Learning rate", _curves(runs, lambda s: s.learning_rate, "line")),
    ]
    drawn = [
        (title, chart(title, curves, number=_NUMBERS.get(title, _short), width=_WIDTH, height=_HEIGHT))
        for title, curves in wanted
    ]
    # Safe to mark: svg.chart escapes every text it is given.
    return [(title, Markup(drawing)) for title, drawing in drawn if drawing]


def _short(value: float) -> str:
    return f"{value:.3g}"


_NUMBERS: Mapping[str, Callable[[float], str]] = {"Learning rate": lambda value: figures.rate(value) if value else "0"}


def _curves(runs: tuple[ComparedRun, ComparedRun], points: Callable[[RunSeries], Points], style: str) -> list[Curve]:
    return [
        Curve(f"{name} ({style})", points(run.series), f"{style}-{mark}")
        for run, name, mark in zip(runs, _names(runs), "ab", strict=True)
    ]
