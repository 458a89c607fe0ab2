"""One product for each expert that has rows: `y_e = x_e W_e^T + scale x_e A_e^T B_e^T`, forward and backward.

Rows are sorted by expert. As in `lora_linear`, base and adapter are summed in one product over a longer inner dimension
and rounded once. Two ways compute the same: a loop over the experts that have rows, which decodes no other, and torch's
grouped product, which needs no number on the host. The latter gives gradients of A and B that were rounded to bfloat16
once, where the loop keeps float32: torch's fast kernel has no other output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.experts.stacked_weights import StackedWeight, decode_to
from qlora_hal_backends.torch_family.lora_linear import LoRAWeights, product_in_float32, sum_of_products
from qlora_hal_backends.torch_family.platform import DECODED_AT_ONCE

_ALIGNMENT = 8
"""Sides of a grouped product: 16 bytes in bfloat16, what its kernel wants of each row."""


@dataclass(slots=True)
class Groups:
    """Rows `ends[e - 1]` to `ends[e]` are expert e's; int32 `[experts]`, on the device of the rows."""

    ends: Tensor
    _on_host: list[int] | None = None

    @property
    def on_host(self) -> list[int]:
        """`ends`. The first time it waits for the device."""
        if self._on_host is None:
            self._on_host = self.ends.tolist()
        return self._on_host

    def parts(self) -> Iterator[tuple[int, slice]]:
        """The experts that have rows, with their rows. Waits for the device."""
        start = 0
        for expert, end in enumerate(self.on_host):
            if end > start:
                yield expert, slice(start, end)
            start = end

    def blocks(self, at_once: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """So many experts at a time that have rows: which experts, their rows, and where each expert's end among these.
        Waits for the device where not all are one block."""
        experts = len(self.ends)
        if at_once >= experts:
            yield slice(0, experts), slice(None), self.ends
            return
        for first in range(0, experts, at_once):
            last = min(first + at_once, experts)
            start, end = self.on_host[first - 1] if first else 0, self.on_host[last - 1]
            if end > start:
                yield slice(first, last), slice(start, end), self.ends[first:last] - start


class Products(Protocol):
    """A way to compute the products of one stack. `words` say which, for the run's `kernel_path`."""

    @property
    def words(self) -> str: ...

    def frozen(self, rows: Tensor, weight: StackedWeight, groups: Groups) -> Tensor: ...

    def frozen_backward(self, dy: Tensor, weight: StackedWeight, groups: Groups) -> Tensor: ...

    def adapted(self, rows: Tensor, weight: StackedWeight, lora: LoRAWeights, groups: Groups) -> tuple[Tensor, Tensor]:
        """(y `[rows, out]`, x A^T `[rows, r]`)."""
        ...

    def adapted_backward(
        self, dy: Tensor, rows: Tensor, low_rank: Tensor, weight: StackedWeight, lora: LoRAWeights, groups: Groups
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dA, dB), the latter in float32."""
        ...


@dataclass(frozen=True, slots=True)
class LoopOverExperts:
    """An expert at a time; `reason` is why, where a device might have more."""

    reason: str = ""

    @property
    def words(self) -> str:
        return "experts one by one" + (f" ({self.reason})" if self.reason else "")

    def frozen(self, rows: Tensor, weight: StackedWeight, groups: Groups) -> Tensor:
        y = rows.new_empty(rows.shape[0], weight.shape[1])
        for expert, part in groups.parts():
            torch.mm(rows[part], weight.expert(expert).t(), out=y[part])
        return y

    def frozen_backward(self, dy: Tensor, weight: StackedWeight, groups: Groups) -> Tensor:
        dx = dy.new_empty(dy.shape[0], weight.shape[2])
        for expert, part in groups.parts():
            torch.mm(dy[part], weight.expert(expert), out=dx[part])
        return dx

    def adapted(self, rows: Tensor, weight: StackedWeight, lora: LoRAWeights, groups: Groups) -> tuple[Tensor, Tensor]:
        y = rows.new_empty(rows.shape[0], weight.shape[1])
        low_rank = rows.new_empty(rows.shape[0], lora.a_compute.shape[1])
        for expert, part in groups.parts():
            x, b = rows[part], lora.b_compute[expert]
            low_rank[part] = x @ lora.a_compute[expert].t()
            y[part] = sum_of_products(x, weight.expert(expert).t(), low_rank[part] * lora.scale, b.t())
        return y, low_rank

    def adapted_backward(
        self, dy: Tensor, rows: Tensor, low_rank: Tensor, weight: StackedWeight, lora: LoRAWeights, groups: Groups
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx = torch.empty_like(rows)
        grad_a = torch.zeros(lora.a_compute.shape, dtype=torch.float32, device=rows.device)
        grad_b = torch.zeros(lora.b_compute.shape, dtype=torch.float32, device=rows.device)
        for expert, part in groups.parts():
            v = (dy[part] @ lora.b_compute[expert]) * lora.scale
            grad_a[expert] = product_in_float32(v.t(), rows[part])
            grad_b[expert] = product_in_float32(dy[part].t(), low_rank[part]).mul_(lora.scale)
            dx[part] = sum_of_products(dy[part], weight.expert(expert), v, lora.a_compute[expert])
        return dx, grad_a, grad_b


class GroupedProducts:
    """torch's grouped product, for bfloat16 where all sides are multiples of 8 and there are rows enough; the loop for
    anything else. Large stacks are decoded by blocks of experts."""

    words = "experts by grouped products"

    def __init__(self) -> None:
        self._loop = LoopOverExperts()

    def frozen(self, rows: Tensor, weight: StackedWeight, groups: Groups) -> Tensor:
        if not _is_fit(rows, weight):
            return self._loop.frozen(rows, weight, groups)
        return _by_blocks(rows, weight, groups, lambda some: weight.some(some).transpose(1, 2))

    def frozen_backward(self, dy: Tensor, weight: StackedWeight, groups: Groups) -> Tensor:
        if not _is_fit(dy, weight):
            return self._loop.frozen_backward(dy, weight, groups)
        return _by_blocks(dy, weight, groups, weight.some)

    def adapted(self, rows: Tensor, weight: StackedWeight, lora: LoRAWeights, groups: Groups) -> tuple[Tensor, Tensor]:
        a, b = lora.a_compute, lora.b_compute
        if not _is_fit(rows, weight, a.shape[1]):
            return self._loop.adapted(rows, weight, lora, groups)
        multiply = torch.nn.functional.grouped_mm
        low_rank = multiply(rows, a.transpose(1, 2), offs=groups.ends)
        extended = torch.cat((rows, low_rank * lora.scale), dim=1)
        y = _by_blocks(extended, weight, groups, lambda some: _joined(weight, some, b, dim=2).transpose(1, 2))
        return y, low_rank

    def adapted_backward(
        self, dy: Tensor, rows: Tensor, low_rank: Tensor, weight: StackedWeight, lora: LoRAWeights, groups: Groups
    ) -> tuple[Tensor, Tensor, Tensor]:
        a, b = lora.a_compute, lora.b_compute
        if not _is_fit(rows, weight, a.shape[1]):
            return self._loop.adapted_backward(dy, rows, low_rank, weight, lora, groups)
        multiply = torch.nn.functional.grouped_mm
        v = multiply(dy, b, offs=groups.ends) * lora.scale
        # Nothing says that the kernel writes zeros for an expert without rows.
        has_rows = (torch.diff(groups.ends, prepend=groups.ends.new_zeros(1)) > 0)[:, None, None]
        grad_a = torch.where(has_rows, multiply(v.t(), rows, offs=groups.ends).float(), 0.0)
        grad_b = torch.where(has_rows, multiply(dy.t(), low_rank, offs=groups.ends).float(), 0.0).mul_(lora.scale)
        dx = _by_blocks(torch.cat((dy, v), dim=1), weight, groups, lambda some: _joined(weight, some, a, dim=1))
        return dx, grad_a, grad_b


def _by_blocks(rows: Tensor, weight: StackedWeight, groups: Groups, matrices: Callable[[slice], Tensor]) -> Tensor:
    """The product of all rows with their experts' matrices, which are made for as many experts at a time as may stand
    decoded."""
    _, outputs, inputs = weight.shape
    at_once = max(1, DECODED_AT_ONCE // (outputs * inputs))
    found = [
        torch.nn.functional.grouped_mm(rows[part], matrices(experts), offs=ends)
        for experts, part, ends in groups.blocks(at_once)
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


def _joined(weight: StackedWeight, experts: slice, thin: Tensor, dim: int) -> Tensor:
    """`[W_e | B_e]` or `[W_e ; A_e]` of some experts, decoded to where it stands."""
    sides = list(thin[experts].shape)
    sides[dim] += weight.shape[dim]
    joined = thin.new_empty(sides)
    decode_to(joined.narrow(dim, 0, weight.shape[dim]), weight, experts)
    joined.narrow(dim, weight.shape[dim], thin.shape[dim]).copy_(thin[experts])
    return joined


def _is_fit(rows: Tensor, weight: StackedWeight, *rank: int) -> bool:
    """Whether the kernel takes it, and it is worth decoding experts without rows: for a single token it is not."""
    experts, *sides = weight.shape
    is_aligned = not any(side % _ALIGNMENT for side in (*sides, *rank))
    return rows.dtype == torch.bfloat16 and is_aligned and 2 * rows.shape[0] >= experts


@cache
def proved_products(device: torch.device, *, grouped: bool) -> Products:
    """The grouped product where a platform has it (`TorchPlatform.grouped_products`) and it gives what the loop gives,
    an expert without rows among them; the loop elsewhere, with the reason."""
    if not grouped:
        return LoopOverExperts()
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return LoopOverExperts(f"torch {torch.__version__} has no grouped products")
    try:
        agrees = _agrees(device)
    except Exception as error:  # an older GPU, a build without the kernel: torch raises many classes
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return LoopOverExperts(f"grouped products do not run here: {reason}")
    return GroupedProducts() if agrees else LoopOverExperts("grouped products computed something else than the loop")


def _agrees(device: torch.device) -> bool:
    """Whether the kernel gives the loop's products. Small integers and their sums are exact in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = (
        torch.randint(-2, 3, shape, generator=generator).to(device, torch.bfloat16) for shape in ((24, 16), (3, 8, 16))
    )
    ends = torch.tensor([10, 10, 24], dtype=torch.int32, device=device)
    multiply = torch.nn.functional.grouped_mm
    parts = [slice(0, 10), slice(10, 10), slice(10, 24)]
    forward = torch.cat([rows[part] @ weight[number].t() for number, part in enumerate(parts)])
    y = multiply(rows, weight.transpose(1, 2), offs=ends)
    expected = torch.stack([forward[part].t().float() @ rows[part].float() for part in parts])
    found = multiply(forward.t(), rows, offs=ends).float()
    # Sums of 14 products up to 64 * 2 need more digits than bfloat16 has. What has no rows is set to zero afterwards.
    close = (found - expected).abs() <= expected.abs() * 2.0**-8
    return torch.equal(y, forward) and bool(close[[0, 2]].all())


class StackProduct(torch.autograd.Function):
    """The adapted product as a function of rows, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        a: Tensor,
        b: Tensor,
        weight: StackedWeight,
        lora: LoRAWeights,
        groups: Groups,
        products: Products,
    ) -> Tensor:
        y, low_rank = products.adapted(rows, weight, lora, groups)
        ctx.save_for_backward(rows, low_rank)
        ctx.weight, ctx.lora, ctx.groups, ctx.products = weight, lora, groups, products
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, low_rank = ctx.saved_tensors
        lora: LoRAWeights = ctx.lora
        dx, *grads = ctx.products.adapted_backward(dy.contiguous(), rows, low_rank, ctx.weight, lora, ctx.groups)
        grad_a, grad_b = (_as_kept(grad, kept) for grad, kept in zip(grads, (lora.a, lora.b), strict=True))
        return dx, grad_a, grad_b, None, None, None, None


def _as_kept(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient of a stack in the shape of its parameter, which may be padded."""
    flat = gradient.flatten(1)
    padding = parameter.shape[1] - flat.shape[1]
    return torch.nn.functional.pad(flat, (0, padding)) if padding else flat


class FrozenStackProduct(torch.autograd.Function):
    """The product without an adapter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: StackedWeight, groups: Groups, products: Products) -> Tensor:
        ctx.weight, ctx.groups, ctx.products = weight, groups, products
        return products.frozen(rows, weight, groups)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.products.frozen_backward(dy.contiguous(), ctx.weight, ctx.groups), None, None, None
