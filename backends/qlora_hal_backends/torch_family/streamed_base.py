"""A frozen base beside the device, whose layers visit it: for models that are larger than it.

Packed layers cross, a quarter of 16-bit weights, once in each direction of a pass; the next one in the direction of
travel is copied while the present one computes, so with enough tokens in a pass the copies cost nothing. What computes
is what a resident base would compute, of the same bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora_hal.errors.figures import size as in_words
from qlora_hal_backends.torch_family.copy_queue import Copy, CopyQueue
from qlora_hal_backends.torch_family.layer_slots import SLOTS, Place, Weight, in_slots, move_into, places_of, view_from
from qlora_hal_backends.torch_family.layers_at_rest import AUTO, LayersAtRest, resting_place


@dataclass(slots=True)
class _Slot:
    """`layer` is whose bytes it holds or will hold, -1 of none; `coming` the copy that brings them."""

    memory: Tensor
    layer: int = -1
    coming: Copy = None


@dataclass(slots=True)
class StreamedBase:
    """The layers of a base `at_rest` in the host's memory or on its disk. `add` each layer in turn, then `finish`."""

    device: torch.device
    numbers: int
    """Of all weights of all layers: what the first layer takes tells what they will take."""
    choice: str = AUTO
    """Where they rest (`layers_at_rest.CHOICES`)."""
    ranks: int = 1
    """How many of this host keep them, each for itself."""
    copied_bytes: int = 0
    """To the device, since the base was loaded."""
    at_rest: LayersAtRest = field(init=False)
    _layers: list[tuple[int, list[Place]]] = field(default_factory=list)
    _slots: list[_Slot] = field(default_factory=list)
    _last: int = -1
    _queue: CopyQueue = field(init=False)

    def __post_init__(self) -> None:
        self._queue = CopyQueue(self.device)

    def add(self, weights: Sequence[Weight]) -> list[Weight]:
        places, size = places_of(weights)
        if not self._layers:
            here = sum(math.prod(weight.shape) for weight in weights)
            self.at_rest = resting_place(self.choice, self.numbers * size // here, self.device, self.ranks)
        whole = self.at_rest.room(size)
        move_into(whole, places, self.device)
        self.at_rest.keep(whole)
        self._layers.append((size, places))
        return in_slots(weights, len(self._layers) - 1, self)

    def finish(self) -> None:
        largest = max((size for size, _ in self._layers), default=0)
        self._slots = [
            _Slot(torch.zeros(largest, dtype=torch.uint8, device=self.device))
            for _ in range(min(SLOTS, len(self._layers)))
        ]
        for number, (_, places) in enumerate(self._layers):
            view_from(self._slots[number % SLOTS].memory, places)

    def cost(self) -> str:
        """A sentence: what a pass copies, and how long that takes at the rate of copies that are made now."""
        self._last = -1
        for slot in self._slots:
            slot.layer = -1
        self._queue.settle()
        before, began = self.copied_bytes, time.perf_counter()
        for number in range(len(self._slots)):
            self._fetch(number)
        self._queue.settle()
        rate = (self.copied_bytes - before) / max(time.perf_counter() - began, 1e-9)
        one_way = sum(size for size, _ in self._layers)
        return (
            f"the decoder layers are in {self.at_rest.where}: {in_words(one_way)} cross to the device in each "
            f"direction of a pass, {one_way / rate * 1e3:.0f} ms at the {in_words(rate)}/s measured now; a pass of so "
            "few tokens that it computes for less waits for them"
        )

    def present(self, number: int) -> None:
        if number == self._last:
            return
        # From the lowest layer it goes up only: a pass that follows an evaluation begins there.
        following = number + (1 if number > self._last or number == 0 else -1)
        self._fetch(number)
        slot = self._slots[number % SLOTS]
        self._queue.arrived(slot.coming)
        slot.coming, self._last = None, number
        if 0 <= following < len(self._layers):
            # Into the slot of the layer before: all that reads it was asked for before.
            self._fetch(following)
            self.at_rest.ahead(2 * following - number)

    def _fetch(self, number: int) -> None:
        slot = self._slots[number % SLOTS]
        if slot.layer == number:
            return
        size, _ = self._layers[number]
        self._queue.arrived(slot.coming)
        slot.layer, slot.coming = number, self._queue.copy(slot.memory[:size], self.at_rest.take(number))
        self.at_rest.lent(number, slot.coming)
        self.copied_bytes += size
