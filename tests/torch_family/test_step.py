"""One optimizer step against torch's own AdamW and clipping; refusal, dropout, snapshots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from trainers import OpenTrainer, largest_difference, random_batch

from qlora_hal.contract.capabilities import OPTIMIZER_FEATURE
from qlora_hal.contract.values import Adapter
from qlora_hal_backends.torch_family import optimizer

# An update is a product of at most a dozen float32 operations on float32 moments: 12 * 2^-24, on values that are at
# most 4 learning rates away from where they began; doubled for the gradient's own rounding, which AdamW's quotient
# passes on relative to itself.
FLOAT32_UPDATE = 64 * 2**-24

Opened = Callable[..., OpenTrainer]


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_four_steps_equal_torch_adamw_with_decay_and_clipping(
    max_grad_norm: float | None, llama: Path, opened: Opened
) -> None:
    ours = opened(llama)
    parameters = {name: torch.nn.Parameter(torch.from_numpy(t.copy())) for name, t in ours.adapter.tensors.items()}
    reference = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    window = [random_batch(1), random_batch(2)]
    for _ in range(4):
        for name, gradient in ours.trainer.gradients(window).items():
            parameters[name].grad = torch.from_numpy(gradient)
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)
        reference.step()
        ours.step(window, weight_decay=0.1, beta1=0.8, beta2=0.95, epsilon=1e-6, max_grad_norm=max_grad_norm)
    found = ours.trainer.export_adapter().tensors
    expected = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
    # Relative to the distance travelled, 4 steps of at most lr each: a wrong update is of that size.
    worst = max(np.abs(found[name] - expected[name]).max() for name in found)
    assert worst <= FLOAT32_UPDATE * 4 * 1e-2 + 2**-24 * max(np.abs(t).max() for t in expected.values()) * 8


@pytest.mark.parametrize("at_a_time", [500, 1777])
def test_an_update_in_parts_has_the_bits_of_one_at_once(
    at_a_time: int, llama: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, in_parts = opened(llama), opened(llama)
    for _ in range(2):
        whole.step([random_batch(1)], weight_decay=0.1)
    monkeypatch.setattr(optimizer, "AT_A_TIME", at_a_time)
    for _ in range(2):
        in_parts.step([random_batch(1)], weight_decay=0.1)
    expected, found = whole.trainer.export_adapter().tensors, in_parts.trainer.export_adapter().tensors
    assert sum(tensor.size for tensor in found.values()) > 2 * at_a_time, "one part is no parts"
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    moments = whole.trainer.export_optimizer().moments
    assert all(np.array_equal(m, moments[n]) for n, m in in_parts.trainer.export_optimizer().moments.items())


def test_not_finite_step_changes_nothing_and_says_so(llama: Path, opened: Opened) -> None:
    ours = opened(llama)
    ours.step([random_batch(1)])
    poisoned = {n: np.full_like(t, 1e30) if "lora_B" in n else t for n, t in ours.adapter.tensors.items()}
    ours.trainer.attach(Adapter(poisoned, ours.adapter.config))
    stats = ours.step([random_batch(1)])
    assert not stats.applied
    after = ours.trainer.export_adapter().tensors
    assert all(np.array_equal(after[name], poisoned[name]) for name in poisoned)
    snapshot = ours.trainer.export_optimizer()
    assert snapshot.step == 0
    assert not any(moment.any() for moment in snapshot.moments.values())


@pytest.mark.slow
def test_dropout_follows_its_key_and_is_off_in_evaluation(llama: Path, opened: Opened) -> None:
    window = [random_batch(1)]
    same, again, other = (opened(llama, dropout=0.4) for _ in range(3))
    plain = opened(llama)
    losses = [same.step(window, dropout_key=7), again.step(window, dropout_key=7), other.step(window, dropout_key=8)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert losses[0].loss_sum != plain.step(window).loss_sum
    fresh_dropout, fresh_plain = opened(llama, dropout=0.4), opened(llama)
    assert fresh_dropout.trainer.evaluate(window) == fresh_plain.trainer.evaluate(window)


@pytest.mark.parametrize("optimizer", OPTIMIZER_FEATURE)
def test_every_optimizer_learns(optimizer: str, llama: Path, opened: Opened) -> None:
    ours = opened(llama, optimizer=optimizer, weight_format="nf4", r=8)
    losses = [ours.step([random_batch(1)]).loss for _ in range(8)]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("optimizer", OPTIMIZER_FEATURE)
def test_snapshot_continues_bit_equal(optimizer: str, llama: Path, opened: Opened) -> None:
    window = [random_batch(1), random_batch(2)]
    through, stopped, resumed = (opened(llama, optimizer=optimizer, r=8) for _ in range(3))
    for _ in range(3):
        through.step(window)
        stopped.step(window)
    snapshot = stopped.trainer.export_optimizer()
    assert snapshot.step == 3
    resumed.trainer.attach(stopped.trainer.export_adapter(), optimizer)
    resumed.trainer.import_optimizer(snapshot)
    for _ in range(3):
        through.step(window, weight_decay=0.1)
        resumed.step(window, weight_decay=0.1)
    left, right = (o.trainer.export_adapter().tensors for o in (through, resumed))
    assert all(np.array_equal(left[name], right[name]) for name in left)


def test_moments_cross_between_optimizers(llama: Path, opened: Opened) -> None:
    """8-bit moments come over as float32 and say that they are inexact."""
    window = [random_batch(1)]
    eight_bit, exact = opened(llama, optimizer="adamw_8bit", r=16), opened(llama, r=16)
    for _ in range(3):
        eight_bit.step(window)
    snapshot = eight_bit.trainer.export_optimizer()
    assert not snapshot.exact
    exact.trainer.attach(eight_bit.trainer.export_adapter())
    exact.trainer.import_optimizer(snapshot)
    assert largest_difference(dict(exact.trainer.export_optimizer().moments), dict(snapshot.moments)) == 0.0
    exact.step(window)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_young_update_is_not_rounded_away(dtype: str, llama: Path, opened: Opened) -> None:
    """At learning rate 2e-5 B is about 2e-5 after a step; added onto rounded bfloat16 outputs it would vanish.

    The forward pass must show the loss falling as float32 shows it. The bound is half of float32's own fall: added
    onto rounded outputs 2 to 18 % of the product survive the first step.
    """
    window = [random_batch(seed, rows=4, time=48) for seed in range(3)]
    fall = {}
    for name in ("float32", dtype):
        ours = opened(llama, dtype=name, weight_format="nf4")
        start = ours.adapter
        zero = {n: np.zeros_like(t) if "lora_B" in n else t for n, t in start.tensors.items()}
        ours.trainer.attach(Adapter(zero, start.config))
        first = ours.trainer.evaluate(window).loss
        for _ in range(4):
            ours.step(window, learning_rate=1e-4)
        fall[name] = first - ours.trainer.evaluate(window).loss
    assert fall["float32"] > 0
    assert fall[dtype] > 0.5 * fall["float32"]
