"""loss.svg: the loss of a run as one picture, the drawing of report.html in a file of its own."""

from __future__ import annotations

from html import escape
from pathlib import Path

from qlora_hal.files.replacing import replace_file
from qlora_hal.report.series import RunSeries, read_series
from qlora_hal.report.svg import Curve, chart

LOSS_PICTURE = "loss.svg"
_STYLE = Path(__file__).with_name("chart.css")
_WIDTH, _HEIGHT, _CAPTION = 1080, 320, 36


def write_loss_picture(run_dir: Path) -> Path:
    """Draw training loss, its average and the evaluations of a run into `loss.svg`. Raises StorageError."""
    path = run_dir / LOSS_PICTURE
    replace_file(path, _picture(read_series(run_dir)).encode())
    return path


def loss_curves(series: RunSeries) -> list[Curve]:
    """The losses of a run as they are drawn everywhere, those with points alone: in nats per counted token."""
    curves = [
        Curve("each step", series.loss, "faint"),
        Curve("average", series.loss_average, "line"),
        Curve("evaluation", series.eval_loss, "marks"),
    ]
    return [curve for curve in curves if curve.points]


def _picture(series: RunSeries) -> str:
    """The chart below a caption, with its own style: a file is shown without the page's."""
    curves = loss_curves(series)
    drawing = chart("Loss", curves, number="{:.3g}".format, width=_WIDTH, height=_HEIGHT)
    size = f'width="{_WIDTH}" height="{_HEIGHT + _CAPTION}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT + _CAPTION}" {size}>',
            f"<style>{_STYLE.read_text(encoding='utf-8')}</style>",
            f'<rect {size} fill="var(--card)"/>',
            f'<text x="16" y="24" class="tick">{_caption(curves, series.nonfinite_steps)}</text>',
            f'<svg y="{_CAPTION}" width="{_WIDTH}" height="{_HEIGHT}">{drawing}</svg>' if drawing else "",
            "</svg>",
        ]
    )


def _caption(curves: list[Curve], nonfinite_steps: tuple[int, ...]) -> str:
    if not curves:
        return "No loss was logged."
    legend = "".join(
        f'<tspan fill="var(--{curve.style})">\u25a0</tspan> {escape(curve.name)}\u2003' for curve in curves
    )
    lost = f"; not finite at step {', '.join(map(str, nonfinite_steps[:3]))}" if nonfinite_steps else ""
    return f"{legend}(nats per counted token{lost}{', ...' if len(nonfinite_steps) > 3 else ''})"
