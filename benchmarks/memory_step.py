"""Memory and speed of one step under each choice of recomputation and of where the base lives, losses beside.

    PYTHONPATH=.:backends:benchmarks python benchmarks/memory_step.py --rows 8b-recomputed,8b-16k --json FILE
    PYTHONPATH=.:backends:benchmarks python benchmarks/memory_step.py --rows tiny        # runs on a CPU

Each row of work is run under several choices, one after another in one process, on the same random weights and tokens
(`random_model.py` says which). `peak` is of torch's allocator from loading on, in decimal GB; `context` is what the
process holds on the device beside what the allocator reserved. With `--cap-gb` the allocator may take no more than so
much, and a choice that does not fit says so. The first choice of a row is what the others' losses are compared with:
whole steps, so that a last bit of a gradient shows as a sign of AdamW's first update. Attention's backward adds in an
order of its own on a GPU; only with `--deterministic` would equal computations have equal losses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from random_model import (
    CLIP,
    QUANTIZATION,
    SHAPES,
    WARM_UP_STEPS,
    allocated_gb,
    as_batch,
    empty_memory,
    first_adapter,
    open_trainer,
    synchronize,
    token_batches,
    write_checkpoint,
)

from qlora_hal.contract.backend import Compute
from qlora_hal.contract.memory_constants import OFFLOADED_LAYERS, ON_DISK
from qlora_hal.contract.values import StepSettings
from qlora_hal.errors import OutOfMemoryError
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer

ALL_ON_HOST = ("embeddings", "layers", "head")


@dataclass(frozen=True, slots=True)
class Choice:
    """`recompute` is `training.recompute`, `offload` `training.base_offload`; `on_disk` says where layers rest."""

    recompute: str = "none"
    offload: tuple[str, ...] = ()
    optimizer: str = "adamw"
    on_disk: bool = False

    def __str__(self) -> str:
        base = f", host: {'+'.join(self.offload)}" if self.offload else ""
        return f"{self.recompute}{base}{', layers on the disk' if self.on_disk else ''}, {self.optimizer}"

    def compute(self, device: torch.device) -> Compute:
        recomputes = self.recompute != "none"
        recompute: Any = self.recompute if recomputes else "full"
        offload: Any = self.offload
        options = {OFFLOADED_LAYERS: ON_DISK} if self.on_disk else {}
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        return Compute(dtype, recomputes, options, recompute=recompute, base_offload=offload)


@dataclass(frozen=True, slots=True)
class Row:
    """Work: micro-batches of so many rows of so many tokens, one size after the other, for each choice."""

    shape: str
    sizes: Sequence[tuple[int, int]]
    choices: Sequence[Choice]


KEPT, SELECTIVE, FULL, OFFLOAD = (Choice(kind) for kind in ("none", "selective", "full", "offload"))
SMALLEST = Choice("offload", ALL_ON_HOST, "adamw_8bit")
STREAMED = Choice("offload", ("embeddings", "layers"))
FROM_DISK = replace(STREAMED, on_disk=True)
FIT_IN_LESS = Choice("offload", ("embeddings",), "adamw_8bit")
ROWS = {
    "tiny": Row("tiny", ((2, 64), (1, 32)), (KEPT, SELECTIVE, FULL, OFFLOAD, STREAMED, FROM_DISK, SMALLEST)),
    "8b-recomputed": Row("8b", ((4, 2048),), (KEPT, SELECTIVE, FULL, OFFLOAD)),
    "8b-long": Row("8b", ((1, 16384), (1, 65536)), (OFFLOAD,)),
    "8b-90k": Row("8b", ((1, 92160),), (OFFLOAD,)),
    "8b-350k": Row("8b", ((1, 350208),), (OFFLOAD,)),
    "8b-streamed-512": Row("8b", ((1, 512),), (OFFLOAD, STREAMED, SMALLEST)),
    "8b-streamed-8192": Row("8b", ((4, 2048),), (KEPT, Choice("none", ("embeddings", "layers")))),
    "8b-disk": Row("8b", ((1, 512), (4, 2048)), (STREAMED, FROM_DISK)),
    "7b-512": Row("7b", ((1, 512),), (OFFLOAD, FULL, Choice("offload", (), "adamw_8bit"), FIT_IN_LESS)),
    "65b-512": Row("65b", ((1, 512),), (OFFLOAD, FIT_IN_LESS)),
    "65b-streamed": Row("65b", ((1, 512), (1, 2048), (4, 2048)), (Choice("offload", ALL_ON_HOST),)),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One choice at one size of a row of work."""

    row: str
    rows: int
    length: int
    choice: str
    tokens_per_second: float
    step_ms: float
    peak_gb: float
    reserved_gb: float
    loaded_gb: float
    context_gb: float
    losses: list[float]
    notes: list[str]
    kernel_path: str


def measured(name: str, choice: Choice, folder: Path, steps: int) -> Iterator[Measured]:
    """Each size of a row under one choice."""
    row = ROWS[name]
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    empty_memory(device)
    with open_trainer() as trainer:
        source = ModelSource(folder.name, folder, read_facts(folder))
        trainer.load(source, QUANTIZATION, choice.compute(device))
        trainer.attach(first_adapter(SHAPES[row.shape]), choice.optimizer)
        for rows, length in row.sizes:
            yield _size(trainer, name, choice, (rows, length), device, steps)


def _size(
    trainer: TorchLoRATrainer, name: str, choice: Choice, size: tuple[int, int], device: torch.device, steps: int
) -> Measured:
    """Raises OutOfMemoryError."""
    rows, length = size
    empty_memory(device)
    loaded = allocated_gb(device, "memory_allocated")
    batches = [as_batch(tokens) for tokens in token_batches(SHAPES[ROWS[name].shape], rows, length)]
    seconds, losses = [], []
    for index in range(steps):
        batch = batches[index % 2]
        synchronize(device)
        start = time.perf_counter()
        settings = StepSettings(1e-4, batch.counted_tokens, max_grad_norm=CLIP)
        losses.append(round(float(trainer.train_step([batch], settings).resolve().loss), 5))
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    typical = statistics.median(seconds[min(WARM_UP_STEPS, steps // 2) :])
    return Measured(
        row=name,
        rows=rows,
        length=length,
        choice=str(choice),
        tokens_per_second=round(rows * length / typical, 1),
        step_ms=round(typical * 1e3, 2),
        peak_gb=round(allocated_gb(device, "max_memory_allocated"), 3),
        reserved_gb=round(allocated_gb(device, "max_memory_reserved"), 3),
        loaded_gb=round(loaded, 3),
        context_gb=round(_context_gb(device), 3),
        losses=losses,
        notes=list(trainer.load_notes),
        kernel_path=trainer.device_facts().kernel_path,
    )


def _context_gb(device: torch.device) -> float:
    """What is in use on the device and not of the allocator; other processes must be off it."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return (total - free - torch.cuda.memory_reserved(device)) / 1e9


def results(names: Sequence[str], folder_of: Callable[[str], Path], steps: int) -> Iterator[Measured]:
    for name in names:
        for choice in ROWS[name].choices:
            try:
                for found in measured(name, choice, folder_of(ROWS[name].shape), steps):
                    print(f"# {json.dumps(asdict(found))}", flush=True)
                    yield found
            except (OutOfMemoryError, torch.OutOfMemoryError) as error:
                print(f"# {name}, {choice}: out of memory: {str(error).splitlines()[0]}", flush=True)


def apart(found: Measured, all_found: Sequence[Measured]) -> float:
    """The largest difference from the losses of the row's first choice at the same size."""
    first = next(m for m in all_found if (m.row, m.rows, m.length) == (found.row, found.rows, found.length))
    return round(max(abs(a - b) for a, b in zip(found.losses, first.losses, strict=True)), 6)


def table(found: Sequence[Measured]) -> str:
    lines = ["| work | recompute, base, optimizer | tokens/s | step ms | peak GB | reserved | context | losses apart |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    lines += [
        f"| {m.row} {m.rows} x {m.length} | {m.choice} | {m.tokens_per_second:,.0f} | {m.step_ms} | {m.peak_gb} | "
        f"{m.reserved_gb} | {m.context_gb} | {apart(m, found)} |"
        for m in found
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="8b-recomputed", help=f"of {', '.join(ROWS)}; separated by commas")
    parser.add_argument("--make", default="", help="make the checkpoints of these shapes, and nothing else")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--deterministic", action="store_true", help="losses that repeat bit for bit; slower")
    parser.add_argument("--cap-gb", type=float, default=0.0, help="what the allocator may take, decimal GB")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="where checkpoints are made and kept")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if given.cap_gb and device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(given.cap_gb * 1e9 / total, 0)

    def folder_of(shape: str) -> Path:
        folder: Path = given.folder / f"qlora-hal-bench-{shape}"
        write_checkpoint(folder, SHAPES[shape], device)
        return folder

    if given.make:
        for shape in given.make.split(","):
            folder_of(shape)
        return
    found = list(results(given.rows.split(","), folder_of, given.steps))
    print(table(found))
    if given.json:
        record = {
            "command": f"python benchmarks/memory_step.py --rows {given.rows} --steps {given.steps}"
            + (f" --cap-gb {given.cap_gb:g}" if given.cap_gb else "")
            + (" --deterministic" if given.deterministic else ""),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "found": [asdict(each) for each in found],
        }
        with contextlib.suppress(OSError):
            given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
