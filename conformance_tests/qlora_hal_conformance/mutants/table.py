"""The table of mutants: what each does wrong, which bug it re-creates, and which case catches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .registry import Mutant
from .run_mutants import Hunt

HEADING = """# Mutants

Backends that are wrong in one place. Each is the NumPy reference backend with one room changed
(`conformance_tests/qlora_hal_conformance/mutants/`), and each must fail in one of the sections named here, in none
before them. A mutant that no section catches is a hole in the suite. This file is written by
`python -m qlora_hal_conformance.mutants --out docs/mutants.md`.

"Re-creates" names the public thread of the bug; a dash is a slip that every author can make.

| mutant | what is wrong | re-creates | sections | caught by |
| --- | --- | --- | --- | --- |
"""


def write_table(path: Path, mutants: Sequence[Mutant], hunts: Mapping[str, Hunt]) -> None:
    """Write the whole table; the sections after it, which are other commands', stay. A mutant that was not hunted keeps
    its row, if it has one."""
    table, *others = _sections(path)
    kept = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    rows = [row(m, hunts[m.name]) if m.name in hunts else kept.get(m.name, "") for m in mutants]
    table = HEADING + "\n".join(filter(None, rows)) + "\n"
    path.write_text(_SECTION.join([table, *others]), encoding="utf-8")


_SECTION = "\n## "


def put_section(path: Path, title: str, text: str) -> None:
    """Write one section of the document, in the place of an earlier one of this title, else at the end."""
    written = f"{title}\n\n{text.strip()}\n"
    table, *others = _sections(path)
    titles = [other.partition("\n")[0] for other in others]
    if title in titles:
        others[titles.index(title)] = written
    else:
        others.append(written)
    path.write_text(_SECTION.join([table, *others]), encoding="utf-8")


def _sections(path: Path) -> list[str]:
    """The table, then each section without its mark."""
    return path.read_text(encoding="utf-8").split(_SECTION) if path.is_file() else [HEADING]


def row(mutant: Mutant, found: Hunt) -> str:
    """One mutant as a row."""
    return f"{about(mutant)} {f'`{found.caught_by[0]}`' if found.caught_by else '**nothing**'} |"


def rows_of_registry(mutants: Sequence[Mutant]) -> list[str]:
    """What each row starts with, whatever a run found: a document that lacks one of them is out of date."""
    return [about(mutant) for mutant in mutants]


def about(mutant: Mutant) -> str:
    cells = (f"`{mutant.name}`", mutant.defect, mutant.recreates or "-", ", ".join(mutant.caught_by))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
