"""A frozen base of which each rank holds a part: the packed bytes of a decoder layer are gathered when it is needed.

Packed weights cross as bytes, a quarter of 16-bit weights. A layer's bytes (`layer_slots`) are cut into as many equal
chunks as there are ranks; each rank keeps one, and no more than two layers are ever whole.

Why not FSDP2 (`torch.distributed.fsdp.fully_shard`): with torch 2.11 on CUDA it refuses integer parameters ("only
Tensors of floating point dtype can require gradients"), and bytes that are viewed as bfloat16 come back changed where
they are NaN as such: 28,398 of 29,360,128 random bytes. torch 2.13 holds them on a CPU. So the bytes are gathered by
torch.distributed's gather here, behind the seam that FSDP2 would stand behind as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qlora_hal.contract.world import World
from qlora_hal_backends.torch_family.layer_slots import (
    ALIGNMENT,
    SLOTS,
    Place,
    Weight,
    in_slots,
    move_into,
    places_of,
    view_from,
)

_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name from torch 2.13 on, and before."""


class GatherError(RuntimeError):
    """Bytes of a layer did not arrive: the collective's own error is the cause. `waited_seconds` for them."""

    def __init__(self, waited_seconds: float) -> None:
        super().__init__("the bytes of a layer did not arrive")
        self.waited_seconds = waited_seconds


@dataclass(slots=True)
class _Layer:
    """This rank's chunk of a layer's bytes, and where each tensor lies in the whole."""

    chunk: Tensor
    places: list[Place]
    gathered_bytes: int


@dataclass(slots=True)
class ShardedBase:
    """The layers of a base, spread over `world.size` ranks. `add` each layer in turn, then `finish`."""

    world: World
    device: torch.device
    passes: int = 0
    """How many passes over the layers were begun."""
    seconds: float = 0.0
    """Of this process in gathers; where the device has a queue, what it takes to queue them."""
    _layers: list[_Layer] = field(default_factory=list)
    _slots: list[Tensor] = field(default_factory=list)
    _present: list[int] = field(default_factory=lambda: [-1] * SLOTS)
    _coming: tuple[int, Any] | None = None
    _last: int = -1
    _step: int = 1
    _visits: int = 0
    """Layers asked for since the pass began, each time that another one than before was."""
    _last_before: int = -1
    _replayed: tuple[int, int] | None = None
    """While a pass is gone through once more: the visits that are still to come again, and the last one."""

    def add(self, weights: Sequence[Weight]) -> list[Weight]:
        """Keep this rank's chunk of a layer; the weights it gives read the slots."""
        places, size = places_of(weights)
        share = -(-size // (ALIGNMENT * self.world.size)) * ALIGNMENT
        whole = torch.zeros(share * self.world.size, dtype=torch.uint8, device=self.device)
        move_into(whole, places, self.device)
        chunk = whole[self.world.rank * share : (self.world.rank + 1) * share].clone()
        number = len(self._layers)
        self._layers.append(_Layer(chunk, places, share * self.world.size))
        return in_slots(weights, number, self)

    def finish(self) -> None:
        """Make the slots, and let each tensor be a view of its own."""
        largest = max((layer.gathered_bytes for layer in self._layers), default=0)
        self._slots = [
            torch.zeros(largest, dtype=torch.uint8, device=self.device) for _ in range(min(SLOTS, len(self._layers)))
        ]
        for number, layer in enumerate(self._layers):
            view_from(self._slots[number % SLOTS], layer.places)

    def present(self, number: int) -> None:
        """Have a layer's bytes in its slot, and the next one's, in the direction of travel, on their way."""
        if self._replayed is not None:
            left, last = self._replayed
            if number != last:
                self._replayed = (left - 1, number) if left > 1 else None
            return
        if number == self._last:
            return
        self._step = 1 if number > self._last else -1
        if self._present[number % SLOTS] != number and (self._coming is None or self._coming[0] != number):
            self._gather(number)
        self._arrive()
        self._last, self._visits = number, self._visits + 1
        following = number + self._step
        if 0 <= following < len(self._layers) and self._present[following % SLOTS] != following:
            self._gather(following)

    def begin_pass(self) -> None:
        """Every rank has the same passes over the layers in the same order, and each asks for the same layers."""
        self.passes += 1
        self._visits, self._last_before = 0, self._last

    @contextmanager
    def broken_pass_again(self) -> Iterator[None]:
        """For a pass, with whatever small batch, in the place of one that broke off: what that one gathered is not
        gathered once more (its numbers mean nothing), what the other ranks still wait for is."""
        self._replayed = (self._visits, self._last_before) if self._visits else None
        try:
            yield
        finally:
            self._replayed = None

    def _gather(self, number: int) -> None:
        self._arrive()
        layer, slot = self._layers[number], self._slots[number % SLOTS]
        self._present[number % SLOTS] = -1
        whole = slot[: layer.gathered_bytes]
        with self._timed():
            self._coming = (number, _gather_into(whole, layer.chunk, async_op=True))

    def _arrive(self) -> None:
        if self._coming is not None:
            number, work = self._coming
            with self._timed():
                work.wait()
            self._present[number % SLOTS], self._coming = number, None

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Raises GatherError for what the collective raises."""
        began = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            raise GatherError(time.perf_counter() - began) from error
        finally:
            self.seconds += time.perf_counter() - began
