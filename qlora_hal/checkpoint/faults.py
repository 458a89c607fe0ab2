"""Named places in the save path where a test can make the process die, the disk fill up or the bytes rot.

Nothing happens unless the environment holds `QLORA_HAL_FAULTS=name:action@n` (several separated by commas; `@n` is the
n-th pass through the point and defaults to 1). A test walks `FAULT_POINTS`, so a new phase of saving cannot be added
without being tried.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from pathlib import Path

from qlora_hal.errors import ConfigError

ENVIRONMENT_VARIABLE = "QLORA_HAL_FAULTS"

FAULT_POINTS: tuple[str, ...] = (
    "ckpt.before_first_write",
    "ckpt.inside_file_write",
    "ckpt.after_adapter_write",
    "ckpt.after_optimizer_write",
    "ckpt.after_state_write",
    "ckpt.after_manifest_write",
    "ckpt.before_rename",
    "ckpt.between_replacing_renames",
    "ckpt.after_rename",
    "ckpt.before_prune",
    "ckpt.inside_prune",
    "ckpt.after_prune",
)
"""Every point of the save path, in the order in which a save passes them."""

FILE_POINTS = frozenset(name for name in FAULT_POINTS if name.endswith("_write")) - {"ckpt.before_first_write"}
"""Points at which a file was just (partly) written, so that its bytes can be damaged."""

ACTIONS = ("kill", "raise", "enospc", "truncate", "bitflip")

_passes: Counter[str] = Counter()  # of this process, counted only while a fault is set


class InjectedFault(Exception):
    """Raised by the action `raise`; foreign on purpose, so that it passes for any unforeseen failure."""


def fault_point(name: str, file: Path | None = None) -> None:
    """Do what the environment asks for at this point, if anything. `file` is what was just written.

    Raises InjectedFault, OSError (ENOSPC), or ConfigError for a request that names no point or action.
    """
    requests = os.environ.get(ENVIRONMENT_VARIABLE)
    if not requests:
        return
    _passes[name] += 1
    for request in requests.split(","):
        point, action, number = _parsed(request)
        if point == name and number == _passes[name]:
            _act(name, action, file)


def forget_passes() -> None:
    """Count passes from zero again, for several injected faults in one process."""
    _passes.clear()


def _parsed(request: str) -> tuple[str, str, int]:
    point, _, rest = request.strip().partition(":")
    action, _, number = rest.partition("@")
    damages = action in ("truncate", "bitflip")
    known = point in FAULT_POINTS and action in ACTIONS and (number or "1").isdecimal()
    if not known or (damages and point not in FILE_POINTS):
        raise ConfigError(
            "QH-S52",
            f"{ENVIRONMENT_VARIABLE} holds {request!r}, name:action@n is expected with name one of "
            f"{', '.join(FAULT_POINTS)} and action one of {', '.join(ACTIONS)}.",
            cause="truncate and bitflip need a point at which a file was written.",
            fix=f"Correct {ENVIRONMENT_VARIABLE}, or unset it to train without injected faults.",
        )
    return point, action, int(number or "1")


def _act(name: str, action: str, file: Path | None) -> None:
    if action == "kill":
        # SIGKILL runs no handler and flushes nothing, like the kernel's out-of-memory killer.
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "raise":
        raise InjectedFault(name)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file or name))
    elif file is not None:
        with open(file, "r+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            if action == "truncate":
                stream.truncate(size // 2)
            else:
                stream.seek(size // 2)
                byte = stream.read(1)
                stream.seek(size // 2)
                stream.write(bytes([byte[0] ^ 1]))
