"""Where the inputs of recomputed layers wait for backward, and what else is kept of them: on the device, or in the
host's memory.

With gradient checkpointing of whole layers (Chen et al. 2016) one input a layer is kept, and for long rows or many
layers these are most of what is kept at all. Each crosses to the host while the next layer computes, and comes back
while the layer above it is differentiated (the schedule of Rajbhandari et al. 2021, ZeRO-Infinity).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from qlora_hal.detect.device_memory import host_memory_left
from qlora_hal_backends.torch_family.copy_queue import Copy, CopyQueue, host_memory

SLOTS = 2
BLOCK_BYTES = 2**26


class LayerInputs(Protocol):
    """Of one pass: `keep` from the lowest layer to the highest, `take` in the opposite order. What else of a layer
    waits is beside its input, and of the same dtypes and dimensions in all layers."""

    def keep(self, of_layer: Sequence[Tensor]) -> None:
        """The next layer's. They must not be written to any more."""
        ...

    def take(self) -> Sequence[Tensor]:
        """Those of the highest layer not yet taken; their numbers stay until the one after the next is taken."""
        ...


@dataclass(slots=True)
class ResidentInputs:
    """On the device."""

    _kept: list[Sequence[Tensor]] = field(default_factory=list)

    def keep(self, of_layer: Sequence[Tensor]) -> None:
        self._kept.append(of_layer)

    def take(self) -> Sequence[Tensor]:
        return self._kept.pop()


class HostMemory:
    """Page-locked memory that goes from pass to pass: locking pages takes longer than a step.

    It is one range of bytes that grows, cut into blocks of `block` bytes, a power of two: torch's allocator (2.13)
    takes the next power of two of what is asked for, up to twice a layer's input where each had memory of its own.
    """

    def __init__(
        self, device: torch.device, *, block: int = BLOCK_BYTES, ranks: int = 1, queue: CopyQueue | None = None
    ) -> None:
        self.queue = queue or CopyQueue(device)
        self._device = device
        self._block, self._ranks = block, ranks
        self._blocks: list[Tensor] = []
        self._last: Callable[[], OffloadedInputs | None] = _nobody

    def of_a_pass(self, layers: int) -> OffloadedInputs:
        """The inputs of a pass. While an earlier one still waits for its backward this has a memory of its own."""
        last = self._last()
        if last is not None and not last.are_taken:
            apart = HostMemory(self._device, block=self._block, ranks=self._ranks, queue=self.queue)
            return OffloadedInputs(apart, layers)
        inputs = OffloadedInputs(self, layers)
        self._last = weakref.ref(inputs)
        return inputs

    def pieces(self, begin: int, end: int) -> Iterator[Tensor]:
        """The bytes from `begin` to `end`, each piece as far as its block goes. What was copied before on `queue` is
        through before what is copied next."""
        while begin < end:
            number, offset = divmod(begin, self._block)
            while number >= len(self._blocks):
                self._blocks.append(host_memory(self._block, self._device))
            piece = self._blocks[number][offset : offset + end - begin]
            yield piece
            begin += piece.numel()

    def has_room(self, size: int) -> bool:
        """Whether so many bytes are here, or may be taken of what the host has left for each of its ranks."""
        missing = size - self._block * len(self._blocks)
        return missing <= 0 or missing * self._ranks <= host_memory_left()


def _nobody() -> None:
    """No pass has begun."""


@dataclass(slots=True, weakref_slot=True)
class OffloadedInputs:
    """In the host's memory, one layer behind the other, but for the highest layer's, which are wanted first."""

    memory: HostMemory
    layers: int
    _kept: int = 0
    """Of how many layers they are in the host's memory."""
    _taken: int = 0
    _leaving: tuple[Sequence[Tensor], Copy] | None = None
    _highest: Sequence[Tensor] | None = None
    _slots: list[Sequence[Tensor]] = field(default_factory=list)
    _coming: Copy = None

    @property
    def are_taken(self) -> bool:
        return self._taken == self.layers

    def keep(self, of_layer: Sequence[Tensor]) -> None:
        if self._leaving is not None:
            # Their memory is free for what is computed from here on, and not before.
            self.memory.queue.arrived(self._leaving[1])
            self._leaving = None
        if self._kept == self.layers - 1:
            self._highest = of_layer
            return
        leaving: Copy = None
        for host, device in self._parts(self._kept, of_layer):
            leaving = self.memory.queue.copy(host, device)
        self._leaving = (of_layer, leaving)
        self._kept += 1

    def take(self) -> Sequence[Tensor]:
        number = self._kept
        self._taken += 1
        if self._highest is not None:
            taken, self._highest = self._highest, None
            self._slots = [[torch.empty_like(tensor) for tensor in taken] for _ in range(min(SLOTS, number))]
        else:
            self.memory.queue.arrived(self._coming)
            taken = self._slots[number % SLOTS]
        if number:
            self._kept -= 1
            # Into the slot of the layer above the one that is taken now: all that reads it was asked for before.
            for host, device in self._parts(self._kept, self._slots[self._kept % SLOTS]):
                self._coming = self.memory.queue.copy(device, host)
        return taken

    def _parts(self, number: int, of_layer: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The bytes of a layer on the host, and beside them those of `of_layer`. The last copy is done when all are: a
        queue keeps its order."""
        begin = number * bytes_of(of_layer)
        for tensor in of_layer:
            flat = tensor.view(-1).view(torch.uint8)
            end, done = begin + flat.numel(), 0
            for host in self.memory.pieces(begin, end):
                yield host, flat[done : done + host.numel()]
                done += host.numel()
            begin = end


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
