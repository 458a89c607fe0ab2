"""L2: a finite loss is not enough. A step whose gradient is not finite, wherever, changes nothing and says so."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_hal.adapter.naming import lora_b_key
from qlora_hal.contract.values import IGNORE_LABEL, Batch
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.fixtures import Opened, Opener
from qlora_hal_conformance.hostile_inputs import (
    Overflow,
    overflow_everywhere,
    overflow_of_one,
    overflow_of_the_sum,
    towering,
)
from qlora_hal_conformance.parameters import in_each_dtype
from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch, draw_window, with_field
from qlora_hal_conformance.tolerances import UpdateSettings, loss_bound
from qlora_hal_conformance.updating import drawn_moments, judge_step, oracle_at_state_of
from qlora_hal_oracle import LlamaShape
from qlora_hal_oracle.random_models import linear_shapes

RATE = 1e-2
CLIPS = {"clipped": 1, "not_clipped": None}


@in_each_dtype
@pytest.mark.parametrize("max_grad_norm", CLIPS.values(), ids=CLIPS)
def test_no_gradient_is_finite(
    max_grad_norm: float | None, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    _give_moments(ready, window, seeded)
    _judge_refused(ready, overflow_everywhere(oracle_at_state_of(ready), window), max_grad_norm, judging)
    judge_step(ready, oracle_at_state_of(ready), window, UpdateSettings(RATE), judging)


@in_each_dtype
@pytest.mark.parametrize("max_grad_norm", CLIPS.values(), ids=CLIPS)
def test_one_tensor_has_a_gradient_that_is_not_finite(
    max_grad_norm: float | None, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """Clipped by an infinite norm, or looked at one by one, the others would still move."""
    ready, tensor, window = _with_a_towering_module(opened, seeded)
    _judge_refused(ready, overflow_of_one(oracle_at_state_of(ready), window, tensor), max_grad_norm, judging)
    _judge_next(ready, window, judging)


@in_each_dtype
def test_only_the_sum_of_the_micro_batches_is_not_finite(
    opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    ready, tensor, window = _with_a_towering_module(opened, seeded, last=True)
    _judge_refused(ready, overflow_of_the_sum(oracle_at_state_of(ready), window[0], tensor), None, judging)
    _judge_next(ready, window, judging)


@in_each_dtype
def test_only_one_of_three_micro_batches_is_not_finite(
    opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """The others count no token: whichever place it has, what it leaves in the sum is found."""
    ready, tensor, window = _with_a_towering_module(opened, seeded, last=True)
    over = overflow_of_one(oracle_at_state_of(ready), window, tensor)
    silent = with_field(window[0], labels=np.full_like(window[0].labels, IGNORE_LABEL))
    for place in range(3):
        mixed = [window[0] if n == place else silent for n in range(3)]
        _judge_refused(ready, Overflow(mixed, over.denominator, over.tensors), 1, judging)
    _judge_next(ready, window, judging)


def _with_a_towering_module(
    opened: Opener, seeded: np.random.Generator, *, last: bool = False
) -> tuple[Opened, str, list[Batch]]:
    """A trainer, the tensor whose gradient towers over the others, and one row. With `last` the module is one that sees
    the only counted prediction and nothing else, so that its gradient is no sum."""
    shape, _ = opened.models.drawn("main")
    modules = sorted(linear_shapes(shape))
    module = f"model.layers.{shape.num_hidden_layers - 1}.mlp.down_proj"
    if not last:
        module = modules[int(seeded.integers(len(modules)))]
    dtype = opened.main_dtype
    ready = opened(adapter=towering(draw_adapter(seeded, shape), module, dtype))
    window = [_one_prediction(shape, seeded)] if last else draw_window(seeded, shape)
    _give_moments(ready, window, seeded)
    return ready, lora_b_key(module), window


def _one_prediction(shape: LlamaShape, seeded: np.random.Generator) -> Batch:
    return draw_batch(seeded, shape, lengths=(9,), prompt=8)


def _give_moments(ready: Opened, window: list[Batch], seeded: np.random.Generator) -> None:
    """Without moments of its own a step that decays them would go unnoticed."""
    ready.trainer.import_optimizer(drawn_moments(ready, window, int(seeded.integers(2, 40)), seeded))


def _judge_refused(ready: Opened, over: Overflow, max_grad_norm: float | None, judging: Judge) -> None:
    reference = oracle_at_state_of(ready)
    counted = [batch for batch in over.window if batch.counted_tokens]
    loss, bound = reference.evaluate(counted)[0], loss_bound(reference, counted, ready.dtype)
    adapter, snapshot = ready.trainer.export_adapter().tensors, ready.trainer.export_optimizer()
    stats = ready.step(over.window, RATE, weight_decay=0.1, max_grad_norm=max_grad_norm, denominator=over.denominator)
    assert not stats.applied, f"applied, though {len(over.tensors)} tensors have a gradient beyond float32: {stats}"
    assert not np.isfinite(stats.grad_norm), f"refused, but the norm is told as {stats.grad_norm}"
    judging.within("loss sum", np.array(stats.loss_sum), np.array(loss), bound)
    after = ready.trainer.export_optimizer()
    judging.equal("adapter", ready.trainer.export_adapter().tensors, adapter)
    judging.equal("moments", after.moments, snapshot.moments)
    assert after.step == snapshot.step, "the refused step was counted"


def _judge_next(ready: Opened, window: list[Batch], judging: Judge) -> None:
    """The ordinary step, without a clip: a norm as large as the towering gradient would leave nothing of the others."""
    judge_step(ready, oracle_at_state_of(ready), window, UpdateSettings(RATE, max_grad_norm=None), judging)
