"""The peak memory of training steps in a process of its own, where nothing else was ever allocated. Tests only.

python measuring.py '{"backend": ..., ...}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qlora_hal.backend import BackendSpec, Compute, Quantization
from qlora_hal.capabilities import Feature, WeightFormat
from qlora_hal.memory import estimate
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import ModelSource
from qlora_hal.values import Batch, StepSettings
from qlora_hal_conformance.drawing import draw_adapter
from qlora_hal_conformance.subject import Reference, Subject, import_subject
from qlora_hal_conformance.tiny_models import SHAPES, draw_tensors, linear_shapes, write_model, write_quantized

WIDE = replace(
    SHAPES[0], hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8, vocab_size=512
)
SIZES = ((1, 16), (8, 128))
"""Rows and tokens of the two batches. Activations of the large one are many times what an allocator rounds up: 1024
tokens in 6 layers keep some 120 MB in float32, 40 MB with checkpointing."""

STEPS = 2
"""The second step of a size meets everything that the first one made and kept."""

LARGE_BLOCKS_APART = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc gives freed blocks back only from there; otherwise resident memory counts the holes, too (mallopt(3))."""


@dataclass(frozen=True)
class Peaks:
    """Bytes after steps of each size, and what was foreseen for them."""

    small: int
    large: int
    foreseen_small: int
    foreseen_large: int


def peaks(reference: Reference, folder: Path, *, checkpointing: bool) -> Peaks:
    work = {"reference": reference.as_json(), "folder": str(folder), "checkpointing": checkpointing}
    command = [sys.executable, __file__, json.dumps(work)]
    environment = {**os.environ, **LARGE_BLOCKS_APART, "PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert child.returncode == 0, child.stderr
    return Peaks(**json.loads(child.stdout.strip().splitlines()[-1]))


def measure(reference: Reference, folder: Path, *, checkpointing: bool) -> Peaks:
    """What the child does."""
    subject, random = import_subject(reference).with_proof(), np.random.default_rng(0)
    source, quantization = written(folder, subject, random)
    adapter = draw_adapter(random, WIDE)
    found = []
    with subject.open() as trainer:
        trainer.load(source, quantization, Compute(subject.main_dtype, checkpointing))  # type: ignore[arg-type]
        trainer.attach(adapter)
        for rows, time in SIZES:
            for _ in range(STEPS):
                batch = whole_batch(random, rows, time)
                trainer.train_step([batch], StepSettings(1e-4, batch.counted_tokens)).resolve()
            found.append(trainer.peak_memory_bytes())
    foreseen = (
        _foreseen(subject.spec, source, quantization, subject.main_dtype, size, adapter.config.r, checkpointing)
        for size in SIZES
    )
    return Peaks(*found, *foreseen)


def written(folder: Path, subject: Subject, random: np.random.Generator) -> tuple[ModelSource, Quantization]:
    main = subject.main_format
    quantization = Quantization(main, subject.capabilities.block_sizes[main][0])
    tensors = draw_tensors(WIDE, random)
    if Feature.QUANTIZE_ON_LOAD in subject.capabilities.features:
        write_model(folder, WIDE, tensors)
    else:
        write_quantized(folder, WIDE, tensors, quantization)
    return ModelSource(str(folder), folder, read_facts(folder)), quantization


def _foreseen(
    spec: BackendSpec,
    source: ModelSource,
    quantization: Quantization,
    dtype: Any,
    size: tuple[int, int],
    r: int,
    checkpointing: bool,
) -> int:
    return estimate(
        source.facts,
        weight_format=WeightFormat(quantization.weight_format),
        block_size=quantization.block_size,
        double_quant=False,
        compute_dtype=dtype,
        r=r,
        targets={name: (inputs, outputs) for name, (outputs, inputs) in linear_shapes(WIDE).items()},
        optimizer="adamw",
        batch_size=size[0],
        sequence_length=size[1],
        gradient_checkpointing=checkpointing,
        constants=spec.memory_for("llama", dtype),
    ).total


def whole_batch(random: np.random.Generator, rows: int, time: int) -> Batch:
    """Rows without padding in which every token counts."""
    ids = random.integers(3, WIDE.vocab_size, size=(rows, time)).astype(np.int32)
    labels = ids.copy()
    labels[:, 0] = -100
    return Batch(ids, labels, np.tile(np.arange(time, dtype=np.int32), (rows, 1)), np.ones_like(ids))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    found = measure(Reference(**asked["reference"]), Path(asked["folder"]), checkpointing=asked["checkpointing"])
    print(json.dumps(asdict(found)))
