"""Memory that is not there: one error on every backend, and a trainer that works afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from memory.measuring import WIDE, whole_batch, written
from memory.test_foreseen import READY

from qlora_hal.backend import Compute, QuantizedLoRATrainer
from qlora_hal.errors import OutOfMemoryError
from qlora_hal.values import Adapter, Batch, StepSettings
from qlora_hal_conformance.drawing import draw_adapter
from qlora_hal_conformance.subject import Reference, import_subject

ENDLESS = 2**44
"""As many rows of anything are more than an address space holds: every allocator fails, none is put under pressure."""


@pytest.fixture(params=READY)
def trainer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[QuantizedLoRATrainer]:
    subject = import_subject(Reference(request.param))
    source, quantization = written(tmp_path / "model", subject, np.random.default_rng(0))
    with subject.open() as opened:
        opened.load(source, quantization, Compute("float32"))
        yield opened


def trains(trainer: QuantizedLoRATrainer, adapter: Adapter) -> bool:
    """An ordinary step with an ordinary adapter is applied and changes it."""
    trainer.attach(adapter)
    batch = whole_batch(np.random.default_rng(1), 2, 12)
    applied = trainer.train_step([batch], StepSettings(1e-3, batch.counted_tokens)).resolve().applied
    after = trainer.export_adapter().tensors
    return applied and any(not np.array_equal(after[name], tensor) for name, tensor in adapter.tensors.items())


@pytest.mark.fault("N07")
def test_an_adapter_that_no_memory_holds(trainer: QuantizedLoRATrainer) -> None:
    """A rank of 2^44: a real failure of a real allocator, with arrays that take no memory themselves."""
    adapter = draw_adapter(np.random.default_rng(0), WIDE)
    endless = {
        name: np.broadcast_to(np.float32(0.01), (ENDLESS, t.shape[1]) if "lora_A" in name else (t.shape[0], ENDLESS))
        for name, t in adapter.tensors.items()
    }
    with pytest.raises(OutOfMemoryError, match="ran out of memory in attaching the adapter") as caught:
        trainer.attach(Adapter(endless, replace(adapter.config, r=ENDLESS)))
    assert caught.value.code == "QH-N07"
    assert caught.value.fix
    assert trains(trainer, adapter)


@pytest.mark.fault("N07")
def test_a_window_that_no_memory_holds(trainer: QuantizedLoRATrainer) -> None:
    adapter = draw_adapter(np.random.default_rng(0), WIDE)
    trainer.attach(adapter)
    token = np.broadcast_to(np.int32(5), (ENDLESS, 16))
    with pytest.raises(OutOfMemoryError, match="ran out of memory in a training step"):
        trainer.train_step([Batch(token, token, token, token)], StepSettings(1e-3, 1)).resolve()
    assert trains(trainer, adapter)
