"""AdamW (Loshchilov & Hutter 2019) on the device: float32, bias correction, epsilon outside the root, as torch has it.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

An expert whose A and B have no gradient at all got no token: its p, m and v stay as they are, to the last bit.
mlx.optimizers.AdamW leaves the correction out by default and knows no refusal, so this is written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from qlora_hal.adapter.naming import lora_a_key, lora_b_key, module_of
from qlora_hal.contract.toolkit import MOMENTS, check_moments
from qlora_hal.contract.values import OptimizerSnapshot, StepSettings

Arrays = list[mx.array]
STACK_AXES = 3
"""Of an adapter tensor of a stack of experts, `[experts, ...]`."""


class AdamW:
    """Parameters and moments of one adapter, in the order of `names`. A refused step is decided on the device."""

    def __init__(
        self, tensors: Mapping[str, mx.array], compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        self.names = tuple(sorted(tensors))
        self.parameters: Arrays = [tensors[name] for name in self.names]
        self._moments = [[mx.zeros_like(p) for p in self.parameters] for _ in MOMENTS]
        self._step = mx.array(0.0)
        self._apply = compiled(partial(_updated, _pairs(self.names, tensors)))

    @property
    def tensors(self) -> dict[str, mx.array]:
        return dict(zip(self.names, self.parameters, strict=True))

    def update(self, gradients: Arrays, loss_sum: mx.array, settings: StepSettings) -> mx.array:
        """Queue one update; returns the figures `[loss sum, weighted, norm of the gradient, 1 where applied]`."""
        first, second = self._moments
        numbers = mx.array(_numbers(settings), dtype=mx.float32)
        self.parameters, first, second, self._step, figures = self._apply(
            self.parameters, first, second, self._step, gradients, loss_sum, numbers
        )
        self._moments = [first, second]
        queue(*self.parameters, *first, *second, self._step, figures)
        queued: mx.array = figures
        return queued

    def snapshot(self) -> OptimizerSnapshot:
        moments: dict[str, npt.NDArray[np.float32]] = {}
        for kind, arrays in zip(MOMENTS, self._moments, strict=True):
            moments.update({f"{name}.{kind}": to_host(a) for name, a in zip(self.names, arrays, strict=True)})
        return OptimizerSnapshot(int(float(self._step)), moments)

    def restore(self, snapshot: OptimizerSnapshot) -> None:
        """Raises AdapterError QH-C09 with every moment that is missing or misshapen; then nothing is changed."""
        check_moments(snapshot, {name: p.shape for name, p in zip(self.names, self.parameters, strict=True)})
        self._moments = [[to_device(snapshot.moments[f"{name}.{kind}"]) for name in self.names] for kind in MOMENTS]
        self._step = mx.array(float(snapshot.step))


def queue(*arrays: mx.array) -> None:
    """Hand arrays to the device, and do not wait."""
    mx.async_eval(*arrays)  # type: ignore[no-untyped-call]


def to_device(array: npt.NDArray[np.float32]) -> mx.array:
    """A copy."""
    return mx.array(np.ascontiguousarray(array, dtype=np.float32))


def to_host(array: mx.array) -> npt.NDArray[np.float32]:
    """A copy that the caller may keep and change."""
    return np.array(array, dtype=np.float32, copy=True, order="C")


def _numbers(settings: StepSettings) -> list[float]:
    """In float64 until here: 1 - 0.999 keeps only half its digits in float32."""
    return [
        settings.learning_rate,
        settings.learning_rate * settings.weight_decay,
        settings.max_grad_norm or math.inf,
        settings.epsilon,
        settings.beta1,
        1.0 - settings.beta1,
        _logarithm(settings.beta1),
        settings.beta2,
        1.0 - settings.beta2,
        _logarithm(settings.beta2),
    ]


def _logarithm(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -math.inf


def _pairs(names: Sequence[str], tensors: Mapping[str, mx.array]) -> tuple[int | None, ...]:
    """For each tensor of a stack of experts the place of the other one of its module, A's of B and B's of A."""
    places = {name: place for place, name in enumerate(names)}
    found: list[int | None] = []
    for name in names:
        module, half = module_of(name)
        other = lora_b_key(module) if half == "A" else lora_a_key(module)
        found.append(places[other] if tensors[name].ndim == STACK_AXES else None)
    return tuple(found)


def _updated(
    pairs: tuple[int | None, ...],
    parameters: Arrays,
    first: Arrays,
    second: Arrays,
    step: mx.array,
    gradients: Arrays,
    loss_sum: mx.array,
    numbers: mx.array,
) -> tuple[Arrays, Arrays, Arrays, mx.array, mx.array]:
    rate, decay, max_norm, epsilon, beta1, rest1, log1, beta2, rest2, log2 = (numbers[n] for n in range(10))
    norm = global_norm(gradients)
    applied = mx.isfinite(norm) & mx.isfinite(loss_sum).all()
    factor = mx.minimum(max_norm / (norm + 1e-6), 1.0)  # torch's clip_grad_norm_
    now = step + 1.0
    # expm1 keeps the digits that 1 - b^t loses in float32 for small t.
    correction1, correction2 = -mx.expm1(now * log1), -mx.expm1(now * log2)
    after: tuple[Arrays, Arrays, Arrays] = ([], [], [])
    for place, (p, m, v, g) in enumerate(zip(parameters, first, second, gradients, strict=True)):
        other = pairs[place]
        moves = applied if other is None else applied & (_has_any(g) | _has_any(gradients[other]))
        g = g * factor
        new_m = beta1 * m + rest1 * g
        new_v = beta2 * v + rest2 * (g * g)
        update = rate * (new_m / correction1) / (mx.sqrt(new_v / correction2) + epsilon)
        for kept, new, old in zip(after, (p - decay * p - update, new_m, new_v), (p, m, v), strict=True):
            kept.append(mx.where(moves, new, old))
    figures = mx.concatenate([loss_sum, mx.stack([norm, applied.astype(mx.float32)])])
    return *after, mx.where(applied, now, step), figures


def _has_any(gradient: mx.array) -> mx.array:
    """Whether an expert has a gradient, `[experts, 1, 1]`."""
    found: mx.array = (gradient != 0).any(axis=(-2, -1), keepdims=True)
    return found


def global_norm(arrays: Sequence[mx.array]) -> mx.array:
    return mx.sqrt(sum((mx.square(a).sum() for a in arrays), start=mx.array(0.0)))
