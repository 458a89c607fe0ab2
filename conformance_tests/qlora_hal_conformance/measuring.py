"""The peak memory of training steps in a process of its own, where nothing else was ever allocated.

python -m qlora_hal_conformance.measuring WORK.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Batch, StepSettings
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.random_inputs import draw_adapter, stream
from qlora_hal_conformance.subject import Reference, import_subject
from qlora_hal_oracle import LlamaShape

CHILD_SECONDS = 1800.0
"""A last resort: a child that makes no progress is ended with its case, by a clock that knows of busy machines."""
STEPS = 2
"""The second step of a size meets everything that the first one made and kept."""

LARGE_BLOCKS_APART = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc gives freed blocks back only from there; otherwise resident memory counts the holes, too (mallopt(3))."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Which backend trains which model, with batches `[rows, time]` first of one size, then of another."""

    reference: Reference
    model: Path
    quantization: Quantization
    dtype: str
    checkpointing: bool
    sizes: tuple[tuple[int, int], tuple[int, int]]
    seed: int


def peaks_in_child(work: Measurement, shape: LlamaShape, folder: Path) -> tuple[int, int]:
    """Peak bytes after steps of the first size, and after steps of the second."""
    quantization = work.quantization
    record = {
        "reference": work.reference.as_json(),
        "model": str(work.model),
        "quantization": [quantization.weight_format.value, quantization.block_size, quantization.double_quant],
        "dtype": work.dtype,
        "checkpointing": work.checkpointing,
        "sizes": work.sizes,
        "seed": work.seed,
        "shape": {name: getattr(shape, name) for name in shape.__slots__},
    }
    path = folder / "measurement.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    command = [sys.executable, "-m", "qlora_hal_conformance.measuring", str(path)]
    environment = {**os.environ, **LARGE_BLOCKS_APART}
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"the measuring process did not end within {CHILD_SECONDS:.0f} s") from error
    reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
    assert child.returncode == 0, f"the measuring process ended with status {child.returncode}: {reason}"
    small, large = json.loads(child.stdout.strip().splitlines()[-1])
    return int(small), int(large)


def measure(record: dict[str, object]) -> tuple[int, ...]:
    """What the child does."""
    reference, stored, sizes, facts = (record[name] for name in ("reference", "quantization", "sizes", "shape"))
    assert isinstance(reference, dict)
    assert isinstance(stored, list)
    assert isinstance(sizes, list)
    assert isinstance(facts, dict)
    model, shape = Path(str(record["model"])), LlamaShape(**facts)
    random = stream(int(str(record["seed"])), "measuring")
    with import_subject(Reference(**reference)).open() as trainer:
        source = ModelSource(str(model), model, read_facts(model))
        compute = Compute(str(record["dtype"]), bool(record["checkpointing"]))  # type: ignore[arg-type]
        trainer.load(source, Quantization(WeightFormat(stored[0]), stored[1], stored[2]), compute)
        trainer.attach(draw_adapter(random, shape))
        peaks = []
        for rows, time in sizes:
            for _ in range(STEPS):
                batch = whole_batch(random, shape, rows, time)
                trainer.train_step([batch], StepSettings(1e-4, batch.counted_tokens)).resolve()
            peaks.append(trainer.peak_memory_bytes())
    return tuple(peaks)


def whole_batch(random: np.random.Generator, shape: LlamaShape, rows: int, time: int) -> Batch:
    """Rows without padding in which every token counts."""
    ids = random.integers(3, shape.vocab_size, size=(rows, time)).astype(np.int32)
    labels = ids.copy()
    labels[:, 0] = -100
    positions = np.tile(np.arange(time, dtype=np.int32), (rows, 1))
    return Batch(ids, labels, positions, np.ones_like(ids))


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
