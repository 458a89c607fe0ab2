"""Where the packed bytes of streamed layers rest: in page-locked memory, or in a file where that is too small.

The file is without a name and goes with the process, however that ends. Two page-locked buffers take turns as the slots
on the device do: while one layer is copied to its slot, a thread reads the next one of the direction of travel into the
other buffer. What the machine's memory has left keeps pages of the file, so that only what does not fit is read anew.
"""

from __future__ import annotations

import tempfile
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qlora_hal.contract.memory_constants import OFFLOADED_LAYERS, ON_DISK
from qlora_hal.detect.hardware import memory_available_here
from qlora_hal.errors import StorageError
from qlora_hal.errors.figures import size as in_words
from qlora_hal.files.durable import storage_error
from qlora_hal.memory.placement import HOST_SPARED
from qlora_hal.quantize.calibration import cache_folder
from qlora_hal_backends.torch_family.copy_queue import Copy, host_memory
from qlora_hal_backends.torch_family.device import has_queue

AUTO, HOST, DISK = "auto", "host", ON_DISK
CHOICES = (AUTO, HOST, DISK)
BUFFERS = 2
MOST_WASTED = 8
"""The part of a block of page-locked memory that may stay empty is one in so many."""


class LayersAtRest(Protocol):
    """Layers by number, in the order in which they are kept."""

    where: str
    """Completes `the decoder layers are in`."""

    def room(self, size: int) -> Tensor:
        """So many bytes to put a layer into."""
        ...

    def keep(self, whole: Tensor) -> None:
        """The layer that was put into its room."""
        ...

    def ahead(self, number: int) -> None:
        """Begin to have a layer ready, if there is such a layer."""
        ...

    def take(self, number: int) -> Tensor:
        """A layer's bytes, to be copied from; `lent` says when that is done."""
        ...

    def lent(self, number: int, copy: Copy) -> None: ...


def block_for(size: int) -> int:
    """Page-locked bytes to put layers of so many into. torch's allocator (2.13) takes the next power of two of what is
    asked for: up to twice the size of a layer alone, of several together no more than an eighth for nothing."""
    block = 1 << (size - 1).bit_length()
    while block % size > block // MOST_WASTED:
        block *= 2
    return block


class HostLayers:
    """In page-locked memory, as many layers to a block as waste little of it."""

    where = "the host's memory"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._block_for = block_for if has_queue(device) else int
        self._left = torch.empty(0, dtype=torch.uint8)
        self._layers: list[Tensor] = []

    def room(self, size: int) -> Tensor:
        if self._left.numel() < size:
            self._left = host_memory(self._block_for(size), self._device)
        room, self._left = self._left[:size], self._left[size:]
        return room

    def keep(self, whole: Tensor) -> None:
        self._layers.append(whole)

    def ahead(self, number: int) -> None:
        """All are ready."""

    def take(self, number: int) -> Tensor:
        return self._layers[number]

    def lent(self, number: int, copy: Copy) -> None:
        """A layer's bytes stay."""


@dataclass(slots=True)
class _Buffer:
    """`layer` is whose bytes it has or will have once `reading` is done; `copying` is what still reads them."""

    memory: Tensor
    layer: int = -1
    reading: Future[None] | None = None
    copying: Copy = None


class DiskLayers:
    """In a file below `folder`. Raises StorageError QH-S09, QH-S11, QH-S12."""

    def __init__(self, device: torch.device, folder: Path, why: str) -> None:
        self.where = f"a file below {folder}, {why}"
        self._device, self._folder = device, folder
        self._places: list[tuple[int, int]] = []
        self._end = 0
        self._buffers = [_Buffer(torch.empty(0, dtype=torch.uint8)) for _ in range(BUFFERS)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - as long as the layers
        except OSError as problem:
            raise storage_error(problem, folder, what="the packed layers") from problem
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="qlora-hal-layers")
        weakref.finalize(self, self._file.close)
        weakref.finalize(self, self._reader.shutdown, wait=False)

    def room(self, size: int) -> Tensor:
        for buffer in self._buffers:
            if buffer.memory.numel() < size:
                buffer.memory = host_memory(size, self._device)
        return self._buffers[0].memory[:size]

    def keep(self, whole: Tensor) -> None:
        rest = whole.numpy().data
        self._places.append((self._end, len(rest)))
        try:
            while rest:
                written = self._file.write(rest)
                rest = rest[written:]
        except OSError as problem:
            raise storage_error(
                problem, self._folder, what="the packed layers", needed_bytes=self._places[-1][1]
            ) from problem
        self._end += self._places[-1][1]

    def ahead(self, number: int) -> None:
        buffer = self._buffers[number % BUFFERS]
        if not 0 <= number < len(self._places) or buffer.layer == number:
            return
        # One thread reads, in this order: a read that is still going on, or has failed, is nobody's any more.
        buffer.layer = number
        buffer.reading = self._reader.submit(self._read, buffer, *self._places[number])

    def take(self, number: int) -> Tensor:
        self.ahead(number)
        buffer = self._buffers[number % BUFFERS]
        assert buffer.reading is not None
        try:
            buffer.reading.result()
        except OSError as problem:
            raise StorageError(
                "QH-S11",
                f"The packed layers could not be read again below {self._folder}.",
                cause=str(problem),
                fix="Check the disk, then run the command again.",
            ) from problem
        return buffer.memory[: self._places[number][1]]

    def lent(self, number: int, copy: Copy) -> None:
        self._buffers[number % BUFFERS].copying = copy

    def _read(self, buffer: _Buffer, start: int, size: int) -> None:
        if buffer.copying is not None:
            buffer.copying.synchronize()
            buffer.copying = None
        target = buffer.memory.numpy().data[:size]
        self._file.seek(start)
        while target:
            read = self._file.readinto(target)
            if not read:
                raise OSError(f"{len(target)} bytes are missing")
            target = target[read:]


def resting_place(choice: str, needed: int, device: torch.device, ranks: int = 1) -> LayersAtRest:
    """Where `needed` bytes of layers rest: as `backend.options` says, and where that is `auto` on the disk if the
    host's memory does not have them left for each of its `ranks`, which all ask at the same time."""
    if choice == HOST:
        return HostLayers(device)
    if choice == DISK:
        return DiskLayers(device, cache_folder(), f"as backend.options.{OFFLOADED_LAYERS} says")
    available = memory_available_here()
    if ranks * needed <= available * (1 - HOST_SPARED):
        return HostLayers(device)
    each = f" for each of {ranks} ranks" if ranks > 1 else ""
    why = f"because they take {in_words(needed)}{each} and the host has {in_words(available)} left"
    return DiskLayers(device, cache_folder(), why)


def idle_note(choice: str) -> str:
    """What is said of the option where no layer is offloaded, or ""."""
    if choice == AUTO:
        return ""
    return f"backend.options.{OFFLOADED_LAYERS} has no effect: training.base_offload leaves the layers on the device"
