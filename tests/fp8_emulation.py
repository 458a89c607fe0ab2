"""Products with the base in 8-bit floats as their definition has them, in float32 and NumPy's arithmetic, in place of
the plain layers' own. Tests only; nothing of the code under test is used for what is rounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qlora_hal_backends.torch_family.base_weights import BaseWeight
from qlora_hal_backends.torch_family.lora_linear import FrozenLinear, kept_inputs

LARGEST = 448.0


def _positive_values() -> npt.NDArray[np.float64]:
    """0 to 448: bytes of 4 bits of exponent (bias 7) and 3 of mantissa; 1111.111 is no number."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0), mantissa / 8 * 2.0**-6)


VALUES = _positive_values()


def rounded(x: Tensor) -> Tensor:
    """To the nearest value of E4M3, of two equally near ones to that with an even mantissa."""
    given = x.detach().cpu().double().numpy()
    magnitude = np.minimum(np.abs(given), LARGEST)
    above = np.clip(np.searchsorted(VALUES, magnitude), 1, len(VALUES) - 1)
    low, high = VALUES[above - 1], VALUES[above]
    takes_high = (magnitude - low > high - magnitude) | ((magnitude - low == high - magnitude) & (above % 2 == 0))
    return torch.from_numpy(np.copysign(np.where(takes_high, high, low), given)).float().to(x.device)


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(values, scales `[rows, 1]`)."""
    largest = rows.abs().amax(dim=1, keepdim=True)
    scales = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    return rounded(rows / scales), scales


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *bases: BaseWeight) -> Tensor:
        e, s = quantized(torch.cat([base.dense().float() for base in bases]))
        values, a = quantized(x.float())
        ctx.save_for_backward(e, s)
        ctx.bases = len(bases)
        return a * s.t() * (values @ e.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        e, s = ctx.saved_tensors
        values, c = quantized(dy * s.t())
        return c * (values @ e), *[None for _ in range(ctx.bases)]


@dataclass(slots=True)
class _Group:
    """Projections that read the same input: their gradients are one row, with one scale."""

    linears: list[FrozenLinear]
    x: Tensor | None = None
    products: dict[FrozenLinear, Tensor] = field(default_factory=dict)

    def product(self, linear: FrozenLinear, x: Tensor) -> Tensor:
        if self.x is not x:
            bases = [one.base for one in self.linears]
            y: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), *bases)  # type: ignore[no-untyped-call]
            widths = [one.out_features for one in self.linears]
            self.x, self.products = x, dict(zip(self.linears, y.split(widths, dim=1), strict=True))
        return self.products[linear]


def _groups(linears: Mapping[str, FrozenLinear]) -> Mapping[FrozenLinear, _Group]:
    together: dict[str, list[FrozenLinear]] = {}
    for path, linear in linears.items():
        parent, _, name = path.rpartition(".")
        group = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
        together.setdefault(f"{parent}.{group.get(name, name)}", []).append(linear)
    return {linear: group for group in map(_Group, together.values()) for linear in group.linears}


@contextmanager
def plain_layers_in_fp8(linears: Mapping[str, FrozenLinear]) -> Iterator[None]:
    """In float32: what is beside these products is not rounded then."""
    groups = _groups(linears)

    def forward(self: FrozenLinear, x: Tensor) -> Tensor:
        y, lora = groups[self].product(self, x), self.lora
        if lora is not None:
            seen, words = x.reshape(-1, x.shape[-1]), lora.switches.token_words
            if words is not None and lora.channel_words is not None:
                seen = seen * kept_inputs(words, lora.channel_words, lora.dropout) / (1.0 - lora.dropout)
            y = y + lora.scale * (seen @ lora.a.t()) @ lora.b.t()
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    own = FrozenLinear.forward
    FrozenLinear.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        FrozenLinear.forward = own  # type: ignore[method-assign]
