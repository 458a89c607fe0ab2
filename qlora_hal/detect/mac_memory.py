"""Memory pressure of a Mac: where it is not normal, the system compresses, swaps, and at last ends processes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from qlora_hal.detect.machine_facts import LiveFacts, MachineFacts

LEVEL_NAME = "kern.memorystatus_vm_pressure_level"
SWAP_NAME = "vm.swapusage"
REMEDY = "Close other programs before you train."

_LEVELS = {"2": "a warning", "4": "critical"}
"""What the kernel answers, in the words of libdispatch: DISPATCH_MEMORYPRESSURE_WARN and _CRITICAL; 1 is normal."""


def pressure(sysctl: Mapping[str, str]) -> str:
    """What `sysctl` says of memory pressure, "" where it is normal or not told.

    Swap alone is no pressure: macOS leaves on disk what nobody asks for.
    """
    level = _LEVELS.get(sysctl.get(LEVEL_NAME, "").strip())
    if level is None:
        return ""
    used = re.search(r"used = ([\d.]+)([KMG])", sysctl.get(SWAP_NAME, ""))
    swapped = f", {float(used[1]):.0f} {used[2]}iB are swapped out" if used and float(used[1]) else ""
    return f"macOS reports memory pressure ({level}){swapped}"


def pressure_note(facts: MachineFacts | None = None) -> str:
    """A sentence for who is about to load a model on a Mac under pressure, else "". Asks nothing on other systems."""
    facts = facts or LiveFacts()
    if facts.platform().system != "Darwin" or not (found := pressure(facts.sysctl())):
        return ""
    return f"{found}: a model that is swapped trains many times slower, or is killed by the system. {REMEDY}"
