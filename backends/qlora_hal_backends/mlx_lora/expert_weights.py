"""The frozen weights of a stack of experts, packed: `product` multiplies each row with its own expert's.

Every expert is packed as a linear layer of its own would be, so its bits are those of any other backend. What MLX can
multiply packed stays packed; NF4 is decoded a whole stack at a time, because a traced function cannot ask which experts
a batch will reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import mlx.core as mx

from qlora_hal_backends.mlx_lora.base_weights import BaseWeight, CodebookWeight, DenseWeight, GroupedWeight
from qlora_hal_backends.mlx_lora.nf4 import NestedAbsmax, NF4Weight


class StackedWeight(Protocol):
    """Frozen weights `[experts, out, in]`."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """What is stored, to be evaluated and counted."""
        ...

    def product(self, rows: mx.array, experts: mx.array) -> mx.array:
        """Row p times `W[experts[p]]^T`, float32 `[rows, 1, out]` for float32 rows `[rows, 1, in]` in the order of
        their experts; differentiable in the rows."""
        ...

    def dense(self) -> mx.array:
        """The weights `[experts, out, in]` as float32, exactly as the products see them."""
        ...


def stacked(parts: Sequence[BaseWeight]) -> StackedWeight:
    """One stack of the experts' weights, all packed in one way."""
    if all(isinstance(part, DenseWeight) for part in parts):
        return DenseStack(mx.stack([part.weight for part in cast("Sequence[DenseWeight]", parts)]))
    if all(isinstance(part, GroupedWeight) for part in parts):
        return _grouped(cast("Sequence[GroupedWeight]", parts))
    codes = cast("Sequence[CodebookWeight]", parts)
    return CodebookStack(_joined([part.weight for part in codes]), codes[0].dtype)


@dataclass(slots=True)
class DenseStack:
    """Not quantized: stored in the compute dtype."""

    weight: mx.array

    @property
    def shape(self) -> tuple[int, int, int]:
        return _three(self.weight.shape)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (self.weight,)

    def product(self, rows: mx.array, experts: mx.array) -> mx.array:
        return _through(self._decoded_after, rows, experts)

    def dense(self) -> mx.array:
        return self.weight.astype(mx.float32)

    def _decoded_after(self, moment: mx.array) -> mx.array:
        weight: mx.array = mx.depends([self.weight], [moment])[0]
        return weight.astype(mx.float32)


@dataclass(slots=True)
class CodebookStack:
    """NF4, decoded in `dtype`. `weights` is one `[experts * out, in]` where each expert has whole blocks; else there is
    one for each expert."""

    weights: tuple[int, NF4Weight] | tuple[NF4Weight, ...]
    dtype: Any

    @property
    def shape(self) -> tuple[int, int, int]:
        match self.weights:
            case (int() as experts, NF4Weight() as whole):
                return experts, whole.shape[0] // experts, whole.shape[1]
            case _:
                return len(self._each), *self._each[0].shape

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return tuple(array for weight in self._each for array in weight.arrays)

    def product(self, rows: mx.array, experts: mx.array) -> mx.array:
        return _through(self._decoded_after, rows, experts)

    def dense(self) -> mx.array:
        return self._decoded(self._each)

    @property
    def _each(self) -> tuple[NF4Weight, ...]:
        return tuple(weight for weight in self.weights if isinstance(weight, NF4Weight))

    def _decoded(self, weights: Sequence[NF4Weight]) -> mx.array:
        decoded = [weight.dequantize(self.dtype).astype(mx.float32) for weight in weights]
        return (decoded[0] if len(decoded) == 1 else mx.stack(decoded)).reshape(self.shape)

    def _decoded_after(self, moment: mx.array) -> mx.array:
        after = [replace(weight, packed=mx.depends([weight.packed], [moment])[0]) for weight in self._each]
        return self._decoded(after)


@dataclass(slots=True)
class GroupedStack:
    """MLX's packed formats, as `GroupedWeight` with an axis of experts before the others."""

    packed: mx.array
    scales: mx.array
    biases: mx.array | None
    group_size: int
    bits: int
    mode: str

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, out, words = self.packed.shape
        return experts, out, words * 32 // self.bits

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (self.packed, self.scales) if self.biases is None else (self.packed, self.scales, self.biases)

    def product(self, rows: mx.array, experts: mx.array) -> mx.array:
        if mx.default_device() != mx.gpu:
            # As for `GroupedWeight`: a CPU multiplies with a packed weight one number at a time.
            return _through(self._decoded_after, rows, experts)
        scales, biases = self._wide_scales()
        product: mx.array = mx.gather_qmm(
            rows,
            self.packed,
            scales,
            biases,
            rhs_indices=experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=True,
        )
        return product

    def dense(self) -> mx.array:
        return self._decoded(self.packed)

    def _decoded(self, packed: mx.array) -> mx.array:
        scales, biases = self._wide_scales()
        dense: mx.array = mx.dequantize(
            packed, scales, biases, group_size=self.group_size, bits=self.bits, mode=self.mode, dtype=mx.float32
        )
        return dense

    def _decoded_after(self, moment: mx.array) -> mx.array:
        return self._decoded(mx.depends([self.packed], [moment])[0])

    def _wide_scales(self) -> tuple[mx.array, mx.array | None]:
        if self.biases is None:
            return self.scales, None
        return self.scales.astype(mx.float32), self.biases.astype(mx.float32)


class StackedNestedAbsmax(NestedAbsmax):
    """Doubly quantized absmax values of all experts, each with its own scales and offset: `codes` `[experts, blocks]`,
    `table` `[experts, 256]`, `absmax` `[experts, blocks / 256]`, `offset` `[experts]`."""

    __slots__ = ()

    def decode(self) -> mx.array:
        """Absmax of each block, float32 `[experts * blocks]`, as `NestedAbsmax.decode` makes them."""
        blocks = self.codes.shape[1]
        scales = mx.repeat(self.absmax, self.block_size, axis=1)[:, :blocks]
        product = mx.take_along_axis(self.table, self.codes.astype(mx.uint32), axis=1) * scales
        return (product.view(mx.uint32).view(mx.float32) + self.offset[:, None]).reshape(-1)


def _grouped(parts: Sequence[GroupedWeight]) -> GroupedStack:
    first = parts[0]
    biases = None if first.biases is None else mx.stack([cast("mx.array", part.biases) for part in parts])
    packed, scales = mx.stack([part.packed for part in parts]), mx.stack([part.scales for part in parts])
    return GroupedStack(packed, scales, biases, first.group_size, first.bits, first.mode)


def _joined(parts: Sequence[NF4Weight]) -> tuple[int, NF4Weight] | tuple[NF4Weight, ...]:
    out, inputs = parts[0].shape
    if (out * inputs) % parts[0].block_size or len({isinstance(part.absmax, NestedAbsmax) for part in parts}) > 1:
        return tuple(parts)
    packed = mx.concatenate([part.packed.reshape(-1) for part in parts])
    whole = NF4Weight(packed, _joined_absmax(parts), (len(parts) * out, inputs), parts[0].block_size)
    return len(parts), whole


def _joined_absmax(parts: Sequence[NF4Weight]) -> mx.array | NestedAbsmax:
    nested = [part.absmax for part in parts if isinstance(part.absmax, NestedAbsmax)]
    if not nested:
        return mx.concatenate([cast("mx.array", part.absmax).reshape(-1) for part in parts])
    return StackedNestedAbsmax(
        codes=mx.stack([one.codes.reshape(-1) for one in nested]),
        table=mx.stack([one.table.reshape(-1) for one in nested]),
        absmax=mx.stack([one.absmax.reshape(-1) for one in nested]),
        offset=mx.stack([one.offset.reshape(()) for one in nested]),
        block_size=nested[0].block_size,
    )


def _through(decoded_after: Callable[[mx.array], mx.array], rows: mx.array, experts: mx.array) -> mx.array:
    """Rows times the decoded weights of their experts. Nothing decoded is kept between forward and backward pass."""

    @mx.custom_function
    def product(rows: mx.array, experts: mx.array) -> mx.array:
        return mx.gather_mm(rows, decoded_after(rows).swapaxes(-1, -2), rhs_indices=experts, sorted_indices=True)

    @product.vjp
    def gradient(given: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        found = mx.gather_mm(cotangent, decoded_after(cotangent), rhs_indices=given[1], sorted_indices=True)
        return found, mx.zeros_like(given[1])

    return cast("mx.array", product(rows, experts))


def _three(shape: Sequence[int]) -> tuple[int, int, int]:
    experts, out, inputs = shape
    return experts, out, inputs
