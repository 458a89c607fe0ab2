"""Copies between host and device that run beside the computation, and host memory that a device can copy from.

A device with a queue (`device.has_queue`) gets a second one for copies; elsewhere a copy is done when it was asked for,
so that a CPU runs the same schedule. Two orders are kept, and no others: a copy begins after all that was queued for
computing when it was asked for, and what is computed after `arrived` finds it done.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.device import has_queue

Copy = Any
"""A copy that was asked for: an event of the device, or None where it is done already."""


class CopyQueue:
    """Of one device and one direction of use; each user has its own, so that nobody waits for another's copies."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device) if has_queue(device) else None
        self._stream: Any = None if self._module is None else self._module.Stream(device)

    def copy(self, target: Tensor, source: Tensor) -> Copy:
        """Ask for `target.copy_(source)`. Both must stay as they are until the copy has `arrived`: the allocator knows
        nothing of this queue."""
        if self._module is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = self._module.Event()
            done.record(self._stream)
        return done

    def arrived(self, copy: Copy) -> None:
        """What is queued for computing from here on finds the copy done; the host does not wait."""
        if copy is not None:
            self._module.current_stream().wait_event(copy)

    def settle(self) -> None:
        """The host waits for all copies: what they read or write may go, whatever happened to the computation."""
        if self._stream is not None:
            self._stream.synchronize()


def host_memory(size: int, device: torch.device) -> Tensor:
    """So many bytes of the host, page-locked where the device copies from such memory without the host's help."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=has_queue(device))
