"""Where the inputs of recomputed layers wait for backward: on the device, or in the host's memory.

With gradient checkpointing of whole layers (Chen et al. 2016) one input a layer is kept, and for long rows or many
layers these are most of what is kept at all. Each crosses to the host while the next layer computes, and comes back
while the layer above it is differentiated (the schedule of Rajbhandari et al. 2021, ZeRO-Infinity).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.copy_queue import Copy, CopyQueue, host_memory

SLOTS = 2


class LayerInputs(Protocol):
    """Of one pass: `keep` from the lowest layer to the highest, `take` in the opposite order."""

    def keep(self, layer_input: Tensor) -> None:
        """The next layer's. It must not be written to any more."""
        ...

    def take(self) -> Tensor:
        """The input of the highest layer not yet taken; its numbers stay until the one after the next is taken."""
        ...


@dataclass(slots=True)
class ResidentInputs:
    """On the device."""

    _kept: list[Tensor] = field(default_factory=list)

    def keep(self, layer_input: Tensor) -> None:
        self._kept.append(layer_input)

    def take(self) -> Tensor:
        return self._kept.pop()


class HostMemory:
    """Page-locked memory that goes from pass to pass: locking pages takes longer than a step."""

    def __init__(self, device: torch.device) -> None:
        self.queue = CopyQueue(device)
        self._device = device
        self._free: list[Tensor] = []

    def lend(self, size: int) -> Tensor:
        """At least so many bytes. What was copied before on `queue` is through before what is copied next."""
        found = self._free.pop() if self._free else None
        return found if found is not None and found.numel() >= size else host_memory(size, self._device)

    def give_back(self, memory: Tensor) -> None:
        self._free.append(memory)


@dataclass(slots=True)
class OffloadedInputs:
    """In the host's memory, but for the highest layer's, which is wanted first."""

    memory: HostMemory
    layers: int
    _host: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Of each layer its memory, and the input as it lies in it."""
    _leaving: tuple[Tensor, Copy] | None = None
    _highest: Tensor | None = None
    _slots: list[Tensor] = field(default_factory=list)
    _coming: Copy = None

    def keep(self, layer_input: Tensor) -> None:
        if self._leaving is not None:
            # Its memory is free for what is computed from here on, and not before.
            self.memory.queue.arrived(self._leaving[1])
            self._leaving = None
        if len(self._host) == self.layers - 1:
            self._highest = layer_input
            return
        size = layer_input.numel() * layer_input.element_size()
        lent = self.memory.lend(size)
        host = lent[:size].view(layer_input.dtype).view(layer_input.shape)
        self._host.append((lent, host))
        self._leaving = (layer_input, self.memory.queue.copy(host, layer_input))

    def take(self) -> Tensor:
        number = len(self._host)
        if self._highest is not None:
            taken, self._highest = self._highest, None
            self._slots = [torch.empty_like(taken) for _ in range(min(SLOTS, number))]
        else:
            self.memory.queue.arrived(self._coming)
            taken = self._slots[number % SLOTS]
        if number:
            lent, host = self._host.pop()
            # Into the slot of the layer above the one that is taken now: all that reads it was asked for before.
            self._coming = self.memory.queue.copy(self._slots[(number - 1) % SLOTS], host)
            self.memory.give_back(lent)
        return taken
