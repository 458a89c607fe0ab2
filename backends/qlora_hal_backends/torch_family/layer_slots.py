"""The packed bytes of decoder layers that are elsewhere, and the two slots on the device in which they are read.

A layer's tensors lie in one flat run of bytes, so that a layer moves as a whole: from the other ranks (`sharded_base`)
or from the host's memory (`streamed_base`). Two slots of a whole layer's size are all that the device holds of them:
layers of even and of odd number take turns, so the next layer is on its way while this one computes. A weight's tensors
are views of its slot, and hold its numbers from `present` until the layer after the next is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, overload

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.base_weights import BaseWeight, Blockwise4BitWeight, DenseWeight, Int8Weight
from qlora_hal_backends.torch_family.experts.stacked_weights import (
    Blockwise4BitStack,
    DenseStack,
    Int8Stack,
    Mxfp4Stack,
    SeparateWeights,
    StackedWeight,
)
from qlora_hal_backends.torch_family.microscaling import Mxfp4Weight

ALIGNMENT = 256
"""Each tensor starts at a multiple of so many bytes, what a kernel's widest loads want."""
SLOTS = 2

Weight = BaseWeight | StackedWeight
"""What a layer is made of: linear layers' weights, and those of all experts of a projection."""
Packed = TypeVar("Packed", bound=Weight)


class LayerStore(Protocol):
    """Where the bytes of layers are kept. `add` each layer in turn, then `finish`."""

    def add(self, weights: Sequence[Weight]) -> list[Weight]:
        """Take a layer; the weights it gives read the slots."""
        ...

    def finish(self) -> None:
        """Make the slots."""
        ...

    def present(self, number: int) -> None:
        """Have a layer's bytes in its slot, and the next one's, in the direction of travel, on their way."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """An attribute that holds a tensor of a weight, and where it lies in its layer's bytes."""

    owner: Any
    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int = 0

    @property
    def size(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def put(self, tensor: Tensor) -> None:
        setattr(self.owner, self.name, tensor)


@dataclass(slots=True)
class _InSlot(Generic[Packed]):
    weight: Packed
    layer: int
    store: LayerStore

    def present(self) -> Packed:
        """The weight itself, whole until the layer after the next is read."""
        self.store.present(self.layer)
        return self.weight

    def dense(self) -> Tensor:
        return self.present().dense()


class SlotWeight(_InSlot[BaseWeight]):
    """A weight of a layer whose bytes come when it is read."""

    __slots__ = ()

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape


class SlotStack(_InSlot[StackedWeight]):
    """The weights of all experts of a projection, alike."""

    __slots__ = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.weight.shape

    def some(self, experts: slice) -> Tensor:
        return self.present().some(experts)

    def expert(self, number: int) -> Tensor:
        return self.present().expert(number)


def in_slots(weights: Sequence[Weight], layer: int, store: LayerStore) -> list[Weight]:
    """The weights of a layer as they are read from here on."""
    return [_in_slot(weight, layer, store) for weight in weights]


def _in_slot(weight: Weight, layer: int, store: LayerStore) -> Weight:
    if isinstance(weight, _STACKS):
        return SlotStack(weight, layer, store)
    return SlotWeight(weight, layer, store)  # type: ignore[arg-type]  # whatever is no stack


@overload
def at_hand(base: BaseWeight) -> BaseWeight: ...


@overload
def at_hand(base: StackedWeight) -> StackedWeight: ...


def at_hand(base: Weight) -> Weight:
    """The weight itself, for code that reads its tensors."""
    return base.present() if isinstance(base, _InSlot) else base


def kind_of(base: object) -> type:
    """The class of a weight, of which nothing is brought for that."""
    return type(base.weight) if isinstance(base, _InSlot) else type(base)


def places_of(weights: Sequence[Weight]) -> tuple[list[Place], int]:
    """Where each tensor of a layer lies in its bytes, and how many these are."""
    places, end = [], 0
    for owner, name in (found for weight in weights for found in _tensors_of(weight)):
        tensor: Tensor = getattr(owner, name)
        places.append(Place(owner, name, tensor.dtype, tensor.shape, end))
        end += -(-places[-1].size // ALIGNMENT) * ALIGNMENT
    return places, end


def move_into(whole: Tensor, places: Sequence[Place], device: torch.device) -> None:
    """Copy a layer's tensors into its bytes, and let go of them."""
    for place in places:
        tensor: Tensor = getattr(place.owner, place.name)
        whole[place.start : place.start + place.size].copy_(tensor.contiguous().view(-1).view(torch.uint8))
        place.put(torch.empty(0, dtype=place.dtype, device=device))


def view_from(slot: Tensor, places: Sequence[Place]) -> None:
    """Let a layer's tensors be views of a slot."""
    for place in places:
        place.put(slot[place.start : place.start + place.size].view(place.dtype).view(place.shape))


def _tensors_of(weight: Weight) -> Iterator[tuple[Any, str]]:
    """The tensors of a weight that are worth moving; tables of codes and offsets are small, and stay on the device."""
    match weight:
        case DenseWeight() | DenseStack():
            yield weight, "weight"
        case Int8Weight() | Int8Stack():
            yield from ((weight, "integers"), (weight, "row_absmax"))
        case Blockwise4BitWeight(state=state):
            yield from ((weight, "packed"), (state, "absmax"))
            if state.nested:
                yield state.state2, "absmax"
        case Blockwise4BitStack(nested=nested):
            yield from ((weight, "packed"), (weight, "absmax"))
            if nested is not None:
                yield weight, "nested"
        case Mxfp4Weight() | Mxfp4Stack():
            yield from ((weight, "packed"), (weight, "scales"))
        case SeparateWeights(weights=weights):
            for of_expert in weights:
                yield from _tensors_of(of_expert)
        case _:
            raise TypeError(f"{type(weight).__name__} has no tensors that are known here")


_STACKS = (DenseStack, Int8Stack, Blockwise4BitStack, Mxfp4Stack, SeparateWeights)
