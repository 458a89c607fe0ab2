"""What products in 8-bit floats need, as one interface with two implementations (see `fused.operations`).

E4M3 as Micikevicius et al. 2022 have it ("FP8 formats for deep learning"): sign, 4 bits of exponent, 3 of mantissa, no
infinity; largest 448, unit roundoff 2^-4, subnormal below 2^-6 down to 2^-9. Each row of a matrix has a float32 scale,
its largest magnitude / 448, or 1 where it holds zeros alone:

    base        W  [N, K]    E = e4m3(W / s)     s [N]
    forward     x  [M, K]    X = e4m3(x / a)     a [M]    y  = a s sum_k X E + t B^T + bias
    backward    dy [M, N]    H = e4m3(dy s / c)  c [M]    dx = c sum_n H E + v A

Both products are with diag(s) E: the gradient is that of the forward product but for the rounding of its operand. The
adapter's terms (`fused.layer_weights`) are of operands in the compute dtype, and join the sum in float32 before it is
rounded, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.base_weights import BaseWeight

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


@dataclass(frozen=True, slots=True)
class ScaledRows:
    """`scales[:, None] * values`: e4m3 `[rows, n]` and float32 `[rows]`."""

    values: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True)
class LowRank:
    """`left @ right.T`, added to a product: `[M, R]` and `[n, R]` in the compute dtype, strided anyhow."""

    left: Tensor
    right: Tensor


class Fp8Operations(Protocol):
    """Products of one model's base in 8-bit floats, and what makes their operands."""

    def row_scales(self, base: BaseWeight, out: Tensor) -> None:
        """s of a packed weight `[N, K]`, from its values in float32, into float32 `[N]`."""
        ...

    def decode(self, base: BaseWeight, scales: Tensor, out: Tensor) -> None:
        """E into e4m3 `[N, K]`, contiguous in either dimension: `out` may be the transpose of a `[K, N]`."""
        ...

    def quantize_rows(self, x: Tensor, column_scales: Tensor | None) -> ScaledRows:
        """The rows of a strided `[M, n]`, its columns first multiplied with `column_scales` where given."""
        ...

    def product(
        self,
        left: ScaledRows,
        right: Tensor,
        column_scales: Tensor | None,
        low_rank: LowRank | None,
        bias: Tensor | None,
        out: Tensor,
    ) -> None:
        """left.values @ right.T with the scales of both, plus low rank and bias, into a strided `out` `[M, n]`; `right`
        is e4m3 `[n, k]`, contiguous. Sums are float32, rounded once to the dtype of `out`, which may be float32."""
        ...
