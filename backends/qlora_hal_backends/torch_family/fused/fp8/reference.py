"""Products in 8-bit floats in plain torch, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.base_weights import BaseWeight, exact
from qlora_hal_backends.torch_family.fused.fp8.operations import E4M3, LARGEST, LowRank, ScaledRows
from qlora_hal_backends.torch_family.layer_slots import at_hand


class ReferenceFp8:
    """See `operations.Fp8Operations`."""

    def row_scales(self, base: BaseWeight, out: Tensor) -> None:
        out.copy_(_scales(exact(at_hand(base))))

    def decode(self, base: BaseWeight, scales: Tensor, out: Tensor) -> None:
        out.copy_(_rounded(exact(at_hand(base)) / scales[:, None]))

    def quantize_rows(self, x: Tensor, column_scales: Tensor | None) -> ScaledRows:
        rows = x.float() if column_scales is None else x.float() * column_scales
        scales = _scales(rows)
        return ScaledRows(_rounded(rows / scales[:, None]), scales)

    def product(
        self,
        left: ScaledRows,
        right: Tensor,
        column_scales: Tensor | None,
        low_rank: LowRank | None,
        bias: Tensor | None,
        out: Tensor,
    ) -> None:
        exact = (left.values.float() @ right.float().t()) * left.scales[:, None]
        if column_scales is not None:
            exact *= column_scales
        if low_rank is not None:
            exact += low_rank.left.float() @ low_rank.right.float().t()
        if bias is not None:
            exact += bias.float()
        out.copy_(exact)


def _scales(rows: Tensor) -> Tensor:
    largest = rows.abs().amax(dim=1)
    # Of tensors: by a number CUDA's torch does not divide, but multiplies with its rounded inverse.
    return torch.where(largest > 0.0, largest / torch.full_like(largest, LARGEST), torch.ones_like(largest))


def _rounded(scaled: Tensor) -> Tensor:
    """To the nearest, ties to even. A quotient may be a digit above the largest value, which torch makes NaN of where
    it lies nearer to the next one."""
    return scaled.clamp(-LARGEST, LARGEST).to(E4M3)
