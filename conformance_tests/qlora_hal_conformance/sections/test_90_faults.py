"""L4: hostile numbers. Nothing that is not finite reaches a weight, and nothing is reported as if all were well."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_hal.contract.values import Adapter, Batch
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_logits, opened_unless_refused, unless_refused
from qlora_hal_conformance.fixtures import Opened, Opener
from qlora_hal_conformance.hostile_inputs import loud_head
from qlora_hal_conformance.parameters import in_each_dtype
from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch, draw_window
from qlora_hal_conformance.tolerances import UpdateSettings, first_update, loss_bound
from qlora_hal_conformance.updating import judge_step, oracle_at_state_of
from qlora_hal_oracle.random_models import HEAD

RATE = 1e-2
WILD, WILD_IN_FLOAT16 = 30, 5
"""A and B this many times as large make a product w = f^2 / 4 times the base's, and an MLP's output, a product of
three, w^3: eleven million, or 240, which float16 still holds."""
NOT_FINITE = {"nan": np.nan, "infinity": np.inf}
LOUD = {"far_apart": (60, 0), "far_from_zero": (1, 200)}
"""Logits 60 times as far apart, or all those of a token some hundreds above or below 0: exp overflows beyond 88."""


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.down_proj.weight", HEAD, "model.norm.weight"])
@in_each_dtype
def test_base_weight_that_is_not_finite(
    tensor: str, value: float, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """Refused while loading by our error, or every step is reported as not finite and changes nothing."""
    shape, tensors = opened.models.drawn("main")
    broken = {name: array.copy() for name, array in tensors.items()}
    broken[tensor].flat[int(seeded.integers(broken[tensor].size))] = value
    name = f"broken-{tensor}-{value}"
    opened.models.define(name, shape, broken)
    adapter = draw_adapter(seeded, shape)
    ready = opened_unless_refused(opened, name, adapter)
    if ready is not None:
        _judge_refused(ready, [draw_batch(seeded, shape)], judging)


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("half", ["A", "B"])
@in_each_dtype
def test_adapter_that_is_not_finite(
    half: str, value: float, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """The same for an adapter; afterwards a good adapter trains as if nothing had been."""
    shape, _ = opened.models.drawn("main")
    good = draw_adapter(seeded, shape)
    tensors = {name: tensor.copy() for name, tensor in good.tensors.items()}
    names = sorted(name for name in tensors if name.endswith(f"lora_{half}.weight"))
    chosen = tensors[names[int(seeded.integers(len(names)))]]
    chosen.flat[int(seeded.integers(chosen.size))] = value
    ready, window = opened(), draw_window(seeded, shape)
    broken = Adapter(tensors, good.config)
    if unless_refused(lambda: attached(ready, broken)):
        _judge_refused(ready, window, judging)
    ready.attach(good)
    judge_step(ready, oracle_at_state_of(ready), window, UpdateSettings(RATE), judging)


@in_each_dtype
def test_steps_after_many_refused_ones(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Whatever a backend adapts at a refused step (a loss scale, say) finds its way back."""
    shape, _ = opened.models.drawn("main")
    good, window = draw_adapter(seeded, shape), draw_window(seeded, shape)
    ready = opened()
    broken = Adapter({name: np.full_like(tensor, np.nan) for name, tensor in good.tensors.items()}, good.config)
    for _ in range(5 if unless_refused(lambda: attached(ready, broken)) else 0):
        ready.step(window, RATE)
    ready.attach(good)
    for _ in range(2):
        judge_step(ready, oracle_at_state_of(ready), draw_window(seeded, shape), UpdateSettings(RATE), judging)


@in_each_dtype
def test_huge_but_finite_gradients_are_clipped(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """A run that has gone wild is clipped by its norm, not refused; no weight moves further than the rate."""
    shape, _ = opened.models.drawn("main")
    adapter = draw_adapter(seeded, shape)
    times = WILD_IN_FLOAT16 if opened.main_dtype == "float16" else WILD
    wild = {name: tensor * times for name, tensor in adapter.tensors.items()}
    ready = opened(adapter=Adapter(wild, adapter.config))
    stats = ready.step(draw_window(seeded, shape), RATE)
    assert stats.applied, f"a finite step was refused: {stats}"
    assert np.isfinite([stats.loss_sum, stats.grad_norm]).all(), f"{stats}"
    after = ready.trainer.export_adapter().tensors
    moved = {name: np.abs(after[name].astype(np.float64) - wild[name]) for name in wild}
    judging.all_within(
        "way of each weight",
        moved,
        {name: np.zeros_like(way) for name, way in moved.items()},
        {name: first_update(RATE, wild[name]) for name in wild},
    )


@pytest.mark.parametrize(("spread", "shift"), LOUD.values(), ids=LOUD)
def test_logits_beyond_88(spread: int, shift: int, opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """exp(89) is no float32, and exp(-104) is 0: the loss of such logits is finite and right, and its step is taken."""
    shape, tensors = opened.models.drawn("main")
    opened.models.define("loud", shape, loud_head(shape, tensors, seeded, spread=spread, shift=shift))
    ready, window = opened("loud", adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    reference = ready.oracle()
    judge_logits(ready, reference, window[0], judging)
    found, exact = np.array(ready.trainer.evaluate(window).loss_sum), np.array(reference.evaluate(window)[0])
    judging.within("loss sum, evaluated", found, exact, loss_bound(reference, window, ready.dtype))
    stats = ready.step(window, 0.0)
    assert stats.applied, f"a step with a finite loss was refused: {stats}"
    judging.within("loss sum, trained", np.array(stats.loss_sum), exact, loss_bound(reference, window, ready.dtype))
    if not shift:
        # A shift cancels out of the gradient, and leaves the rounding of what cancelled: no bound is made for that.
        judge_step(ready, oracle_at_state_of(ready), window, UpdateSettings(RATE), judging)


def attached(ready: Opened, adapter: Adapter) -> bool:
    """Attach, and say so."""
    ready.attach(adapter)
    return True


def _judge_refused(ready: Opened, window: list[Batch], judging: Judge) -> None:
    adapter, snapshot = ready.trainer.export_adapter().tensors, ready.trainer.export_optimizer()
    stats = ready.step(window, RATE, weight_decay=0.1)
    assert not stats.applied, f"a step with loss {stats.loss_sum} and norm {stats.grad_norm} was applied"
    finite = np.isfinite(stats.loss_sum) and np.isfinite(stats.grad_norm)
    assert not finite, f"refused, but reported as loss {stats.loss_sum}, norm {stats.grad_norm}"
    after, moments = ready.trainer.export_adapter().tensors, ready.trainer.export_optimizer().moments
    same = [np.array_equal(after[name], adapter[name], equal_nan=True) for name in adapter]
    assert all(same), "the refused step changed the adapter"
    judging.equal("moments", moments, snapshot.moments)
