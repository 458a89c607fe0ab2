"""Several processes of the reference backend as one trainer: rank 0 hears all and tells all, over plain sockets."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from qlora_hal.contract.values import Float64
from qlora_hal.contract.world import World
from qlora_hal.errors import BackendError

from .step import WindowResult

_LENGTH = struct.Struct("<Q")
_PAUSE_SECONDS = 0.02


@dataclass(slots=True)
class Ranks:
    """This process among `world.size`. One process is `Ranks()`."""

    world: World = field(default_factory=World)
    _links: list[socket.socket] = field(default_factory=list)

    @classmethod
    def join(cls, world: World, timeout_seconds: float) -> Ranks:
        """Meet the others at MASTER_ADDR:MASTER_PORT. Raises BackendError QH-R04."""
        if world.size == 1:
            return cls(world)
        place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        until = time.monotonic() + timeout_seconds
        try:
            links = _heard(place, world.size - 1, until) if world.rank == 0 else [_called(place, world.rank, until)]
        except OSError as error:
            raise BackendError(
                "QH-R04",
                f"Rank {world.rank} of {world.size} did not meet the others at {place[0]}:{place[1]}: {error}.",
                fix="Start all ranks together.",
            ) from error
        for link in links:
            link.settimeout(timeout_seconds)
        return cls(world, links)

    def of_each(self, given: bytes) -> list[bytes]:
        """What every rank gave, in their order. Raises BackendError QH-R02."""
        if self.world.size == 1:
            return [given]
        try:
            if self.world.rank:
                _send(self._links[0], given)
                return [_receive(self._links[0]) for _ in range(self.world.size)]
            found = [given, *map(_receive, self._links)]
            for link in self._links:
                for part in found:
                    _send(link, part)
            return found
        except OSError as error:
            raise BackendError("QH-R02", f"A rank is gone: {error}.", fix="See what that rank said.") from error

    def sum(self, values: Float64) -> Float64:
        """float64 `[n]`, added in the order of the ranks."""
        if self.world.size == 1:
            return values
        parts = [np.frombuffer(part, np.float64) for part in self.of_each(np.asarray(values, np.float64).tobytes())]
        total: Float64 = np.sum(parts, axis=0)
        return total.reshape(values.shape)

    def leave(self) -> None:
        """Safe where there is nobody."""
        while self._links:
            with suppress(OSError):
                self._links.pop().close()


@dataclass(frozen=True, slots=True, eq=False)
class WholeWindow:
    """What all ranks found together, the same on each: their sums, and the counted tokens of the whole window."""

    found: WindowResult
    tokens: int


OverRanks = Callable[[Ranks, WindowResult, int, float], WholeWindow]
"""(ranks, what this one found, its counted tokens, the denominator of the step) -> the whole."""
Votes = Callable[[Ranks, Float64], Float64]
Gather = Callable[[Ranks, bytes], list[bytes]]


def over_ranks(ranks: Ranks, own: WindowResult, tokens: int, denominator: float) -> WholeWindow:
    """Plain sums: every rank has divided by the denominator of the whole window already."""
    if ranks.world.size == 1:
        return WholeWindow(own, tokens)
    weighted = own.loss_sum if own.weighted_loss_sum is None else own.weighted_loss_sum
    figures = ranks.sum(np.array([own.loss_sum, tokens, weighted, own.weighted_loss_sum is not None]))
    found = WindowResult(float(figures[0]), summed(ranks, own.gradients), float(figures[2]) if figures[3] else None)
    return WholeWindow(found, int(figures[1]))


def summed(ranks: Ranks, tensors: Mapping[str, Float64]) -> dict[str, Float64]:
    """Named tensors, the same names on each rank, in one crossing."""
    flat = ranks.sum(np.concatenate([tensor.ravel() for tensor in tensors.values()]))
    ends = np.cumsum([tensor.size for tensor in tensors.values()])
    parts = np.split(flat, ends[:-1])
    return {name: part.reshape(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}


def with_gradients(whole: WholeWindow, gradients: dict[str, Float64]) -> WholeWindow:
    return replace(whole, found=replace(whole.found, gradients=gradients))


def votes(ranks: Ranks, values: Float64) -> Float64:
    return ranks.sum(values)


def gather(ranks: Ranks, part: bytes) -> list[bytes]:
    return ranks.of_each(part)


def _heard(place: tuple[str, int], others: int, until: float) -> list[socket.socket]:
    """The connections of ranks 1, 2, ... in this order."""
    with socket.create_server(place) as server:
        found: dict[int, socket.socket] = {}
        while len(found) < others:
            server.settimeout(max(until - time.monotonic(), _PAUSE_SECONDS))
            link, _ = server.accept()
            link.settimeout(max(until - time.monotonic(), _PAUSE_SECONDS))
            found[int.from_bytes(_receive(link), "big")] = link
    return [found[rank] for rank in sorted(found)]


def _called(place: tuple[str, int], rank: int, until: float) -> socket.socket:
    while True:
        try:
            link = socket.create_connection(place, timeout=max(until - time.monotonic(), _PAUSE_SECONDS))
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(_PAUSE_SECONDS)
        else:
            _send(link, rank.to_bytes(4, "big"))
            return link


def _send(link: socket.socket, given: bytes) -> None:
    link.sendall(_LENGTH.pack(len(given)) + given)


def _receive(link: socket.socket) -> bytes:
    [length] = _LENGTH.unpack(_exactly(link, _LENGTH.size))
    return _exactly(link, length)


def _exactly(link: socket.socket, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        part = link.recv(min(length - len(found), 1 << 20))
        if not part:
            raise ConnectionError("the connection ended")
        found += part
    return bytes(found)
