"""Several torch processes as one trainer: torch.distributed's process group, and what a step asks of it.

Gradients cross on the device (NCCL, RCCL; gloo on a CPU). Votes cross on the host over gloo, so that no rank waits for
its device to be told what the others found, and so that a rank that has died is noticed: gloo's connections break with
the process, while a kernel of NCCL waits for it.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from qlora_hal.contract.values import Float64
from qlora_hal.contract.world import World
from qlora_hal.errors import BackendError, ConfigError, OutOfMemoryError
from qlora_hal.errors.foreign import told
from qlora_hal_backends.torch_family.device import has_queue

DEVICE_COLLECTIVES = "nccl"
"""RCCL answers to this name as well."""
NO_MULTICAST = "NCCL_NVLS_ENABLE"
"""NVLink multicast adds in the switch, in an order of its own and not on every machine; sums are the same without."""

STARTS = "TORCHELASTIC_RESTART_COUNT"
"""torchrun keeps one store through all starts of its ranks, with what the earlier ones left there: addresses that
nobody listens at (pytorch issue 135712). Each start has its own part of it. The count is each machine's own."""
SHARED_STORE, MACHINES = "TORCHELASTIC_USE_AGENT_STORE", "GROUP_WORLD_SIZE"

HANGS_FROM = 0.9
"""A collective that fails after this share of the time limit waited for a rank that hangs; a dead one is noticed at
once."""


@dataclass(slots=True)
class Ranks:
    """This process among `world.size`. One process is `Ranks()`, whose sums are what they are given."""

    world: World = field(default_factory=World)
    collectives: str = ""
    timeout_seconds: float = 0.0
    seconds: float = 0.0
    """Of this process in collectives since it joined: transfer, and waiting for slower ranks. Where the device has a
    queue, the host's part alone: votes, and what it takes to queue the sums of gradients."""
    _votes: int = 0

    @property
    def are_several(self) -> bool:
        return self.world.size > 1

    @classmethod
    def join(cls, world: World, device: torch.device, timeout_seconds: float) -> Ranks:
        """Meet the others, where torchrun said. Raises BackendError QH-R04."""
        if world.size == 1:
            return cls(world)
        if has_queue(device):
            os.environ.setdefault(NO_MULTICAST, "0")
        if not dist.is_initialized():
            _refuse_stale_meeting(world)
            limit = datetime.timedelta(seconds=timeout_seconds)
            try:
                store, rank, size = next(rendezvous("env://", timeout=limit))
                store.set_timeout(limit)
                dist.init_process_group(
                    f"cpu:gloo,{device.type}:{DEVICE_COLLECTIVES}" if has_queue(device) else "gloo",
                    store=PrefixStore(_part_of_store(), store),
                    rank=rank,
                    world_size=size,
                    timeout=limit,
                    device_id=device if has_queue(device) else None,
                )
            except (RuntimeError, ValueError) as error:
                if _is_of_the_library(error):
                    raise _library_failed(error, world) from error
                raise _not_met(error, world, timeout_seconds) from error
        with suppress(RuntimeError, ValueError):  # a word for messages
            _store().set(f"qlora_hal/host/{world.rank}", socket.gethostname())
        return cls(world, f"{DEVICE_COLLECTIVES}, votes over gloo" if has_queue(device) else "gloo", timeout_seconds)

    def leave(self) -> None:
        """End the process group; safe where there is none."""
        if self.are_several and dist.is_initialized():
            with suppress(RuntimeError):  # the others may be gone already
                dist.destroy_process_group()

    def sum_on_host(self, values: Float64) -> Float64:
        """The sum over all ranks, float64 `[n]`. Raises BackendError QH-R02."""
        if not self.are_several:
            return values
        summed = torch.from_numpy(np.array(values, dtype=np.float64))
        with self._others_present():
            dist.all_reduce(summed)
        return summed.numpy()

    def sum_on_device(self, tensor: Tensor) -> None:
        """Put the sum over all ranks in the place of `tensor`. Raises BackendError QH-R02, QH-R07."""
        if not self.are_several:
            return
        with self._others_present():
            if tensor.device.type in ("cpu", "cuda", "xpu"):
                dist.all_reduce(tensor)
            else:
                on_host = tensor.cpu()
                dist.all_reduce(on_host)
                tensor.copy_(on_host)

    def of_each(self, value: float) -> list[float]:
        """The number that each rank gives. Raises BackendError QH-R02."""
        table = np.zeros(self.world.size)
        table[self.world.rank] = value
        return [float(found) for found in self.sum_on_host(table)]

    def agree(self, out_of_memory: OutOfMemoryError | None) -> None:
        """Nothing where no rank ran out of memory. Raises OutOfMemoryError on all ranks where one did: its own there,
        and elsewhere one that names it."""
        if not self.are_several:
            if out_of_memory is not None:
                raise out_of_memory
            return
        short = [rank for rank, is_short in enumerate(self.of_each(out_of_memory is not None)) if is_short]
        if not short:
            return
        if out_of_memory is not None:
            raise out_of_memory
        raise OutOfMemoryError(
            "QH-N07",
            f"Rank {', '.join(map(str, short))} of {self.world.size} ran out of memory in a training step.",
            fix="Lower training.per_device_train_batch_size or data.max_seq_length.",
            context={"ranks": short},
        )

    @contextmanager
    def _others_present(self) -> Iterator[None]:
        """Before each meeting a rank writes down how far it is, so that one that does not come can be named."""
        self._votes += 1
        began = time.perf_counter()
        try:
            with suppress(RuntimeError):
                _store().set(f"qlora_hal/{self.world.rank}", str(self._votes))
            yield
        except RuntimeError as error:
            self.failed(error, time.perf_counter() - began)
        finally:
            self.seconds += time.perf_counter() - began

    def failed(self, error: BaseException, waited: float) -> NoReturn:
        """Raises, of what a collective raised after so many seconds, BackendError QH-R02 or QH-R07."""
        if _is_of_the_library(error):
            raise _library_failed(error, self.world) from error
        self._lost(error, waited)

    def _lost(self, error: BaseException, waited: float) -> NoReturn:
        behind = self._behind()
        hung = {"waited_seconds": round(waited, 1)} if waited >= HANGS_FROM * self.timeout_seconds else {}
        who = f"rank {', '.join(map(str, behind))} of {self.world.size}" if behind else "another rank"
        raise BackendError(
            "QH-R02",
            f"{who[0].upper()}{who[1:]} is gone or does not answer."
            + (f" It was waited for {waited:.0f} s (parallel.timeout_seconds)." if hung else ""),
            where="; ".join(f"rank {rank} on {self._host_of(rank)}" for rank in behind),
            cause=told(error),
            fix="See what that rank said, then go on with qlora-hal resume; torchrun --max-restarts does so by itself.",
            context={"ranks": behind, **hung},
        ) from error

    def _host_of(self, rank: int) -> str:
        with suppress(RuntimeError):
            key = f"qlora_hal/host/{rank}"
            if _store().check([key]):
                return str(_store().get(key).decode("utf-8", "replace"))
        return "an unknown host"

    def _behind(self) -> list[int]:
        """The ranks that have not come as far as this one."""
        with suppress(RuntimeError, ValueError):
            store, reached = _store(), {}
            for rank in range(self.world.size):
                key = f"qlora_hal/{rank}"
                reached[rank] = int(store.get(key)) if store.check([key]) else 0
            return [rank for rank, votes in reached.items() if votes < self._votes]
        return []


def device_of_rank(device: torch.device, world: World) -> torch.device:
    """The device of this rank on its host. Raises ConfigError QH-R01 where there are fewer."""
    if world.size == 1 or not has_queue(device):
        return device
    module = torch.get_device_module(device)
    there = module.device_count()
    if world.local_rank >= there:
        raise ConfigError(
            "QH-R01",
            f"Rank {world.rank} needs {device.type} device {world.local_rank} of this machine, which has {there}.",
            where="--devices",
            fix=f"Ask for {there} device{'' if there == 1 else 's'}, or see what hides the others.",
        )
    chosen = torch.device(device.type, world.local_rank)
    module.set_device(chosen)
    return chosen


def most_ranks_here(world: World, device: torch.device) -> int:
    """How many ranks this host may have: no more than devices, where each has one to itself."""
    if not has_queue(device):
        return world.most_on_host
    return min(world.most_on_host, int(torch.get_device_module(device).device_count()))


_LIBRARY = ("nccl", "rccl")
_LOST_PEER = (
    *("remote process exit", "ncclremoteerror", "connection reset", "connection closed", "broken pipe"),
    *("aborted", "timeout", "timed out"),
)
"""How NCCL words that another rank is gone; all else that it says is of itself."""


def _is_of_the_library(error: BaseException) -> bool:
    """Whether the collective library failed by itself, and not because another rank is gone."""
    words = str(error).lower()
    return any(name in words for name in _LIBRARY) and not any(lost in words for lost in _LOST_PEER)


def _library_failed(error: BaseException, world: World) -> BackendError:
    return BackendError(
        "QH-R07",
        f"The collective library failed on rank {world.rank} of {world.size} ({socket.gethostname()}).",
        cause=told(error),
        fix="Run once more with NCCL_DEBUG=WARN in the environment and read what it prints of this rank.",
        context={"rank": world.rank},
    )


def _part_of_store() -> str:
    """Of one machine the number of the start; several machines count otherwise, and have a new store each time."""
    given = os.environ
    return f"start-{given.get(STARTS, '0') if given.get(MACHINES, '1') == '1' else 'of-several-machines'}"


def _refuse_stale_meeting(world: World) -> None:
    """Raises BackendError QH-R04 where ranks of several machines start anew in a store that keeps what is gone."""
    given = os.environ
    if given.get(STARTS, "0") in ("", "0") or given.get(SHARED_STORE) != "True" or given.get(MACHINES, "1") == "1":
        return
    raise BackendError(
        "QH-R04",
        f"Rank {world.rank} of {world.size} was started anew, but would meet the ranks that are gone.",
        cause="torchrun keeps the addresses of an earlier start, and counts starts on each machine by itself.",
        fix="Start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of every machine.",
    )


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _not_met(error: Exception, world: World, timeout_seconds: float) -> BackendError:
    place = f"{os.environ.get('MASTER_ADDR', 'nowhere')}:{os.environ.get('MASTER_PORT', '')}"
    return BackendError(
        "QH-R04",
        f"Rank {world.rank} of {world.size} did not meet the others at {place} within {timeout_seconds:g} s.",
        cause=told(error),
        fix="Start all ranks with one torchrun command each, and let no other program use that port.",
    )
