"""L4: memory: a peak that is honest and was foreseen, and no growth."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.memory_constants import MemoryQuery
from qlora_hal.formats.catalogue import record_of
from qlora_hal.memory.estimate import estimate
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.fixtures import Opened, Opener
from qlora_hal_conformance.measuring import Measurement, peaks_in_child
from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch
from qlora_hal_conformance.subject import Subject
from qlora_hal_conformance.tolerances import Bound, estimated_peak, memory_growth
from qlora_hal_oracle.random_models import SHAPES, draw_tensors, linear_shapes

RATE = 1e-3
WARM_STEPS, STEPS = 20, 40
LENGTHS = (48,) * 6
WIDE_SHAPE = replace(
    SHAPES[0], hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8, vocab_size=512
)
SIZES = ((1, 16), (8, 128))
"""Wide and long enough that activations are many times what an allocator rounds up: 1024 tokens in 6 layers keep some
120 MB in float32, 40 MB with checkpointing."""


@pytest.mark.needs(Feature.PEAK_MEMORY)
def test_peak_holds_at_least_the_base(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """The reported peak is no smaller than the packed weights, and does not fall."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    before = ready.trainer.peak_memory_bytes()
    ready.step([draw_batch(seeded, shape, lengths=LENGTHS)], RATE)
    after = ready.trainer.peak_memory_bytes()
    assert after >= before, f"the peak fell from {before} to {after} bytes"
    count = sum(linear.parameters for linear in linear_shapes(shape).values())
    stored = count * record_of(ready.quantization.weight_format).bits // 8
    judging.at_most("bytes of packed weights", stored, Bound(after, "the reported peak"))


@pytest.mark.needs(Feature.PEAK_MEMORY)
def test_reported_peak_does_not_grow(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    ready, window_bytes = _warmed(opened, seeded)
    before = ready.trainer.peak_memory_bytes()
    _train(ready, STEPS, seeded)
    grown = max(ready.trainer.peak_memory_bytes() - before, 0)
    judging.at_most("bytes grown over 40 steps", grown, memory_growth(window_bytes, STEPS))


@pytest.mark.needs(Feature.PEAK_MEMORY)
def test_peak_was_foreseen(
    opened: Opener, subject: Subject, scratch: Path, seeded: np.random.Generator, judging: Judge
) -> None:
    _judge_peak(opened, subject, scratch, seeded, judging, checkpointing=False)


@pytest.mark.needs(Feature.PEAK_MEMORY, Feature.GRADIENT_CHECKPOINTING)
def test_peak_was_foreseen_with_checkpointing(
    opened: Opener, subject: Subject, scratch: Path, seeded: np.random.Generator, judging: Judge
) -> None:
    _judge_peak(opened, subject, scratch, seeded, judging, checkpointing=True)


def test_process_does_not_grow(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Resident memory of this process over 40 steps of equal size, after 20 to warm up. An allocator may take a pool
    more at any time, once; a leak goes on, so the smaller growth of two times 40 steps counts."""
    import psutil

    process = psutil.Process()
    ready, window_bytes = _warmed(opened, seeded)
    resident = []
    for _ in range(3):
        gc.collect()
        resident.append(process.memory_info().rss)
        if len(resident) < 3:
            _train(ready, STEPS, seeded)
    grown = max(min(after - before for before, after in pairwise(resident)), 0)
    judging.at_most("bytes grown over 40 steps", grown, memory_growth(window_bytes, STEPS))


def test_closed_trainers_leave_nothing_behind(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Ten trainers opened and closed one after another take no more than a few of them at once."""
    import psutil

    shape, tensors = opened.models.drawn("main")
    adapter, process = draw_adapter(seeded, shape), psutil.Process()
    model_bytes = sum(tensor.nbytes for tensor in tensors.values())
    for _ in range(3):
        opened(adapter=adapter)
        opened.close()
    gc.collect()
    before = process.memory_info().rss
    for _ in range(10):
        opened(adapter=adapter)
        opened.close()
    gc.collect()
    grown = max(process.memory_info().rss - before, 0)
    judging.at_most("bytes grown over 10 trainers", grown, memory_growth(2 * model_bytes, 10))


def _judge_peak(
    opened: Opener,
    subject: Subject,
    scratch: Path,
    seeded: np.random.Generator,
    judging: Judge,
    *,
    checkpointing: bool,
) -> None:
    """The whole peak, and its growth from a small batch to a large one: what activations really take."""
    model = opened.written(scratch / "model", WIDE_SHAPE, draw_tensors(WIDE_SHAPE, seeded))
    adapter = draw_adapter(seeded, WIDE_SHAPE)
    ready = opened(model, checkpointing=checkpointing, adapter=adapter, prequantized=False)
    ready.trainer.peak_memory_bytes()
    constants = subject.spec.memory(MemoryQuery("llama", ready.dtype, device_kind=subject.spec.probe().device_kind))
    small, large = (
        estimate(
            ModelSource.in_folder(model.folder).facts,
            weight_format=ready.quantization.weight_format,
            block_size=ready.quantization.block_size,
            double_quant=False,
            compute_dtype=ready.dtype,  # type: ignore[arg-type]
            r=adapter.config.r,
            targets=linear_shapes(WIDE_SHAPE),
            optimizer="adamw",
            batch_size=rows,
            sequence_length=time,
            gradient_checkpointing=checkpointing,
            constants=constants,
        ).total
        for rows, time in SIZES
    )
    work = Measurement(
        subject.reference,
        model.folder,
        ready.quantization,
        ready.dtype,
        checkpointing,
        SIZES,
        int(seeded.integers(2**31)),
    )
    before, after = peaks_in_child(work, WIDE_SHAPE, scratch)
    judging.at_most("bytes at the peak", after, estimated_peak(large))
    judging.at_most("bytes that the large batch added", after - before, estimated_peak(large - small))


def _warmed(opened: Opener, seeded: np.random.Generator) -> tuple[Opened, int]:
    """A trainer past its first steps, and the bytes of one window's logits in float32."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    _train(ready, WARM_STEPS, seeded)
    return ready, sum(LENGTHS) * shape.vocab_size * 4


def _train(ready: Opened, steps: int, seeded: np.random.Generator) -> None:
    for _ in range(steps):
        ready.step([draw_batch(seeded, ready.model.shape, lengths=LENGTHS)], RATE)
