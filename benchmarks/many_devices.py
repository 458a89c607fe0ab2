"""One training step on one, two and more GPUs of a machine: whole and sharded bases, by micro-batch and length.

    PYTHONPATH=.:backends:benchmarks python benchmarks/many_devices.py --shape 8b --ranks 1,2,4 --json FILE

Weak scaling: each device has the same rows, whatever their number. Every number of ranks runs in processes of its own,
started as `--devices` starts them, on the cards of one machine, one after another. `without sums` leaves the reduction
of the gradients out, which is wrong, and shows what it costs. With `--cap-gb` each process may allocate so much.
`--recompute` and `--base-offload` are `training.recompute` and `training.base_offload`:

    python benchmarks/many_devices.py --shape 70b --ranks 2 --modes shard --sizes 1x512x1 --cap-gb 24 \
        --recompute offload --base-offload embeddings,head --optimizer adamw_8bit --checkpoint FOLDER
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from random_model import (
    CLIP,
    QUANTIZATION,
    SHAPES,
    WARM_UP_STEPS,
    as_batch,
    first_adapter,
    open_trainer,
    write_checkpoint,
)

from qlora_hal.contract.backend import Compute
from qlora_hal.contract.values import StepSettings
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import ModelSource
from qlora_hal.ranks.identity import world_here
from qlora_hal_backends.torch_family.ranks import Ranks

LAUNCHER = "qlora_hal_backends.torch_family.launching"
TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Work:
    """What the ranks of one start are asked to measure. A size is (rows, tokens, micro-batches) of each rank."""

    shape: str
    checkpoint: str
    modes: Sequence[str]
    sizes: Sequence[tuple[int, int, int]]
    steps: int
    recompute: str
    base_offload: Sequence[str]
    optimizer: str
    cap_gb: float
    out: str


@dataclass(frozen=True, slots=True)
class Measured:
    """One size, as rank 0 saw it. `peak_gb` is of the torch allocator."""

    ranks: int
    mode: str
    rows: int
    length: int
    micro_batches: int
    tokens_per_second: float
    step_ms: float
    fastest_ms: float
    peak_gb: float
    loaded_gb: float
    losses: list[float]
    note: str = ""


# in each rank ---------------------------------------------------------------------------------------------------------
def measure(folder: Path) -> None:
    work = Work(**json.loads((folder / "request.json").read_text(encoding="utf-8")))
    world, found = world_here(), []
    if world.size == 1:
        torch.cuda.set_device(0)
    if work.cap_gb:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(work.cap_gb * 1e9 / total, world.local_rank)
    source = ModelSource(Path(work.checkpoint).name, Path(work.checkpoint), read_facts(Path(work.checkpoint)))
    trainer = open_trainer()
    if world.size > 1:
        trainer.join_ranks(world, TIMEOUT_SECONDS)
    for mode in work.modes:
        torch.cuda.reset_peak_memory_stats()
        compute = Compute(
            "bfloat16",
            work.recompute != "none",
            {},
            world,
            mode == "shard" and world.size > 1,
            recompute="full" if work.recompute == "none" else work.recompute,  # type: ignore[arg-type]
            base_offload=tuple(work.base_offload),  # type: ignore[arg-type]
        )
        trainer.load(source, QUANTIZATION, compute)
        trainer.attach(first_adapter(SHAPES[work.shape]), work.optimizer)
        loaded = torch.cuda.memory_allocated() / 1e9
        with mock.patch.object(Ranks, "sum_on_device") if mode == "without sums" else nullcontext():
            for rows, length, count in work.sizes:
                found.append(_size(trainer, world, mode, (rows, length, count), work, loaded))
                if world.rank == 0:
                    print(found[-1], file=sys.stderr, flush=True)
    trainer.close()
    if world.rank == 0:
        Path(work.out).write_text(json.dumps([asdict(each) for each in found]), encoding="utf-8")


def _size(trainer: Any, world: Any, mode: str, size: tuple[int, int, int], work: Work, loaded: float) -> Measured:
    import numpy as np

    rows, length, count = size
    torch.cuda.reset_peak_memory_stats()
    random = np.random.default_rng(1234 + world.rank)
    vocabulary = SHAPES[work.shape]["vocab_size"]
    windows = [
        [as_batch(random.integers(10, vocabulary, (rows, length), dtype=np.int32)) for _ in range(count)]
        for _ in range(2)
    ]
    seconds, losses = [], []
    for step in range(work.steps):
        torch.cuda.synchronize()
        trainer.sum_over_ranks(np.zeros(1))
        start = time.perf_counter()
        window = windows[step % 2]
        denominator = float(sum(batch.counted_tokens for batch in window) * world.size)
        losses.append(trainer.train_step(window, StepSettings(1e-4, denominator, max_grad_norm=CLIP)).resolve().loss)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    typical = statistics.median(seconds[WARM_UP_STEPS:])
    return Measured(
        ranks=world.size,
        mode=mode if world.size > 1 else "one device",
        rows=rows,
        length=length,
        micro_batches=count,
        tokens_per_second=round(rows * length * count * world.size / typical, 1),
        step_ms=round(typical * 1e3, 2),
        fastest_ms=round(min(seconds) * 1e3, 2),
        peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2),
        loaded_gb=round(loaded, 2),
        losses=[round(float(loss), 4) for loss in losses],
        note=f"{world.size} ranks hold parts" if mode == "shard" else "",
    )


# around them ----------------------------------------------------------------------------------------------------------
def started(ranks: int, work: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
    """What so many ranks measured; an empty list, with what they said on the terminal, where they did not get there."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch), Path(scratch) / "found.json"
        (folder / "request.json").write_text(json.dumps({**work, "out": str(out)}), encoding="utf-8")
        command = [sys.executable, "-m", LAUNCHER, str(ranks), "0", "many_devices", str(folder)]
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            print(f"{ranks} ranks did not end within {seconds:g} s", file=sys.stderr)
        found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
        return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Tokens a second beside those of one device with the same rows."""
    alone = {(m["rows"], m["length"], m["micro_batches"]): m["tokens_per_second"] for m in found if m["ranks"] == 1}
    lines = ["| devices | mode | rows x tokens a device | tokens/s | times one device | of linear | peak GB |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for m in found:
        one = alone.get((m["rows"], m["length"], m["micro_batches"]))
        times = m["tokens_per_second"] / one if one else float("nan")
        size = f"{m['rows']} x {m['length']}" + (f" x {m['micro_batches']}" if m["micro_batches"] > 1 else "")
        lines.append(
            f"| {m['ranks']} | {m['mode']} | {size} | {m['tokens_per_second']:,.0f} | {times:.3f} | "
            f"{times / m['ranks']:.3f} | {m['peak_gb']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--modes", default="data,shard,without sums")
    parser.add_argument("--sizes", default="4x2048x1,1x2048x1")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--recompute", choices=("none", "selective", "full", "offload"), default="none")
    parser.add_argument("--base-offload", default="", help="of embeddings, layers, head; separated by commas")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--cap-gb", type=float, default=0.0)
    parser.add_argument("--checkpoint", type=Path, required=True, help="made here if it is not there")
    parser.add_argument("--seconds", type=float, default=240.0, help="for each number of ranks")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    write_checkpoint(given.checkpoint, SHAPES[given.shape], torch.device("cuda"))
    torch.cuda.empty_cache()
    work = {
        "shape": given.shape,
        "checkpoint": str(given.checkpoint),
        "sizes": [[int(part) for part in size.split("x")] for size in given.sizes.split(",")],
        "steps": given.steps,
        "recompute": given.recompute,
        "base_offload": [part for part in given.base_offload.split(",") if part],
        "optimizer": given.optimizer,
        "cap_gb": given.cap_gb,
    }
    found = []
    for ranks in map(int, given.ranks.split(",")):
        modes = given.modes.split(",") if ranks > 1 else ["data"]
        found += started(ranks, {**work, "modes": modes}, given.seconds)
    device = torch.cuda.get_device_properties(0)
    record = {
        "command": "python benchmarks/many_devices.py " + " ".join(sys.argv[1:]),
        "device": device.name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "found": found,
    }
    print(table(found))
    if given.json:
        given.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 2 and Path(sys.argv[1]).is_dir():
        measure(Path(sys.argv[1]))
    else:
        main()
