"""What doctor finds: a verdict with one fix; and the checks of disk and memory that need no backend."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from qlora_hal.detect.mac_memory import REMEDY
from qlora_hal.errors import figures

FREE_DISK_BYTES = 5 * 2**30
FREE_MEMORY_BYTES = 2 * 2**30


class Verdict(StrEnum):
    """How a check ended. ABSENT: the hardware or the package is not there, which is no fault."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of doctor."""

    name: str
    verdict: Verdict
    text: str
    fix: str = ""
    details: tuple[str, ...] = ()
    is_backend: bool = False

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "verdict": self.verdict.value,
            "text": self.text,
            "fix": self.fix,
            "details": list(self.details),
        }


def storage_finding(folder: Path) -> Finding:
    """Flush a file, rename it, flush the folder, read it back: what every checkpoint relies on."""
    from qlora_hal.files.durable import flush_folder, unique_name, write_new

    content = os.urandom(4096)
    first, second = (folder / f".tmp-doctor-{unique_name()}" for _ in range(2))
    try:
        write_new(first, [content])
        os.replace(first, second)
        flush_folder(folder)
        whole = second.read_bytes() == content
    except OSError as error:
        text = f"{folder.resolve()} cannot be written safely: {error.strerror or error}"
        return Finding("storage", Verdict.FAIL, text, "Choose an output_dir on a local disk that you may write to.")
    finally:
        for remainder in (first, second):
            with suppress(OSError):
                remainder.unlink()
    if not whole:
        text = f"{folder.resolve()} returned different bytes than were written"
        return Finding("storage", Verdict.FAIL, text, "Choose an output_dir on another disk.")
    return Finding("storage", Verdict.PASS, f"flush and rename work in {folder.resolve()}")


def disk_finding(folder: Path) -> Finding:
    """Room for checkpoints."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("disk", Verdict.FAIL, f"{folder}: {error.strerror or error}", "Name a folder that exists.")
    verdict = Verdict.PASS if free >= FREE_DISK_BYTES else Verdict.WARN
    return Finding("disk", verdict, f"{figures.size(free)} free", "Free space, or choose another disk.")


def memory_finding(available: int | None, pressure: str = "") -> Finding:
    """Room in the machine's own memory, which loading passes through; `pressure` is what a Mac says of it."""
    if pressure:
        return Finding("memory", Verdict.WARN, f"{figures.size(available)} available; {pressure}", REMEDY)
    if available is None:
        return Finding("memory", Verdict.WARN, "the system does not say how much is available")
    verdict = Verdict.PASS if available >= FREE_MEMORY_BYTES else Verdict.WARN
    return Finding("memory", verdict, f"{figures.size(available)} available", "Close other programs.")
