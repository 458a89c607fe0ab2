"""Clip and AdamW equal torch's own, step by step, in float64."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from qlora_hal_oracle.adamw import AdamWState, adamw_update, clip_factor, global_norm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch

STEPS = 20
# Each step makes about ten roundings of numbers below 10 with u = 2^-53; over 20 steps, if all add up, 20 * 10 * 10 u.
FLOAT64_AGREEMENT = 2000 * 2.0**-53


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
def test_twenty_steps_with_changing_learning_rates_equal_torch(weight_decay: float, max_norm: float | None) -> None:
    random = np.random.default_rng(1)
    parameters = {"first": random.normal(size=(3, 4)), "second": random.normal(size=(5,))}
    mirrors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in parameters.items()}
    optimizer = torch.optim.AdamW(mirrors.values(), lr=0.0, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    state = AdamWState()
    for step in range(STEPS):
        learning_rate = 0.1 / (1 + step)
        gradients = {name: random.normal(size=value.shape) for name, value in parameters.items()}
        norm = global_norm(gradients)
        clipped = {name: gradient * clip_factor(norm, max_norm) for name, gradient in gradients.items()}
        adamw_update(
            parameters,
            clipped,
            state,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            betas=(0.8, 0.95),
            eps=1e-6,
        )
        for name, mirror in mirrors.items():
            mirror.grad = torch.tensor(gradients[name])
        torch_norm = torch.nn.utils.clip_grad_norm_(mirrors.values(), math.inf if max_norm is None else max_norm)
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
        assert norm == pytest.approx(float(torch_norm), rel=FLOAT64_AGREEMENT)
        for name, mirror in mirrors.items():
            assert np.abs(parameters[name] - mirror.detach().numpy()).max() < FLOAT64_AGREEMENT
    for name, mirror in mirrors.items():
        assert np.abs(state.exp_avg[name] - optimizer.state[mirror]["exp_avg"].numpy()).max() < FLOAT64_AGREEMENT
        assert np.abs(state.exp_avg_sq[name] - optimizer.state[mirror]["exp_avg_sq"].numpy()).max() < FLOAT64_AGREEMENT


def test_clip_uses_one_norm_over_all_tensors() -> None:
    gradients = {"a": np.array([3.0]), "b": np.array([4.0])}
    assert global_norm(gradients) == 5.0
    assert clip_factor(5.0, 1.0) == 1.0 / (5.0 + 1e-6)
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(5.0, None) == 1.0
