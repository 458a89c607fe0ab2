"""In a process of its own: two steps on a drawn model, by `run_new` as any run, and what they took.

python -m qlora_hal.run.memory_probe_child REQUEST.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_hal.config.resolve import resolve_settings
from qlora_hal.errors import QloraHalError
from qlora_hal.hooks import hookimpl
from qlora_hal.processes.subprocess_call import answer_stream
from qlora_hal.report.console import RunConsole
from qlora_hal.run.start import run_new


class _HostMemory:
    """What this process holds, as Linux tells it; empty elsewhere."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    @hookimpl
    def qlora_hal_run_started(self) -> None:
        """The model is loaded: the peak so far is that of loading, and counts anew."""
        with suppress(OSError, StopIteration):
            self.found = {"loading": _status("VmHWM:"), "resident": _status("VmRSS:")}
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measured(request: Mapping[str, Any]) -> dict[str, object]:
    """`{"peak", "loading", "resident"}` in bytes, or `{"error"}`."""
    memory = _HostMemory()
    settings = resolve_settings(request["config"], environ={})
    rows = [{"text": request["text"]}] * int(request["rows"])
    try:
        result = run_new(
            settings,
            rows,
            [memory] if request["on_host"] else [],
            overwrite=False,
            force_unlock=False,
            dry_run=False,
            verify=False,
            console=RunConsole(quiet=True, silent=True),
        )
    except QloraHalError as error:
        return {"error": f"[{error.code}] {error.message}"}
    if result.peak_memory_bytes is None:
        return {"error": "the backend does not tell its peak"}
    return {"peak": result.peak_memory_bytes, **memory.found}


if __name__ == "__main__":
    with answer_stream() as stream:
        json.dump(measured(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), stream)
