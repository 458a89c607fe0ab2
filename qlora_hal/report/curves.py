"""loss.png: the loss of a run as one picture, drawn without a display."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from qlora_hal.files.replacing import replace_file
from qlora_hal.report.series import read_series

LOSS_PICTURE = "loss.png"


def write_loss_png(run_dir: Path) -> Path:
    """Draw training loss, its average and the evaluations of a run into `loss.png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = read_series(run_dir)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if series.loss:
        axes.plot(*zip(*series.loss, strict=True), color="#9db8d6", linewidth=1, label="training")
        axes.plot(*zip(*series.loss_average, strict=True), color="#1f5fa8", linewidth=2, label="training (average)")
    if series.eval_loss:
        axes.plot(*zip(*series.eval_loss, strict=True), "o-", color="#c2551b", linewidth=1.5, label="evaluation")
    for step in series.nonfinite_steps:
        axes.axvline(step, color="#b3261e", linewidth=1, linestyle=":")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per counted token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if series.loss or series.eval_loss:
        axes.legend(frameon=False)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    path = run_dir / LOSS_PICTURE
    replace_file(path, picture.getvalue())
    return path
