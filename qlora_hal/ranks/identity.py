"""Which rank this process is, by what torchrun or `mlx.launch` put into its environment."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from qlora_hal.contract.world import World
from qlora_hal.errors import BackendError

RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
MLX_RANK, MLX_HOSTS, MLX_RDMA_DEVICES, MLX_SIZE = "MLX_RANK", "MLX_HOSTFILE", "MLX_IBV_DEVICES", "MLX_WORLD_SIZE"
"""What `mlx.launch` sets: the rank, and of all ranks the addresses in a file (`ring`), the Thunderbolt devices in a
file (`jaccl`), or the number (`nccl`)."""


def world_here(environment: Mapping[str, str] | None = None) -> World:
    """The share of this process: `World()` where nothing started several. Raises BackendError QH-R04 for variables that
    contradict one another, or of which one is there alone and says more than one process."""
    given = os.environ if environment is None else environment
    if RANK in given and WORLD_SIZE in given:
        rank, size = _number(given, RANK), _number(given, WORLD_SIZE)
        local = _number(given, LOCAL_RANK) if LOCAL_RANK in given else rank
        here = _number(given, LOCAL_SIZE) if LOCAL_SIZE in given else None
    elif MLX_RANK in given:
        rank = _number(given, MLX_RANK)
        size, local, here = _of_mlx(given, rank)
    else:
        for name, alone in ((RANK, 0), (WORLD_SIZE, 1)):
            if name in given and _number(given, name) != alone:
                raise _contradiction(f"{name}={given[name]} stands alone")
        return World()
    if not 0 <= rank < size or local < 0:
        raise _contradiction(f"rank {rank} of {size}")
    if here is not None and not 1 <= here <= size:
        raise _contradiction(f"{here} of {size} ranks on this host")
    return World(rank, size, local, here)


def is_following(environment: Mapping[str, str] | None = None) -> bool:
    """Whether another rank writes and speaks for this one; not where the environment contradicts itself."""
    try:
        return world_here(environment).rank > 0
    except BackendError:
        return False


def rank_here() -> str:
    """`rank 3 on HOST: `, before what a rank behind the first has to say; empty elsewhere."""
    return f"{named(world_here())}: " if is_following() else ""


def launch_here(environment: Mapping[str, str] | None = None) -> str:
    """What is the same for every start of the ranks by one torchrun, and for no other torchrun: its run id; where that
    is not unique, the process of its agent. Empty where nothing starts ranks anew."""
    given = os.environ if environment is None else environment
    if RESTARTS not in given:
        return ""
    run_id = given.get("TORCHELASTIC_RUN_ID", "")
    if run_id not in ("", "none"):  # torchrun's default
        return run_id
    return f"{socket.gethostname()}/{os.getppid()}/{_started(os.getppid())}"


def is_restart(environment: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun started this process anew after a failure."""
    given = os.environ if environment is None else environment
    return given.get(RESTARTS, "0") not in ("", "0")


def may_be_restart(environment: Mapping[str, str] | None = None) -> bool:
    """Whether it cannot be told: torchrun counts the starts of one machine, and another may have failed."""
    given = os.environ if environment is None else environment
    return bool(launch_here(given)) and given.get("GROUP_WORLD_SIZE", "1") != "1"


def seed_of_ranks(given: int | None, environment: Mapping[str, str] | None = None) -> int:
    """The seed of a run of several ranks, which must be one before they can talk: the one that was set, or else one
    that is made (31 bits) from what torchrun gave to all of them, its run id and its meeting place, or `mlx.launch`,
    their addresses."""
    if given is not None:
        return given
    known = os.environ if environment is None else environment
    meeting = [known.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")]
    if not any(meeting):  # the file itself has another name on each rank
        meeting = [json.dumps(_told_by_mlx(known, name)) for name in (MLX_HOSTS, MLX_RDMA_DEVICES)]
    return int.from_bytes(hashlib.sha256("/".join(meeting).encode()).digest()[:4], "big") >> 1


def named(world: World) -> str:
    """`rank 3 on HOST`, for messages."""
    return f"rank {world.rank} on {socket.gethostname()}"


def _of_mlx(given: Mapping[str, str], rank: int) -> tuple[int, int, int | None]:
    """(how many ranks, which one of its host, how many that has, None where nothing tells)."""
    if MLX_SIZE in given:
        return _number(given, MLX_SIZE), 0, None  # each rank is shown its own GPU alone
    if ring := _told_by_mlx(given, MLX_HOSTS):
        hosts = [str(addresses[0]).rpartition(":")[0] for addresses in ring]
        mine = hosts[min(rank, len(hosts) - 1)]
        return len(hosts), hosts[:rank].count(mine), hosts.count(mine)
    return len(_told_by_mlx(given, MLX_RDMA_DEVICES)) or 1, 0, None


def _told_by_mlx(given: Mapping[str, str], name: str) -> list[list[object]]:
    """What such a file tells of each rank; nothing where it is empty, as `mlx.launch` leaves it for one host."""
    if name not in given:
        return []
    try:
        told = json.loads(Path(given[name]).read_text(encoding="utf-8").strip() or "[]")
    except (OSError, ValueError) as error:
        raise _contradiction(f"{name}={given[name]} cannot be read ({error})") from error
    if not isinstance(told, list) or not all(isinstance(entry, list) and entry for entry in told):
        raise _contradiction(f"{name}={given[name]} is no list of lists")
    return told


def _started(process: int) -> str:
    """When a process began, in the system's ticks: a number of a process alone comes again. Linux; else empty."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError as error:
        raise _contradiction(f"{name}={environment[name]!r}") from error


def _contradiction(what: str) -> BackendError:
    return BackendError(
        "QH-R04",
        f"The environment names no rank: {what}.",
        where="environment",
        cause="torchrun sets RANK, WORLD_SIZE and LOCAL_RANK for each process that it starts, mlx.launch MLX_RANK and "
        "MLX_HOSTFILE.",
        fix="Start the ranks with torchrun, mlx.launch or --devices, or unset these variables.",
    )
