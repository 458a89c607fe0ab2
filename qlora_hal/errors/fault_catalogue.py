"""The fault catalogue: what each code means and what to do. `docs/faults.md` is generated from it.

The texts are in `fault_catalogue.toml`; `python -m qlora_hal.errors.fault_catalogue FILE` writes the page.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PREFIX = "QH-"

AREAS: Mapping[str, str] = {
    "S": "Process death and storage",
    "C": "Checkpoints and adapters",
    "N": "Numbers and the training loop",
    "D": "Data",
    "E": "Environment, hardware, plugins, network",
    "B": "Backends",
    "M": "Memory and models",
    "X": "Security",
    "U": "Usage",
    "R": "Ranks: several devices",
    "I": "Inside this tool",
}

EXIT_STATUSES: Mapping[int, str] = {
    0: "done, or the run continues",
    1: "a defect of this tool",
    2: "usage or configuration",
    3: "environment or backend",
    4: "data",
    5: "model or adapter does not fit",
    6: "numbers: not finite, or nothing was learned",
    7: "out of memory",
    8: "storage",
    9: "no valid checkpoint",
    10: "refused for safety",
    11: "network or hub",
    12: "output folder is locked",
    20: "conformance failures were found",
    75: "stopped with the state saved: can be resumed",
    129: "stopped by a closed terminal without a new save",
    130: "stopped from the keyboard without a new save",
    143: "stopped by a signal without a new save",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One row. `exit_status` is 0 where the run goes on."""

    code: str
    title: str
    happens: str
    why: str
    do: str
    exit_status: int

    @property
    def area(self) -> str:
        return self.code.removeprefix(PREFIX)[:1]


@cache
def faults() -> Mapping[str, Fault]:
    """Every row by its code (`QH-D05`), sorted by area and number."""
    rows = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    order = list(AREAS)
    found = [
        Fault(PREFIX + name, row["title"], row["happens"], row["why"], row["do"], row["exit"])
        for name, row in rows.items()
    ]
    return {fault.code: fault for fault in sorted(found, key=lambda f: (order.index(f.area), f.code))}


def find_fault(code: str) -> Fault | None:
    """The row of a code as people type it: `QH-D05`, `qh-d05`, `D05`."""
    name = code.strip().upper()
    return faults().get(name if name.startswith(PREFIX) else PREFIX + name)


def as_markdown() -> str:
    """The page `docs/faults.md`."""
    lines = [
        "# Fault catalogue",
        "",
        "Generated from `qlora_hal/errors/fault_catalogue.toml` by",
        "`python -m qlora_hal.errors.fault_catalogue docs/faults.md`.",
        "`qlora-hal explain CODE` prints one row. A row says what the tool is meant to do; the tests that show it",
        'carry its id (`@pytest.mark.fault("D05")`).',
        "",
        "## Exit statuses",
        "",
        "| status | meaning |",
        "|---|---|",
        *(f"| {status} | {meaning} |" for status, meaning in EXIT_STATUSES.items()),
    ]
    for letter, area in AREAS.items():
        rows = [fault for fault in faults().values() if fault.area == letter]
        if rows:
            lines += ["", f"## {letter}: {area}", ""]
            lines += ["| code | case | what happens | why | what to do | exit |", "|---|---|---|---|---|---|"]
            lines += [_row(fault) for fault in rows]
    return "\n".join(lines) + "\n"


def _row(fault: Fault) -> str:
    cells = (fault.code, fault.title, fault.happens, fault.why, fault.do, str(fault.exit_status))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(as_markdown(), encoding="utf-8")
