"""An epsilon of AdamW above the rounding error of the gradient.

A fresh adapter has B = 0 and no moments, so AdamW's first step is rate * g / (|g| + epsilon): with the usual epsilon a
sign. Where |g| is below its rounding error, the sign depends on the order in which a device adds, and backends part by
the whole learning rate there. With epsilon above that error such entries move by little, and the others as before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from qlora_hal.contract.values import ComputeDtype, Float32, Float64
from qlora_hal_oracle.adamw import clip_factor, global_norm
from qlora_hal_oracle.roundoff import UNIT_ROUNDOFF

ROUNDINGS = 16
"""Epsilon in units of (unit roundoff * root mean square of the gradient)."""


def epsilon_above(
    gradients: Mapping[str, Float32 | Float64], dtype: ComputeDtype, *, max_grad_norm: float | None
) -> float:
    """A power of two above the rounding error of `gradients` as AdamW sees them, that is clipped; 0 where all are 0.

    A power of two, so that backends whose gradients differ by rounding come to the same number. Tensors without any
    gradient, as every A at B = 0, do not count.
    """
    moved = {name: np.asarray(tensor, np.float64) for name, tensor in gradients.items() if np.any(tensor)}
    norm = global_norm(moved)
    if not (math.isfinite(norm) and norm > 0.0):
        return 0.0
    size = norm * clip_factor(norm, max_grad_norm) / math.sqrt(sum(tensor.size for tensor in moved.values()))
    return float(2.0 ** round(math.log2(ROUNDINGS * UNIT_ROUNDOFF[dtype] * size)))
