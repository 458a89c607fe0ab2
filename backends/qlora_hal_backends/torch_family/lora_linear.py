"""A frozen linear layer with a LoRA adapter, forward and backward written by hand.

    y  = x W^T + scale * drop(x) A^T B^T                        (Hu et al. 2021, equation 3)
    dx = dy W  + drop'(v A)          with v = scale * dy B
    dA = v^T drop(x)                 dB = scale * dy^T (drop(x) A^T)

Both products are one matrix product over a longer inner dimension, `[x | t] [W | B]^T` with `t = scale * drop(x) A^T`,
so that the sum is made in the float32 accumulator and rounded once. Added onto an output that is already bfloat16, a
young update is under half a unit in the last place and vanishes. `addmm` is no way out: cuBLAS rounds the product
before it adds `beta * C` (measured: 27 to 48 % of a young update survives it).

The dequantized weight lives for the length of one product; backward makes it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlora_hal.contract import dropout
from qlora_hal.contract.values import LinearShape
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal_backends.torch_family.base_weights import BaseWeight


@dataclass(slots=True)
class LoRASwitches:
    """What all adapted layers of one model share. `token_words` None means no dropout (evaluation)."""

    enabled: bool = True
    token_words: Tensor | None = None  # int32 [batch * time], `qlora_hal.contract.dropout.token_words`


@dataclass(slots=True)
class LoRAWeights:
    """One layer's adapter: float32 master parameters and their copies in the compute dtype, refreshed each step. Of a
    stack of experts the copies are `[experts, r, in]` and `[experts, out, r]`, the parameters `[experts, numbers]`,
    padded to whole blocks of an optimizer's state."""

    a: nn.Parameter  # [r, in]
    b: nn.Parameter  # [out, r]
    a_compute: Tensor
    b_compute: Tensor
    scale: float
    dropout: float
    channel_words: Tensor | None  # int32 [in]; None without dropout
    switches: LoRASwitches


class FrozenLinear(nn.Module):
    """`x W^T + bias` with a packed, frozen W, plus the adapter once one is attached."""

    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: Tensor | None = None, *, has_bias: bool = False
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.has_bias = has_bias or bias is not None
        self.base: BaseWeight | None = None
        self.lora: LoRAWeights | None = None
        self.register_buffer("bias", bias)

    @property
    def shape(self) -> LinearShape:
        return LinearShape(self.in_features, self.out_features)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for modules that read it themselves (a state-space scan). No adapter is in it, as in
        PEFT's layers."""
        assert self.base is not None, "the weights are not loaded"
        return self.base.dense()

    def forward(self, x: Tensor) -> Tensor:
        lora = self.lora
        if lora is None or not lora.switches.enabled:
            y: Tensor = _FrozenProduct.apply(x, self.base)  # type: ignore[no-untyped-call]
        else:
            words = lora.switches.token_words
            y = _AdaptedProduct.apply(x, lora.a, lora.b, self.base, lora, words)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: BaseWeight) -> Tensor:
        ctx.base = base
        return x @ base.dense().t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.base.dense(), None


class _AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: BaseWeight, lora: LoRAWeights, token_words: Tensor | None
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        keep = _dropout_mask(rows, lora, token_words)
        dropped = rows if keep is None else rows * keep
        scale = lora.scale if keep is None else lora.scale / (1.0 - lora.dropout)
        low_rank = dropped @ lora.a_compute.t()  # [rows, r]
        y = sum_of_products(rows, base.dense().t(), low_rank * scale, lora.b_compute.t())
        ctx.save_for_backward(rows, low_rank)
        ctx.base, ctx.lora, ctx.token_words, ctx.shape = base, lora, token_words, x.shape
        # Not `view`: some architectures change a projection in place (OLMo clips it), which autograd forbids to views
        # that a function returns.
        product: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
        return product

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:
        rows, low_rank = ctx.saved_tensors
        lora: LoRAWeights = ctx.lora
        dy_rows = dy.reshape(-1, dy.shape[-1])
        keep = _dropout_mask(rows, lora, ctx.token_words)
        scale = lora.scale if keep is None else lora.scale / (1.0 - lora.dropout)
        v = (dy_rows @ lora.b_compute) * scale
        grad_a = product_in_float32(v.t(), rows if keep is None else rows * keep)
        grad_b = product_in_float32(dy_rows.t(), low_rank).mul_(scale)
        if not ctx.needs_input_grad[0]:
            return None, grad_a, grad_b, None, None, None
        if keep is None:
            dx = sum_of_products(dy_rows, ctx.base.dense(), v, lora.a_compute)
        else:
            both = product_in_float32(dy_rows, ctx.base.dense())
            dx = both.addcmul_(product_in_float32(v, lora.a_compute), keep).to(dy.dtype)
        return dx.view(ctx.shape), grad_a, grad_b, None, None, None


def sum_of_products(rows: Tensor, weight: Tensor, low_rank: Tensor, adapter: Tensor) -> Tensor:
    """`rows @ weight + low_rank @ adapter`, rounded once. In float32 two roundings are far below what matters."""
    if rows.dtype == torch.float32:
        return (low_rank @ adapter).addmm_(rows, weight)
    # Joined as they lie in memory: a transposed weight is joined transposed.
    joined = torch.cat((weight.t(), adapter.t()), dim=1).t() if weight.stride(0) == 1 else torch.cat((weight, adapter))
    return torch.cat((rows, low_rank), dim=1) @ joined


def _dropout_mask(rows: Tensor, lora: LoRAWeights, token_words: Tensor | None) -> Tensor | None:
    """1 where an input is kept and 0 elsewhere, a pure function of its words: recomputation and resume draw it again.
    The factor 1/(1-p) goes into the scale, where it is not rounded to the compute dtype of a mask. Raises
    UnsupportedFeatureError QH-B01 in a layer that does not see every place of the batch once."""
    if token_words is None or lora.channel_words is None:
        return None
    if rows.shape[0] != token_words.shape[0]:
        raise UnsupportedFeatureError(
            "QH-B01",
            f"LoRA dropout is not possible in this architecture: a layer sees {rows.shape[0]} places of a batch of "
            f"{token_words.shape[0]}.",
            where="lora.dropout",
            fix="Set lora.dropout: 0.",
        )
    return _mask_on(token_words.device)(token_words, lora.channel_words, lora.dropout, rows.dtype)


def plain_mask(token_words: Tensor, channel_words: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    """1 where an input is kept, else 0: `[tokens, channels]`."""
    return kept_inputs(token_words, channel_words, rate).to(dtype)


@cache
def _mask_on(device: torch.device) -> Callable[[Tensor, Tensor, float, torch.dtype], Tensor]:
    """In one kernel on an NVIDIA GPU where Triton compiles it and it gives the same bits (`benchmarks/dropout_masks.py`
    says what that saves); in torch's operations elsewhere."""
    if device.type != "cuda" or torch.version.hip or find_spec("triton") is None:
        return plain_mask
    tokens, channels = (words_on(dropout.channel_words(name, 64), device) for name in ("tokens", "channels"))
    try:
        from qlora_hal_backends.torch_family import dropout_kernel

        found = dropout_kernel.mask(tokens, channels, 0.3, torch.float32)
    except Exception:  # a compiler that is missing, a GPU that is too old: whatever Triton raises
        return plain_mask
    return dropout_kernel.mask if torch.equal(found, plain_mask(tokens, channels, 0.3, torch.float32)) else plain_mask


def kept_inputs(token_words: Tensor, channel_words: Tensor, rate: float) -> Tensor:
    """`qlora_hal.contract.dropout.kept` for words `[tokens]` and `[channels]`: bool `[tokens, channels]`. Signed
    integers wrap around as unsigned ones do; their right shift repeats the sign, which is cut off."""
    words = token_words[:, None] + channel_words[None, :]
    for shift, factor in zip(dropout.SHIFTS, (dropout.FIRST_FACTOR, dropout.SECOND_FACTOR, None), strict=True):
        words ^= words.bitwise_right_shift(shift).bitwise_and_(2 ** (32 - shift) - 1)
        if factor is not None:
            words *= factor - 2**32
    return words.bitwise_right_shift_(1).bitwise_and_(2**31 - 1) >= dropout.drop_below(rate)


def words_on(words: dropout.UInt32, device: torch.device) -> Tensor:
    """A table of `qlora_hal.contract.dropout` as int32 of the same bits."""
    return torch.from_numpy(words.view(np.int32)).to(device)


def product_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` as float32: gradients of the master weights keep the accumulator's digits."""
    if left.dtype == torch.float32:
        return left @ right
    if left.device.type == "cuda":
        product: Tensor = torch.mm(left, right, out_dtype=torch.float32)
        return product
    return left.float() @ right.float()
