"""Rows of real lengths, packed and padded, and long rows: `mlx_lora` against mlx-lm's own LoRA trainer.

    python benchmarks/mlx_rows.py [--only lengths] [--only long] [--json FILE]

Model, adapter, optimizer and what is counted are those of mlx_step.py, at a smaller size. Samples of lognormal lengths
(median 270, mean 385, cut at `--capacity`) are the same tokens everywhere; mlx-lm sorts them by length and pads, and
does not pack:

    packed            ours, `--packed-rows` rows of `--capacity` tokens to a step, best fit decreasing
    padded, shuffled  ours, `--padded-rows` samples to a step in the order of a shuffled run
    padded, by length ours, the batches that mlx-lm makes of them
    mlx-lm            its own trainer on them

Long rows are one to a step, with all activations kept and with each layer recomputed. Every figure is of passes over
all batches after a first one, in which functions are traced; a pass counts its real tokens, by the clock and by this
process's CPU time. Losses are means over the steps of each pass.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np
from mlx_step import Measured, Sizes, mlx_lm_run, our_run, write_llama
from real_lengths import Sample, batch_of, drawn_samples, sample_lengths

from qlora_hal.contract.values import Batch
from qlora_hal.data.tokens.packing import pack

MLX_LM_PADS_TO = 32
"""And one token more, which is only a target."""
WARM_PASSES = 1


@dataclass(frozen=True)
class Work:
    """What one system does in a pass, and of how many cells how many are padding."""

    run: Callable[[], Measured]
    padding: float
    found: list[Measured] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=("lengths", "long"))
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--inner", type=int, default=320)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--capacity", type=int, default=1024)
    parser.add_argument("--packed-rows", type=int, default=2)
    parser.add_argument("--padded-rows", type=int, default=4)
    parser.add_argument("--long", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--passes", type=int, default=2, help="that are counted, after the first")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default=f"{platform.machine()} {mx.default_device()}", help="words for the record")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    sizes = Sizes(asked.hidden, asked.inner, asked.layers, vocabulary=asked.vocabulary, time=max(asked.long))
    report: dict[str, object] = {
        "device": asked.device,
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "numpy")}
        | {"python": platform.python_version()},
        "model": {name: value for name, value in asdict(sizes).items() if name not in ("rows", "time")},
        "passes": asked.passes,
        "rounds": asked.rounds,
    }
    with TemporaryDirectory() as scratch:
        folder = write_llama(Path(scratch) / "model", sizes)
        if "lengths" in (asked.only or ["lengths"]):
            report["lengths"] = of_real_lengths(folder, Path(scratch), asked)
            tell(report, asked.json)
        for length in asked.long if "long" in (asked.only or ["long"]) else ():
            report[f"one row of {length}"] = of_long_row(folder, Path(scratch), length, asked)
            tell(report, asked.json)


def tell(report: Mapping[str, object], file: Path | None) -> None:
    """As far as it is known: a run that is ended keeps what it has."""
    print(json.dumps(report, indent=1), flush=True)
    if file:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def of_real_lengths(folder: Path, scratch: Path, asked: argparse.Namespace) -> dict[str, object]:
    lengths = sample_lengths(asked.samples, asked.capacity)
    (samples,) = drawn_samples([lengths.tolist()], asked.vocabulary, seed=1)
    shuffled = np.random.default_rng(7).permutation(len(samples)).tolist()
    by_length = sorted(range(len(samples)), key=lambda place: len(samples[place]))
    packs = pack(lengths, asked.capacity, np.array(shuffled))
    packed = batches_of([[samples[place] for place in places] for places in packs], asked.packed_rows)
    padded = batches_of([[samples[place]] for place in shuffled], asked.padded_rows)
    sorted_ = batches_of([[samples[place]] for place in by_length], asked.padded_rows, MLX_LM_PADS_TO)

    def ours(batches: Sequence[Batch]) -> Work:
        return Work(lambda: our_run(folder, batches, asked.passes, warm=WARM_PASSES), padding_of(batches))

    def theirs() -> Measured:
        return mlx_lm_run(folder, scratch, samples, asked.passes, batch_size=asked.padded_rows, warm=WARM_PASSES)

    works = {
        "mlx-lm": Work(theirs, padding_of(sorted_)),
        "packed": ours(packed),
        "padded, shuffled": ours(padded),
        "padded, by length": ours(sorted_),
    }
    return {
        "samples": len(samples),
        "tokens": int(lengths.sum()),
        "capacity": asked.capacity,
        "steps_in_a_pass": {"packed": len(packed), "padded": len(padded)},
        **measured_in_turn(works, asked.rounds),
    }


def of_long_row(folder: Path, scratch: Path, length: int, asked: argparse.Namespace) -> dict[str, object]:
    ((sample,),) = drawn_samples([[length]], asked.vocabulary, seed=2)
    batches = [batch_of([[sample]])]

    def ours(recompute: bool) -> Callable[[], Measured]:
        return lambda: our_run(folder, batches, asked.passes, warm=WARM_PASSES, recompute=recompute)

    def theirs(recompute: bool) -> Callable[[], Measured]:
        return lambda: mlx_lm_run(
            folder, scratch, [sample], asked.passes, batch_size=1, warm=WARM_PASSES, recompute=recompute
        )

    kept = {"mlx-lm": Work(theirs(False), 0.0), "ours": Work(ours(False), 0.0)}
    again = {"mlx-lm": Work(theirs(True), 0.0), "ours": Work(ours(True), 0.0)}
    return {"kept": measured_in_turn(kept, asked.rounds), "recomputed": measured_in_turn(again, asked.rounds)}


def batches_of(rows: Sequence[Sequence[Sample]], to_a_step: int, *pad_multiple: int) -> list[Batch]:
    return [batch_of(rows[start : start + to_a_step], *pad_multiple) for start in range(0, len(rows), to_a_step)]


def padding_of(batches: Sequence[Batch]) -> float:
    cells = sum(batch.segment_ids.size for batch in batches)
    return round(1 - sum(batch.real_tokens for batch in batches) / cells, 4)


def measured_in_turn(works: Mapping[str, Work], rounds: int) -> dict[str, object]:
    """Figures of each work; the ratios are to mlx-lm's in the same run."""
    for _ in range(rounds):
        for name, work in works.items():
            work.found.append(work.run())
            print(f"# {name}: {work.found[-1]}", flush=True)
    theirs = works["mlx-lm"].found

    def against(found: Sequence[Measured], figure: Callable[[Measured], float]) -> float:
        return round(statistics.median(map(figure, found)) / statistics.median(map(figure, theirs)), 3)

    return {
        "work": {
            name: {
                "padding": work.padding,
                "tokens_per_second": [round(one.tokens_per_second, 1) for one in work.found],
                "ratio": against(work.found, lambda one: one.tokens_per_second),
                "cpu_time_ratio": against(work.found, lambda one: one.tokens_per_cpu_second),
                "peak_bytes": max(one.peak_bytes for one in work.found),
                "peak_ratio": against(work.found, lambda one: one.peak_bytes),
                "losses": [round(loss, 4) for loss in work.found[-1].losses],
            }
            for name, work in works.items()
        }
    }


if __name__ == "__main__":
    main()
