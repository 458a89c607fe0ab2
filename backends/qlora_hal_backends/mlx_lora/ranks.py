"""Several MLX processes as one trainer: MLX's own collectives (`mx.distributed`), and what a step asks of them.

All collectives stand on one stream of their own, in the order in which they were asked for, which is the same on every
rank: two streams would take turns on the same sockets in an order that only chance knows. The votes of a step are
queued behind the reduction of the one before it, and the device computes meanwhile.

A ring tells of a rank that has died (its connections break), and waits for ever for one that hangs; so whoever waits
for the others waits for so many seconds only.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

from qlora_hal.contract.toolkit import WindowCount
from qlora_hal.contract.values import Float64
from qlora_hal.contract.world import World
from qlora_hal.errors import BackendError, ConfigError, OutOfMemoryError
from qlora_hal.errors.foreign import told
from qlora_hal.ranks.identity import MLX_HOSTS, MLX_RDMA_DEVICES, MLX_SIZE
from qlora_hal_backends.mlx_lora.device import is_cpu
from qlora_hal_backends.mlx_lora.optimizer import Arrays, queue

COLLECTIVES = {MLX_HOSTS: "ring", MLX_SIZE: "nccl", MLX_RDMA_DEVICES: "jaccl"}
"""Which of MLX's collectives `mlx.launch` prepared, by the variable that it sets for them."""
_LOST = tuple(f"[{name}]" for name in COLLECTIVES.values())
"""How MLX begins what it says of a connection; its exceptions have no class of their own."""


@dataclass(slots=True)
class Ranks:
    """This process among `world.size`. One process is `Ranks()`, whose sums are what they are given."""

    world: World = field(default_factory=World)
    timeout_seconds: float = 0.0
    collectives: str = ""
    seconds: float = 0.0
    """How long this process has waited for others since it joined."""
    _group: Any = None
    _stream: Any = None
    _own_work: mx.array | None = None
    _waiting: threading.Thread | None = None

    @property
    def are_several(self) -> bool:
        return self.world.size > 1

    @classmethod
    def join(cls, world: World, timeout_seconds: float) -> Ranks:
        """Meet the others, where `mlx.launch` said. Raises BackendError QH-R04."""
        if world.size == 1:
            return cls(world)
        name = next((name for variable, name in COLLECTIVES.items() if os.environ.get(variable)), "")
        if not name:
            raise _not_met(world, timeout_seconds, "the environment names none of MLX's meeting places")
        group = _met(world, name, timeout_seconds)
        if (found := (group.rank(), group.size())) != (world.rank, world.size):
            raise _not_met(world, timeout_seconds, f"MLX calls it rank {found[0]} of {found[1]}")
        # NCCL's collectives are kernels of the GPU; all others copy on the host.
        stream = mx.new_thread_unsafe_stream(mx.gpu if name == "nccl" else mx.cpu)
        ranks = cls(world, timeout_seconds, f"MLX {name}", _group=group, _stream=stream)
        atexit.register(ranks._leave)
        return ranks

    def sum_on_host(self, values: Float64) -> Float64:
        """The sum over all ranks, float64 `[n]`. Raises BackendError QH-R02.

        MLX has no float64 on a GPU: the bits cross as integers, and every rank adds them in the order of the ranks.
        """
        return self._of_each(values).sum(axis=0) if self.are_several else values

    def of_all(
        self, own_gradient: Callable[[], tuple[Arrays, mx.array]], own: WindowCount
    ) -> tuple[Arrays, mx.array, WindowCount]:
        """(gradients, [loss sum, weighted], what counts) of the window of all ranks, queued, from what gives this
        rank's part. Raises OutOfMemoryError on all ranks where one ran out: its own there, and elsewhere one that names
        it; BackendError QH-R02."""
        if not self.are_several:
            return *own_gradient(), own
        found: tuple[Arrays, mx.array] | OutOfMemoryError
        try:
            found = own_gradient()
        except OutOfMemoryError as problem:
            found = problem
        ran_out = isinstance(found, OutOfMemoryError)
        counts = self._of_each(np.array([ran_out, own.tokens, own.has_weights], np.float64))
        if isinstance(found, OutOfMemoryError):
            raise found
        if counts[:, 0].any():
            raise _out_of_memory(np.flatnonzero(counts[:, 0]).tolist(), self.world)
        _, tokens, weighted = counts.sum(axis=0)
        *gradients, total = self._summed([*found[0], found[1]])
        return gradients, total, WindowCount(int(tokens), bool(weighted))

    def wait_for(self, *arrays: mx.array) -> None:
        """Until these are computed, of which other ranks may have a part. The time counts from when this rank has done
        its own. Raises BackendError QH-R02."""
        if not self.are_several:
            return
        if self._own_work is not None:
            mx.eval(self._own_work)
        raised: list[Exception] = []

        def wait() -> None:
            try:
                mx.eval(*arrays)
            except Exception as error:
                raised.append(error)

        began = time.perf_counter()
        self._waiting = threading.Thread(target=wait, name="other ranks", daemon=True)
        self._waiting.start()
        self._waiting.join(self.timeout_seconds)
        self.seconds += time.perf_counter() - began
        if self._waiting.is_alive():
            raise _lost(self.world, f"Nothing came within {self.timeout_seconds:g} s.")
        if raised:
            with self.others_present():
                raise raised[0]

    @contextmanager
    def others_present(self) -> Iterator[None]:
        """What MLX says of a lost connection becomes BackendError QH-R02."""
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith(_LOST):
                raise
            raise _lost(self.world, told(error)) from error

    def _leave(self) -> None:
        """MLX aborts a process that ends while a collective still waits; by now all else that had to be done is."""
        if self._waiting is not None and self._waiting.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(BackendError.exit_status)

    def _of_each(self, values: Float64) -> Float64:
        """The numbers of every rank `[size, n]`, bit for bit."""
        bits = mx.array(np.ascontiguousarray(values, np.float64).view(np.uint32))
        with self.others_present():
            gathered = mx.distributed.all_gather(bits, group=self._group, stream=self._stream)
            queue(gathered)
        self.wait_for(gathered)
        return np.array(gathered).view(np.float64).reshape(self.world.size, -1)

    def _summed(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Float32 sums over all ranks, in one reduction."""
        flat = mx.concatenate([array.reshape(-1) for array in arrays])
        queue(flat)
        summed = mx.distributed.all_sum(flat, group=self._group, stream=self._stream)
        queue(summed)
        self._own_work = flat
        ends = list(accumulate(array.size for array in arrays))
        return [part.reshape(a.shape) for part, a in zip(mx.split(summed, ends[:-1]), arrays, strict=True)]


def device_of_rank(world: World) -> None:
    """Compute on this rank's device of its host from here on. Raises ConfigError QH-R01 where there are fewer."""
    if world.size == 1 or is_cpu():
        return
    there = mx.device_count(mx.gpu)
    if world.local_rank >= there:
        raise ConfigError(
            "QH-R01",
            f"Rank {world.rank} needs GPU {world.local_rank} of this machine; MLX finds {there}.",
            where="--devices",
            fix=f"Start {there} rank{'' if there == 1 else 's'} on this machine.",
        )
    mx.set_default_device(mx.Device(mx.gpu, world.local_rank))


def _met(world: World, name: str, timeout_seconds: float) -> Any:
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            with _interrupted_after(deadline - time.monotonic()):
                return mx.distributed.init(strict=True, backend=name)
        except RuntimeError as error:
            # The last rank connects first, and MLX gives up after half a minute, whatever the others still prepare.
            is_first_to_call = world.rank == world.size - 1 and "connect" in str(error)
            if not is_first_to_call or time.monotonic() >= deadline:
                raise _not_met(world, timeout_seconds, told(error)) from error


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """MLX waits for a connection without end and without letting any other thread of Python work; a signal is all that
    makes it give up. Only the main thread can ask for one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, lambda number, frame: None)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, handler)


def _lost(world: World, cause: str) -> BackendError:
    others = [rank for rank in range(world.size) if rank != world.rank]
    who = f"Rank {others[0]} of {world.size}" if len(others) == 1 else "Another rank"
    return BackendError(
        "QH-R02",
        f"{who} is gone or does not answer.",
        cause=cause,
        fix="See what that rank said, then go on with qlora-hal resume.",
        context={"ranks": others if len(others) == 1 else []},
    )


def _out_of_memory(ranks: Sequence[int], world: World) -> OutOfMemoryError:
    return OutOfMemoryError(
        "QH-N07",
        f"Rank {', '.join(map(str, ranks))} of {world.size} ran out of memory in a training step.",
        fix="Lower training.per_device_train_batch_size or data.max_seq_length.",
        context={"ranks": list(ranks)},
    )


def _not_met(world: World, timeout_seconds: float, cause: str) -> BackendError:
    return BackendError(
        "QH-R04",
        f"Rank {world.rank} of {world.size} did not meet the others within {timeout_seconds:g} s.",
        cause=cause,
        fix="Start all ranks with one mlx.launch command or --devices, and let no other program use their ports.",
    )
