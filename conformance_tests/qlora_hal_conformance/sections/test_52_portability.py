"""L3: adapter and optimizer move to another implementation and back."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_hal.contract.values import Adapter, Float32, OptimizerSnapshot
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.fixtures import Opener, oracle_step
from qlora_hal_conformance.parameters import HALF_DTYPES, OracleOf, each_dtype
from qlora_hal_conformance.random_inputs import draw_adapter, draw_window
from qlora_hal_conformance.tolerances import UpdateSettings, copied, values_of_the_compute_dtype
from qlora_hal_conformance.updating import judge_step, oracle_at_state_of
from qlora_hal_oracle import round_to_bfloat16

RATE = 1e-2
STEPS = 4


def test_state_moves_to_the_oracle_and_goes_on(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """The backend trains, the oracle takes over its adapter and moments; their next step is the same."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    for _ in range(STEPS):
        ready.step(draw_window(seeded, shape), RATE, weight_decay=0.1)
    reference = oracle_at_state_of(ready)
    assert reference.export_optimizer()[0] == STEPS
    judge_step(ready, reference, draw_window(seeded, shape), UpdateSettings(RATE, weight_decay=0.1), judging)


def test_state_moves_from_the_oracle_and_goes_on(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """The oracle trains, the backend takes over: a step written by another implementation is continued exactly."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    elsewhere = oracle(ready)
    for _ in range(STEPS):
        oracle_step(elsewhere, draw_window(seeded, shape), RATE, weight_decay=0.1)
    assert ready.adapter is not None
    tensors = {name: tensor.astype(np.float32) for name, tensor in elsewhere.export_adapter().items()}
    step, moments = elsewhere.export_optimizer()
    narrow = {name: moment.astype(np.float32) for name, moment in moments.items()}
    ready.attach(Adapter(tensors, ready.adapter.config))
    ready.trainer.import_optimizer(OptimizerSnapshot(step, narrow))
    exported = ready.trainer.export_optimizer()
    judging.all_within("moments", exported.moments, moments, {name: copied(moment) for name, moment in moments.items()})
    judge_step(ready, oracle_at_state_of(ready), draw_window(seeded, shape), UpdateSettings(RATE), judging)


def test_state_there_and_back_is_unchanged(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Through the oracle's float64 and back to float32: the same bits."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    for _ in range(2):
        ready.step(draw_window(seeded, shape), RATE)
    adapter, snapshot = ready.trainer.export_adapter(), ready.trainer.export_optimizer()
    there = oracle_at_state_of(ready)
    step, moments = there.export_optimizer()
    back = Adapter({name: tensor.astype(np.float32) for name, tensor in there.export_adapter().items()}, adapter.config)
    ready.attach(back)
    ready.trainer.import_optimizer(OptimizerSnapshot(step, {n: m.astype(np.float32) for n, m in moments.items()}))
    judging.equal("adapter", ready.trainer.export_adapter().tensors, adapter.tensors)
    after = ready.trainer.export_optimizer()
    judging.equal("moments", after.moments, snapshot.moments)
    assert after.step == snapshot.step


@pytest.mark.parametrize("dtype", each_dtype(*HALF_DTYPES))
def test_state_is_float32_whatever_the_compute_dtype(
    dtype: str, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """What is handed over after steps in half precision is no half precision widened: master weights and moments were
    kept in float32. An adapter that is rounded after each step stands still at small rates."""
    shape, _ = opened.models.drawn("main")
    ready = opened(dtype=dtype, adapter=draw_adapter(seeded, shape))
    for _ in range(STEPS):
        ready.step(draw_window(seeded, shape), RATE, weight_decay=0.1)
    adapter, moments = ready.trainer.export_adapter().tensors, ready.trainer.export_optimizer().moments
    shares = {name: _share_in(dtype, tensor) for name, tensor in (*adapter.items(), *moments.items())}
    most = max(shares, key=lambda name: shares[name])
    judging.at_most(f"part of {most} that is exact in {dtype}", shares[most], values_of_the_compute_dtype())


def _share_in(dtype: str, tensor: Float32) -> float:
    """Part of the numbers other than 0 that the dtype holds exactly; all of a tensor of zeros."""
    values = tensor[tensor != 0.0]
    with np.errstate(over="ignore"):
        rounded = round_to_bfloat16(values) if dtype == "bfloat16" else values.astype(np.float16).astype(np.float32)
    return float(np.mean(rounded == values)) if values.size else 1.0
