"""A hunt of generated mutants, written down as it goes, so that one that was broken off goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_hal_conformance.catalogue import all_cases, number_of, suite_hash
from qlora_hal_conformance.mutants.run_mutants import first_failure

from .drawing import Drawn, ReachedBy
from .private_copy import NOTING
from .reached import REACHED_VARIABLE, read_places
from .sources import MODULES, source_of

SECTIONS = tuple(sorted({number_of(case) for case in all_cases()} - {"10"}))
"""Section 10 judges what is known of a backend before it is imported, which no change touches."""

ASKED_FIRST: Mapping[str, tuple[str, ...]] = {
    "backend_dropout": ("43",),
    "loading": ("20", "70"),
    "refusals": ("11", "20", "70"),
    "rounding": ("30",),
    "step": ("31", "41", "45"),
    "storage": ("20",),
    "trainer": ("11", "40", "80"),
    "adamw": ("40",),
    "blocks": ("30", "31"),
    "codebooks": ("20",),
    "double_quantization": ("20",),
    "four_bit": ("20",),
    "int8": ("20",),
    "llama": ("30", "31"),
    "lora": ("30", "31"),
    "loss": ("31", "45"),
    "roundoff": ("30",),
    "shape": ("30",),
    "dropout": ("43",),
}
"""The sections about what a module does: most of its mutants end there. All others are asked after them."""


@dataclass(frozen=True, slots=True)
class Found:
    """What became of one change; `caught_by` is empty where nothing did."""

    mutant: str
    within: str
    was: str
    becomes: str
    caught_by: str
    reason: str
    seconds: float


class Journal:
    """Lines of JSON, each a thing that is done. A journal of another suite or other sources is begun anew."""

    def __init__(self, path: Path, *, suite_seed: int) -> None:
        self._path = path
        start = {"suite": suite_hash(), "changed": hash_of_sources(), "suite_seed": suite_seed}
        if not self._lines or self._lines[0] != start:
            path.unlink(missing_ok=True)
            self._add(start)

    @property
    def _lines(self) -> list[dict[str, object]]:
        if not self._path.exists():
            return []
        # A line that was being written when the machine went down is done again.
        whole, _, _ = self._path.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def _add(self, line: Mapping[str, object]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def reached(self) -> dict[str, list[str]]:
        """By section, as it was added."""
        return {str(line["section"]): line["reached"] for line in self._lines if "section" in line}  # type: ignore[misc]

    def add_reached(self, section: str, places: Sequence[str]) -> None:
        self._add({"section": section, "reached": list(places)})

    def found(self) -> dict[str, Found]:
        """By the identity of the mutant."""
        return {str(line["mutant"]): Found(**line) for line in self._lines if "mutant" in line}  # type: ignore[arg-type]

    def add_found(self, found: Found) -> None:
        self._add(asdict(found))


def hash_of_sources() -> str:
    """SHA-256 over what is changed: identities hold for these lines alone."""
    digest = hashlib.sha256()
    for module in MODULES:
        digest.update(f"{module}\0{source_of(module)}\0".encode())
    return digest.hexdigest()


class HonestCopyFailed(Exception):
    """The copy without a change failed a case, so that nothing a mutant fails would mean anything."""


def measure_reached(journal: Journal, *, suite_seed: int, told: Callable[[str], None]) -> ReachedBy:
    """What the honest copy reaches in each section. Raises HonestCopyFailed."""
    known = journal.reached()
    for section in SECTIONS:
        if section in known:
            continue
        told(f"measuring what section {section} reaches")
        journal.add_reached(section, _reached_in(section, suite_seed))
    pairs = {section: [place.rsplit(" ", 1) for place in places] for section, places in journal.reached().items()}
    return {section: frozenset((short, int(line)) for short, line in places) for section, places in pairs.items()}


def _reached_in(section: str, suite_seed: int) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="qlora-hal-reached-") as folder:
        file = Path(folder) / "reached"
        file.touch()
        os.environ[REACHED_VARIABLE] = str(file)
        failure = first_failure(f"{__package__}.specs:{NOTING}", (section,), seed=suite_seed)
        if failure is not None:
            raise HonestCopyFailed(": ".join(failure))
        return sorted(f"{short} {line}" for short, line in read_places(file))


def hunt_changes(
    changes: Sequence[Drawn], journal: Journal, *, suite_seed: int, jobs: int, told: Callable[[Found], None]
) -> list[Found]:
    """Each change, or what the journal knows of it."""
    known = journal.found()

    def one(change: Drawn) -> Found:
        if str(change.identity) in known:
            return known[str(change.identity)]
        found = hunt_change(change, suite_seed=suite_seed)
        journal.add_found(found)
        told(found)
        return found

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return list(pool.map(one, changes))


def hunt_change(change: Drawn, *, suite_seed: int) -> Found:
    """One change on the sections that reach it, those about its module first, until a case fails."""
    started, spec = time.monotonic(), f"{__package__}.specs:{change.identity}"
    about = ASKED_FIRST.get(change.identity.module, ())
    failure = None
    for sections in (
        tuple(section for section in change.sections if section in about),
        tuple(section for section in change.sections if section not in about),
    ):
        if sections and failure is None:
            failure = first_failure(spec, sections, seed=suite_seed)
    case, reason = failure or ("", "")
    seconds = round(time.monotonic() - started, 1)
    return Found(str(change.identity), change.within, change.was, change.becomes, case, reason[:200], seconds)
