"""An epsilon above the rounding error of a gradient."""

from __future__ import annotations

import numpy as np

from qlora_hal.run.gradient_noise import ROUNDINGS, epsilon_above

RANDOM = np.random.default_rng(3)
GRADIENT = {"lora_A": np.zeros((4, 64)), "lora_B": RANDOM.normal(size=(64, 4))}
NOISE = 2.0**-8 * 2.0
"""What a bfloat16 gradient of this size is off by, and then some."""


def first_step(gradient: np.ndarray, epsilon: float) -> np.ndarray:
    """AdamW's, at a rate of 1: both moments are corrected to the gradient itself."""
    return gradient / (np.abs(gradient) + epsilon)


def test_it_is_a_power_of_two_in_proportion_to_gradient_and_roundoff() -> None:
    found = epsilon_above(GRADIENT, "bfloat16", max_grad_norm=None)
    assert np.log2(found) == round(np.log2(found))
    assert 2**-0.5 <= found / (ROUNDINGS * 2.0**-8 * np.sqrt(np.mean(GRADIENT["lora_B"] ** 2))) <= 2**0.5
    assert epsilon_above(GRADIENT, "float32", max_grad_norm=None) == found * 2.0**-16
    halved = {name: tensor / 8 for name, tensor in GRADIENT.items()}
    assert epsilon_above(halved, "bfloat16", max_grad_norm=None) == found / 8


def test_it_is_of_the_gradient_after_the_clip() -> None:
    norm = float(np.linalg.norm(GRADIENT["lora_B"]))
    found = epsilon_above(GRADIENT, "bfloat16", max_grad_norm=norm / 16)
    assert found == epsilon_above(GRADIENT, "bfloat16", max_grad_norm=None) / 16


def test_no_gradient_and_one_that_is_not_finite_need_none() -> None:
    assert epsilon_above({"lora_B": np.zeros(3)}, "bfloat16", max_grad_norm=1.0) == 0.0
    assert epsilon_above({"lora_B": np.array([1.0, np.nan])}, "bfloat16", max_grad_norm=1.0) == 0.0


def test_gradients_that_differ_by_rounding_give_one_number_and_steps_that_agree() -> None:
    """The usual epsilon turns each entry below the noise by twice the rate; this one leaves it where it is."""
    exact = RANDOM.normal(size=20_000)
    rounded = exact + NOISE * RANDOM.normal(size=exact.size)
    above, there = (epsilon_above({"lora_B": g}, "bfloat16", max_grad_norm=None) for g in (exact, rounded))
    assert above == there
    apart, close = (np.linalg.norm(first_step(exact, e) - first_step(rounded, e)) for e in (1e-8, above))
    assert close < apart / 3
