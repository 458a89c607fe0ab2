"""Where a run took place, without asking the backend."""

from __future__ import annotations

import os
import platform
from importlib import metadata

_PACKAGES = ("qlora-hal", "numpy", "pytest")


def machine_record() -> dict[str, object]:
    """Operating system, processor, interpreter, and the versions of what the suite itself is made of."""
    return {
        "system": platform.system(),
        "release": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
