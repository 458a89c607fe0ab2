"""The ranks of one machine, started and watched: `python -m ... RANKS MAX_RESTARTS MODULE FOLDER`.

`mlx.launch` starts them for several machines, and its variables are what is set here. Its own loop tells nobody with
what status a rank ended, hands on no signal, and knows no restart. How ranks failed is left as JSON,
`[[rank, how], ...]`, the first one first.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from qlora_hal.processes import child_process
from qlora_hal.processes.signals import handing_on, signals_to_handle
from qlora_hal.ranks.identity import MLX_HOSTS, MLX_RANK, MLX_SIZE, RANK, RESTARTS, WORLD_SIZE

FAILURES_FILE, HOSTS_FILE = "failures.json", "hosts.json"
HERE = "127.0.0.1"
SECONDS_TO_SAVE = 600
"""How long a rank that is asked to stop has to finish its step and to save."""
SECONDS_TO_END = 30
"""How long it has when another one failed: no step can be finished then."""
POLL_SECONDS = 0.1


def main(arguments: Sequence[str]) -> int:
    ranks, restarts, module, folder = int(arguments[0]), int(arguments[1]), arguments[2], Path(arguments[3])
    child_process.end_with_parent(child_process.ask_to_stop)
    failures: Mapping[int, str] = {}
    for attempt in range(restarts + 1):
        processes: list[subprocess.Popen[Any]] = []
        with _reserved_ports(ranks) as ports, ExitStack() as ended:
            with handing_on(partial(_hand_on, processes)) as asked:
                for environment in _environments(folder / HOSTS_FILE, ports, attempt):
                    if not _stops(asked):
                        processes.append(
                            child_process.start(child_process.module_command(module, str(folder)), env=environment)
                        )
                        ended.callback(child_process.ended, processes[-1])
                failures = _watched(processes, asked)
            if _stops(asked) or not failures:
                return 0  # the ranks have had their time to save, and have said how they ended
    (folder / FAILURES_FILE).write_text(json.dumps(list(failures.items())), encoding="utf-8")
    return 1


def _watched(ranks: Sequence[subprocess.Popen[Any]], asked: Set[int]) -> Mapping[int, str]:
    """Wait until all have ended: by themselves or, after a failure of one or when they were asked to stop, in the time
    there is. Returns how those failed that did so first."""
    failures: dict[int, str] = {}
    deadline = math.inf
    while running := [process for process in ranks if process.poll() is None]:
        if deadline == math.inf:
            if _stops(asked):
                deadline = time.monotonic() + SECONDS_TO_SAVE
            elif failures := _failures(ranks):
                deadline = time.monotonic() + SECONDS_TO_END
                _hand_on(running, signal.SIGTERM)
        elif time.monotonic() >= deadline:
            _hand_on(running, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return failures or _failures(ranks)


def _failures(ranks: Sequence[subprocess.Popen[Any]]) -> dict[int, str]:
    return {rank: _how(process.returncode) for rank, process in enumerate(ranks) if process.poll()}


def _how(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _stops(asked: Set[int]) -> bool:
    """Whether more than a save was asked for."""
    return bool(asked & set(signals_to_handle()))


def _hand_on(ranks: Sequence[subprocess.Popen[Any]], number: int) -> None:
    for process in ranks:
        process.send_signal(number)  # does nothing where it has ended


def _environments(hosts: Path, ports: Sequence[int], attempt: int) -> Iterator[dict[str, str]]:
    """What `mlx.launch` gives each rank, the ring's addresses put into `hosts`."""
    hosts.write_text(json.dumps([[f"{HERE}:{port}"] for port in ports]), encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if name not in (RANK, WORLD_SIZE, MLX_SIZE)}
    for rank in range(len(ports)):
        yield {**kept, MLX_RANK: str(rank), MLX_HOSTS: str(hosts), RESTARTS: str(attempt)}


@contextmanager
def _reserved_ports(number: int) -> Iterator[list[int]]:
    """Free ports of this machine that stay ours: MLX binds with SO_REUSEPORT, which lets it in beside us, but nobody
    who asks for any free port."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            each.bind((HERE, 0))
        yield [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
