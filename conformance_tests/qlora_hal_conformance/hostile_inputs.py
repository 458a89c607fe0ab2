"""Inputs whose numbers leave a float's range in one place, which is known from the oracle beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from qlora_hal.adapter.naming import lora_a_key, lora_b_key
from qlora_hal.contract.values import Adapter, Batch, Float32
from qlora_hal_conformance.random_inputs import total_tokens
from qlora_hal_oracle import LlamaShape, OracleTrainer
from qlora_hal_oracle.random_models import HEAD

BEYOND_FLOAT32 = 1e41
"""No float32 is as large, with three digits to spare for the smallest gradient that must not be finite either."""
HALF_OF_FLOAT32 = 2e38
"""A finite float32, whose double and whose threefold are not."""
HUGE = {"float16": 2.0**10, "bfloat16": 2.0**50, "float32": 2.0**50}
"""What makes one gradient tower over all others while every activation and its square stay within the dtype."""
SMALL = {"float16": 1.0, "bfloat16": 1e-6, "float32": 1e-6}
"""A scale of the adapter that makes gradients small. float16 has no numbers for them."""


@dataclass(frozen=True, slots=True)
class Overflow:
    """How a finite loss gets a gradient that is not: by the denominator of the step, on this adapter and window.

    `tensors` are those whose gradient is beyond float32; that of every other is far within it.
    """

    window: list[Batch]
    denominator: float
    tensors: frozenset[str]


def towering(adapter: Adapter, module: str, dtype: str) -> Adapter:
    """The adapter with a huge A and a B of zero in one module: the model computes as if the module had none, and the
    gradient of its B is huge, alone of all."""
    a, b = lora_a_key(module), lora_b_key(module)
    a_tensor, b_tensor = adapter.tensors[a] * np.float32(HUGE[dtype]), np.zeros_like(adapter.tensors[b])
    return Adapter({**adapter.tensors, a: a_tensor, b: b_tensor}, adapter.config)


def overflow_everywhere(reference: OracleTrainer, window: list[Batch]) -> Overflow:
    """Every tensor has a gradient beyond float32."""
    sizes = _sizes(reference, window)
    return Overflow(window, _denominator(window, min(sizes.values()), BEYOND_FLOAT32), frozenset(sizes))


def overflow_of_one(reference: OracleTrainer, window: list[Batch], tensor: str) -> Overflow:
    """One tensor, that of a towering module, has a gradient beyond float32."""
    sizes = _sizes(reference, window)
    assert all(size < sizes[tensor] / np.sqrt(HUGE["float16"]) for name, size in sizes.items() if name != tensor)
    return Overflow(window, _denominator(window, sizes[tensor], BEYOND_FLOAT32), frozenset({tensor}))


def overflow_of_the_sum(reference: OracleTrainer, batch: Batch, tensor: str) -> Overflow:
    """Three equal micro-batches: the gradient of each is finite, that of two together is not."""
    window = [batch, batch, batch]
    of_each = _sizes(reference, [batch])[tensor] * batch.counted_tokens
    return Overflow(window, of_each / HALF_OF_FLOAT32, frozenset({tensor}))


def quiet(adapter: Adapter, dtype: str) -> Adapter:
    """The adapter with a small scale: gradients of a millionth of the usual size."""
    return Adapter(adapter.tensors, replace(adapter.config, alpha=adapter.config.alpha * SMALL[dtype]))


def loud_head(
    shape: LlamaShape, tensors: Mapping[str, Float32], random: np.random.Generator, *, spread: float, shift: float
) -> dict[str, Float32]:
    """The model with logits `spread` times as far apart, and all those of a token moved together, by about `shift`
    up or down."""
    direction = random.normal(size=shape.hidden_size)
    direction *= shift / np.linalg.norm(direction)
    return {**tensors, HEAD: (tensors[HEAD] * spread + direction).astype(np.float32)}


def _sizes(reference: OracleTrainer, window: list[Batch]) -> dict[str, float]:
    """The largest entry of each tensor's gradient of the token mean."""
    return {name: float(np.abs(gradient).max()) for name, gradient in reference.gradients(window).items()}


def _denominator(window: list[Batch], size: float, wanted: float) -> float:
    return total_tokens(window) * size / wanted
