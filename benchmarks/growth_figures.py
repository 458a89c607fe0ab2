"""How memory and speed grow with the size of a model, the length of a row, the micro-batch and the rank.

    pip install matplotlib
    PYTHONPATH=. python benchmarks/growth_figures.py --out docs/pictures

Lines of memory are the planner's for an NVIDIA H200 and NF4 with double quantization, r = 16 on all linear layers.
Points were measured there and stand in the records of docs/runs. The dotted line above the speeds is the limit of the
work itself: the products of a step at 677 TFLOP/s, what an H200 sustained in bfloat16 over the layers of the 8B shape.
Products of frozen weights are counted twice (forward, and the gradient of the input), three times where they are
computed again; those of causal attention as flash attention does them, two forward and five backward.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_hal.config.resolve import resolve_settings
from qlora_hal.memory.gpus import known_gpu
from qlora_hal.run.planned_memory import PlannedModel

RECORDS = Path(__file__).parents[1] / "docs" / "runs"
SUSTAINED = 677e12
"""Operations a second, measured over the products of an 8B layer in bfloat16 on an H200."""
GPU = "H200"


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama; sizes as config.json names them."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int

    @property
    def products(self) -> int:
        """Weights that each token is multiplied with: the linear layers' and the head's."""
        keys = self.hidden // self.heads * self.key_heads
        layer = 2 * self.hidden * (self.hidden + keys) + 3 * self.hidden * self.inner
        return self.layers * layer + self.hidden * self.vocabulary

    def config(self) -> dict[str, Any]:
        return {
            "model_type": "llama", "hidden_size": self.hidden, "intermediate_size": self.inner,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads, "vocab_size": self.vocabulary, "dtype": "bfloat16",
            "max_position_embeddings": 2**20, "tie_word_embeddings": False,
        }  # fmt: skip

    def limit(self, length: int, *, recomputed: bool = False) -> float:
        """Tokens a second at the sustained rate."""
        weights = 2 * self.products * (3 if recomputed else 2)
        attention = self.layers * length * self.hidden * (9 if recomputed else 7)
        return SUSTAINED / (weights + attention)


SHAPES: Mapping[str, Shape] = {
    "0.1b": Shape(768, 2048, 12, 12, 12, 32000),
    "1b": Shape(2048, 8192, 16, 32, 8, 128256),
    "3b": Shape(3072, 8192, 28, 24, 8, 128256),
    "7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "34b": Shape(8192, 22016, 48, 64, 8, 32000),
    "65b": Shape(8192, 22016, 80, 64, 64, 32000),
}
LENGTHS = (512, 2048, 8192, 16384, 65536, 92160, 196608, 350208)
BATCHES = (1, 2, 4, 8, 16)
RANKS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: decimal GB of the allocator's peak, tokens a second."""

    gigabytes: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Line:
    """What one choice of recomputation was foreseen to take, and what was measured of it."""

    name: str
    foreseen: Sequence[tuple[float, float]]
    measured: Sequence[tuple[float, Point]]
    limit: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Figure:
    """`name` is the file's; `axis` what grows."""

    name: str
    title: str
    axis: str
    lines: Sequence[Line]


def foreseen(shape: Shape, *, batch: int, length: int, rank: int = 16, recompute: str = "none") -> float:
    """Decimal GB of the allocator's peak."""
    settings = {
        "quantization.double_quant": True,
        "lora.r": rank,
        "training.per_device_train_batch_size": batch,
        "data.max_seq_length": length,
        "training.recompute": recompute,
        "training.optim": "adamw",
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape.config()))
        config = resolve_settings(None, keywords={"model": folder, **settings}, environ={}).config
        memory = PlannedModel.of(config, known_gpu(GPU)).estimate()
    return (memory.total - memory.runtime) / 1e9


def read(record: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RECORDS / f"{record}.json").read_text(encoding="utf-8"))
    return found


def measured_steps(shape: str, *, recompute: str) -> dict[tuple[int, int], Point]:
    """(rows, length) -> the step of a shape on one GPU with nothing on the host; the newest where several are kept."""
    found: dict[tuple[int, int], Point] = {}
    system = {"none": "ours", "full": "ours, checkpointing"}.get(recompute)
    if shape in ("1b", "8b"):
        for row in read(f"h200_step_{shape}")["results"]:
            if row["system"] == system:
                point = Point(row["peak_allocated_gb"], row["tokens_per_second"])
                found[row["micro_batch"], 2048] = point
    kept = read("h200_memory_steps")
    for row in [*kept["found"], *kept["long_rows"]["found"]]:
        if row["row"].startswith(f"{shape}-") and row["choice"] == f"{recompute}, adamw":
            found[row["rows"], row["length"]] = Point(row["peak_gb"], row["tokens_per_second"])
    if shape == "8b" and recompute == "none":
        for row in read("many_devices_h200_two")["found"]:
            if row["ranks"] == 1 and row["micro_batches"] == 1:
                found[row["rows"], row["length"]] = Point(row["peak_gb"], row["tokens_per_second"])
    return found


def by_size() -> Figure:
    """One row of 512 tokens and four of 2048, over models of 0.1 to 65 billion weights."""

    def billions(shape: Shape) -> float:
        return (shape.products + shape.hidden * shape.vocabulary) / 1e9

    lines = []
    for rows, length, recompute in ((4, 2048, "none"), (4, 2048, "full"), (1, 512, "offload")):
        lines.append(
            Line(
                name=f"{rows} x {length}, recompute {recompute}",
                foreseen=[
                    (billions(shape), foreseen(shape, batch=rows, length=length, recompute=recompute))
                    for shape in SHAPES.values()
                ],
                measured=[
                    (billions(shape), steps[rows, length])
                    for name, shape in SHAPES.items()
                    if (rows, length) in (steps := measured_steps(name, recompute=recompute))
                ],
                limit=[(billions(s), s.limit(length, recomputed=recompute != "none")) for s in SHAPES.values()],
            )
        )
    return Figure("growth_model_size", "Size of the model", "billions of weights", lines)


def by_length() -> Figure:
    """One row of 512 to 350,000 tokens, 8B shape."""
    shape = SHAPES["8b"]
    lines = []
    for recompute in ("none", "offload"):
        # Without recomputation the longest rows need more than any card has.
        lengths = [length for length in LENGTHS if recompute != "none" or length <= 16384]
        lines.append(
            Line(
                name=f"1 row, recompute {recompute}",
                foreseen=[(n, foreseen(shape, batch=1, length=n, recompute=recompute)) for n in lengths],
                measured=[
                    (length, point)
                    for (rows, length), point in measured_steps("8b", recompute=recompute).items()
                    if rows == 1
                ],
                limit=[(n, shape.limit(n, recomputed=recompute != "none")) for n in lengths],
            )
        )
    return Figure("growth_length", "Length of a row, 8B shape", "tokens of the row", lines)


def by_micro_batch() -> Figure:
    """1 to 16 rows of 2048 tokens, 8B shape."""
    shape = SHAPES["8b"]
    lines = []
    for recompute in ("none", "full"):
        lines.append(
            Line(
                name=f"rows of 2048, recompute {recompute}",
                foreseen=[(n, foreseen(shape, batch=n, length=2048, recompute=recompute)) for n in BATCHES],
                measured=[
                    (rows, point)
                    for (rows, length), point in measured_steps("8b", recompute=recompute).items()
                    if length == 2048
                ],
                limit=[(n, shape.limit(2048, recomputed=recompute != "none")) for n in BATCHES],
            )
        )
    return Figure("growth_micro_batch", "Rows of a micro-batch, 8B shape", "rows", lines)


def by_rank() -> Figure:
    """r = 8 to 256, 8B shape, 4 x 2048 tokens. Speed was measured at r = 16 alone."""
    shape = SHAPES["8b"]
    lines = []
    for recompute in ("none", "full"):
        lines.append(
            Line(
                name=f"4 x 2048, recompute {recompute}",
                foreseen=[(r, foreseen(shape, batch=4, length=2048, rank=r, recompute=recompute)) for r in RANKS],
                measured=[(16, measured_steps("8b", recompute=recompute)[4, 2048])],
                limit=[(r, shape.limit(2048, recomputed=recompute != "none")) for r in RANKS],
            )
        )
    return Figure("growth_rank", "Rank of the adapter, 8B shape", "r", lines)


FIGURES = (by_size, by_length, by_micro_batch, by_rank)


def draw(figure: Figure, file: Path) -> None:
    """Two panels, both axes by powers: memory foreseen and measured, speed measured under its limit."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": figure.name, "font.size": 9})
    from matplotlib import pyplot, ticker

    page, (memory, speed) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for number, line in enumerate(figure.lines):
        colour = f"C{number}"
        memory.plot(*zip(*line.foreseen, strict=True), color=colour, label=line.name)
        speed.plot(*zip(*line.limit, strict=True), color=colour, linestyle=":")
        places = [place for place, _ in line.measured]
        memory.plot(places, [point.gigabytes for _, point in line.measured], "o", color=colour, markersize=4)
        speed.plot(places, [point.tokens_per_second for _, point in line.measured], "o", color=colour, markersize=4)
    memory.set(title=f"{figure.title}: peak, GB", xlabel=figure.axis)
    speed.set(title="tokens/s; dotted: the limit of its products", xlabel=figure.axis)
    memory.legend(frameon=False, fontsize=8)
    for panel in (memory, speed):
        panel.set_xscale("log")
        panel.set_yscale("log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=20))
            axis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
            axis.set_minor_formatter(ticker.NullFormatter())
        panel.tick_params(axis="x", labelrotation=30)
        panel.grid(visible=True, which="major", alpha=0.25)
    page.savefig(file, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    pyplot.close(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for make in FIGURES:
        figure = make()
        draw(figure, folder / f"{figure.name}.svg")


if __name__ == "__main__":
    main()
