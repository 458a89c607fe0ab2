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

RANK, WORLD_SIZE, LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
MLX_RANK, MLX_HOSTS = "MLX_RANK", "MLX_HOSTFILE"


def world_here(environment: Mapping[str, str] | None = None) -> World:
    """The share of this process: `World()` where nothing started several. Raises BackendError QH-R04 for variables that
    contradict one another, or of which one is there alone and says more than one process."""
    given = os.environ if environment is None else environment
    if RANK in given and WORLD_SIZE in given:
        rank, size = _number(given, RANK), _number(given, WORLD_SIZE)
        local = _number(given, LOCAL_RANK) if LOCAL_RANK in given else rank
    elif MLX_RANK in given and MLX_HOSTS in given:
        rank = local = _number(given, MLX_RANK)
        size = _hosts_in(given[MLX_HOSTS])
    else:
        for name, alone in ((RANK, 0), (WORLD_SIZE, 1)):
            if name in given and _number(given, name) != alone:
                raise _contradiction(f"{name}={given[name]} stands alone")
        return World()
    if not 0 <= rank < size or local < 0:
        raise _contradiction(f"{RANK}={rank} and {WORLD_SIZE}={size}")
    return World(rank, size, local)


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
    that is made (31 bits) from what torchrun gave to all of them, its run id and its meeting place."""
    if given is not None:
        return given
    known = os.environ if environment is None else environment
    meeting = "/".join(known.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", MLX_HOSTS))
    return int.from_bytes(hashlib.sha256(meeting.encode()).digest()[:4], "big") >> 1


def named(world: World) -> str:
    """`rank 3 on HOST`, for messages."""
    return f"rank {world.rank} on {socket.gethostname()}"


def _started(process: int) -> str:
    """When a process began, in the system's ticks: a number of a process alone comes again. Linux; else empty."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _hosts_in(file: str) -> int:
    """How many MLX starts, by its file of hosts."""
    try:
        hosts = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _contradiction(f"{MLX_HOSTS}={file!r} cannot be read ({error})") from error
    if not isinstance(hosts, list):
        raise _contradiction(f"{MLX_HOSTS}={file!r} holds no list of hosts")
    return len(hosts)


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
        cause="torchrun sets RANK, WORLD_SIZE and LOCAL_RANK for each process; a shell may have kept some of them.",
        fix="Start the ranks with torchrun or --devices, or unset these variables.",
    )
