"""L4: memory: a peak that is honest, and no growth."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from qlora_hal.capabilities import Feature, WeightFormat
from qlora_hal_conformance.drawing import draw_adapter, draw_batch
from qlora_hal_conformance.judging import Judge
from qlora_hal_conformance.opening import Opened, Opener
from qlora_hal_conformance.tiny_models import linear_shapes
from qlora_hal_conformance.tolerances import Bound, memory_growth

RATE = 1e-3
WARM_STEPS, STEPS = 20, 40
LENGTHS = (48,) * 6
BITS = {WeightFormat.NONE: 16, WeightFormat.INT8: 8, WeightFormat.INT8_AFFINE: 8}


@pytest.mark.needs(Feature.PEAK_MEMORY)
def test_peak_holds_at_least_the_base(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """The reported peak is no smaller than the packed weights, and does not fall."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    before = ready.trainer.peak_memory_bytes()
    ready.step([draw_batch(seeded, shape, lengths=LENGTHS)], RATE)
    after = ready.trainer.peak_memory_bytes()
    assert after >= before, f"the peak fell from {before} to {after} bytes"
    count = sum(outputs * inputs for outputs, inputs in linear_shapes(shape).values())
    stored = count * BITS.get(ready.quantization.weight_format, 4) // 8
    judging.at_most("bytes of packed weights", stored, Bound(after, "the reported peak"))


@pytest.mark.needs(Feature.PEAK_MEMORY)
def test_reported_peak_does_not_grow(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    ready, window_bytes = _warmed(opened, seeded)
    before = ready.trainer.peak_memory_bytes()
    _train(ready, STEPS, seeded)
    grown = max(ready.trainer.peak_memory_bytes() - before, 0)
    judging.at_most("bytes grown over 40 steps", grown, memory_growth(window_bytes, STEPS))


def test_process_does_not_grow(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Resident memory of this process over 40 steps of equal size, after 20 to warm up."""
    import psutil

    process = psutil.Process()
    ready, window_bytes = _warmed(opened, seeded)
    gc.collect()
    before = process.memory_info().rss
    _train(ready, STEPS, seeded)
    gc.collect()
    grown = max(process.memory_info().rss - before, 0)
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


def _warmed(opened: Opener, seeded: np.random.Generator) -> tuple[Opened, int]:
    """A trainer past its first steps, and the bytes of one window's logits in float32."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    _train(ready, WARM_STEPS, seeded)
    return ready, sum(LENGTHS) * shape.vocab_size * 4


def _train(ready: Opened, steps: int, seeded: np.random.Generator) -> None:
    for _ in range(steps):
        ready.step([draw_batch(seeded, ready.model.shape, lengths=LENGTHS)], RATE)
