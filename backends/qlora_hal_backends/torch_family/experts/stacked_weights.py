"""The packed weights of all experts of one projection. Each expert is packed alone, so that its bits are those of its
layer; equal parts then lie behind one another, and one decoder call gives all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from bitsandbytes import functional as codec
from torch import Tensor

from qlora_hal_backends.torch_family.base_weights import (
    BaseWeight,
    Blockwise4BitWeight,
    DenseWeight,
    Int8Weight,
)
from qlora_hal_backends.torch_family.microscaling import Mxfp4Weight, decoded, proved_decoder

_LARGEST_COUNT = 2**31 - 1
"""Numbers that bitsandbytes' decoder counts in one call."""
_AT_ONCE = 2**26
"""Numbers that are decoded together where what stands between takes more memory than they do: eight bytes of each
integer, four of each byte of MXFP4."""


class StackedWeight(Protocol):
    """Frozen weights of shape `[experts, out, in]`."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def dense(self) -> Tensor:
        """All of them `[experts, out, in]` in the compute dtype. The caller must not write to it."""
        ...

    def some(self, experts: slice) -> Tensor:
        """Neighbours of each other `[some, out, in]`, like `dense`."""
        ...

    def expert(self, number: int) -> Tensor:
        """One `[out, in]`."""
        ...


@dataclass(slots=True)
class DenseStack:
    """Not quantized."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, outputs, inputs = self.weight.shape
        return experts, outputs, inputs

    def dense(self) -> Tensor:
        return self.weight

    def some(self, experts: slice) -> Tensor:
        return self.weight[experts]

    def expert(self, number: int) -> Tensor:
        return self.weight[number]


@dataclass(slots=True)
class Int8Stack:
    """`Int8Weight` for each expert: integers `[experts, out, in]`, scales `[experts, out]`."""

    integers: Tensor
    row_absmax: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, outputs, inputs = self.integers.shape
        return experts, outputs, inputs

    def dense(self) -> Tensor:
        return self.some(slice(0, len(self.integers)))

    def some(self, experts: slice) -> Tensor:
        return _in_parts(self, experts, self.integers.device, self._decoded)

    def _decoded(self, part: slice) -> Tensor:
        integers = self.integers[part]
        flat = Int8Weight(integers.flatten(0, 1), self.row_absmax[part].flatten(), self.dtype)
        return flat.dense().view(integers.shape)

    def expert(self, number: int) -> Tensor:
        return Int8Weight(self.integers[number], self.row_absmax[number], self.dtype).dense()


@dataclass(slots=True)
class Blockwise4BitStack:
    """`Blockwise4BitWeight` for each expert. `packed` is `[experts, bytes]` and `absmax` `[experts, blocks]`; `nested`
    are the scales of the scales `[experts, blocks of blocks]` and `offsets` `[experts]`, None without double
    quantization. `like` is the first expert's state, for what all share."""

    packed: Tensor
    absmax: Tensor
    nested: Tensor | None
    offsets: Tensor | None
    like: codec.QuantState

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.packed.shape[0], self.like.shape[0], self.like.shape[1]

    def dense(self) -> Tensor:
        return self.some(slice(0, len(self.packed)))

    def some(self, experts: slice) -> Tensor:
        _, outputs, inputs = self.shape
        absmax = self._plain_absmax(experts)
        if absmax is None:
            return torch.stack([self.expert(number) for number in range(experts.start, experts.stop)])
        at_a_time = max(1, _LARGEST_COUNT // (outputs * inputs))
        parts = [
            self._decoded(packed, scales)
            for packed, scales in zip(self.packed[experts].split(at_a_time), absmax.split(at_a_time), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decoded(self, packed: Tensor, absmax: Tensor) -> Tensor:
        """Some experts at once."""
        experts, (outputs, inputs) = len(packed), self.shape[1:]
        state = self._state(absmax.reshape(-1), torch.Size((experts * outputs, inputs)))
        return Blockwise4BitWeight(packed.reshape(-1, 1), state).dense().view(experts, outputs, inputs)

    def expert(self, number: int) -> Tensor:
        state = self._state(self.absmax[number], self.like.shape)
        if self.nested is not None and self.offsets is not None:
            state.nested = True
            state.offset = self.offsets[number]
            state.state2 = self._nested_state(self.nested[number])
        return Blockwise4BitWeight(self.packed[number].view(-1, 1), state).dense()

    def _plain_absmax(self, experts: slice) -> Tensor | None:
        """Float32 scales of some experts `[some, blocks]`; None where an expert ends within a block."""
        _, outputs, inputs = self.shape
        if outputs * inputs % self.like.blocksize:
            return None
        if self.nested is None or self.offsets is None:
            return self.absmax[experts]
        if self.absmax.shape[1] % self.like.state2.blocksize:
            return None
        codes = self.absmax[experts]
        scales = codec.dequantize_blockwise(codes.view(-1), self._nested_state(self.nested[experts].view(-1)))
        return scales.view(codes.shape) + self.offsets[experts, None]

    def _state(self, absmax: Tensor, shape: torch.Size) -> codec.QuantState:
        like = self.like
        return codec.QuantState(  # type: ignore[no-untyped-call]
            absmax=absmax,
            shape=shape,
            code=like.code,
            blocksize=like.blocksize,
            quant_type=like.quant_type,
            dtype=like.dtype,
        )

    def _nested_state(self, absmax: Tensor) -> codec.QuantState:
        inner = self.like.state2
        kept = {"code": inner.code, "blocksize": inner.blocksize, "dtype": inner.dtype}
        return codec.QuantState(absmax=absmax, **kept)  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class Mxfp4Stack:
    """`Mxfp4Weight` for each expert: codes `[experts, out, in / 2]`, scales `[experts, out, in / 32]`."""

    packed: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, outputs, width = self.packed.shape
        return experts, outputs, 2 * width

    def dense(self) -> Tensor:
        return self.some(slice(0, len(self.packed)))

    def some(self, experts: slice) -> Tensor:
        if proved_decoder(self.packed.device).needs_room:
            return _in_parts(self, experts, self.packed.device, self._decoded)
        return self._decoded(experts)

    def _decoded(self, part: slice) -> Tensor:
        return decoded(self.packed[part], self.scales[part], self.dtype)

    def expert(self, number: int) -> Tensor:
        return decoded(self.packed[number], self.scales[number], self.dtype)


@dataclass(slots=True)
class SeparateWeights:
    """Experts in a format whose parts are not laid behind one another."""

    weights: Sequence[BaseWeight]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.weights), *self.weights[0].shape

    def dense(self) -> Tensor:
        return self.some(slice(0, len(self.weights)))

    def some(self, experts: slice) -> Tensor:
        return torch.stack([weight.dense() for weight in self.weights[experts]])

    def expert(self, number: int) -> Tensor:
        return self.weights[number].dense()


def decode_to(out: Tensor, stack: StackedWeight, experts: slice) -> None:
    """Some experts to `out`, which may be a part of wider rows: a few at a time, so that beside it stand only these."""
    for part in _parts(stack, experts):
        out[part.start - experts.start : part.stop - experts.start] = stack.some(part)


def _in_parts(
    stack: Int8Stack | Mxfp4Stack, experts: slice, device: torch.device, decode: Callable[[slice], Tensor]
) -> Tensor:
    """Some experts, a few at a time."""
    parts = list(_parts(stack, experts))
    if len(parts) == 1:
        return decode(parts[0])
    whole = torch.empty(experts.stop - experts.start, *stack.shape[1:], dtype=stack.dtype, device=device)
    for part in parts:
        whole[part.start - experts.start : part.stop - experts.start] = decode(part)
    return whole


def _parts(stack: StackedWeight, experts: slice) -> Iterator[slice]:
    """As many experts as are decoded together."""
    _, outputs, inputs = stack.shape
    at_a_time = max(1, _AT_ONCE // (outputs * inputs))
    for start in range(experts.start, experts.stop, at_a_time):
        yield slice(start, min(start + at_a_time, experts.stop))


def stacked(weights: Sequence[BaseWeight]) -> StackedWeight:
    """The weights of all experts as one."""
    dense = [weight.weight for weight in weights if isinstance(weight, DenseWeight)]
    if len(dense) == len(weights):
        return DenseStack(torch.stack(dense))
    integers = [weight for weight in weights if isinstance(weight, Int8Weight)]
    if len(integers) == len(weights):
        return Int8Stack(
            torch.stack([weight.integers for weight in integers]),
            torch.stack([weight.row_absmax for weight in integers]),
            integers[0].dtype,
        )
    blocks = [weight for weight in weights if isinstance(weight, Blockwise4BitWeight)]
    if len(blocks) == len(weights):
        return _stacked_blocks(blocks)
    microscaled = [weight for weight in weights if isinstance(weight, Mxfp4Weight)]
    if len(microscaled) == len(weights):
        return Mxfp4Stack(
            torch.stack([weight.packed for weight in microscaled]),
            torch.stack([weight.scales for weight in microscaled]),
            microscaled[0].dtype,
        )
    return SeparateWeights(weights)


def _stacked_blocks(weights: Sequence[Blockwise4BitWeight]) -> Blockwise4BitStack:
    states = [weight.state for weight in weights]
    nested = states[0].nested
    return Blockwise4BitStack(
        packed=torch.stack([weight.packed.reshape(-1) for weight in weights]),
        absmax=torch.stack([state.absmax for state in states]),
        nested=torch.stack([state.state2.absmax for state in states]) if nested else None,
        offsets=torch.stack([state.offset.reshape(()) for state in states]) if nested else None,
        like=states[0],
    )
