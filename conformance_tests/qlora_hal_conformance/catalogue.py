"""The list of all cases of each revision of the suite, and what a case's id says.

`mustpass/vN.txt` is that list. A run is counted against the present one, so a case that vanished cannot go unnoticed; a
test fails when the file and the sections differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import qlora_hal_oracle
from qlora_hal.contract.backend import CONTRACT_VERSION
from qlora_hal_conformance import SUITE_VERSION

HERE = Path(__file__).parent
SECTIONS_FOLDER = HERE / "sections"
MUSTPASS = HERE / "mustpass"

RUN_SECTIONS_FOLDER = HERE / "sections_for_a_run"
RUN_SECTIONS = ("30", "31", "35", "40", "41", "43", "50")
"""Where the cases about one run's combination are: those of the suite whose needs are the run's, and one section that
judges everything together and belongs to no certificate."""

FP8_SECTIONS = ("34",)
"""Where they are for a run whose products are in 8-bit floats: the other sections' bounds know nothing of them."""

EARLIER_REVISIONS = (
    ("1", "0c36b05f01bad756058822fca57db8616083e761ff1033b0c5e7194b2097ec0b"),
    ("2", "eaa24402a41d012badace814da284e2ba544d6bd17e3ac9d8d74d2a6774a380d"),
    ("3", "dbf53b47b166a4d0a417e1c84f1317e22ab0a7df131f8374fedce690f52ac394"),
    ("4", "ee1fbe335b8d1e5d2fe8b7d559300caa8ce950459fadc5df321f095f10dc4702"),
    ("5", "501ec27f3062df29c896afccf8d284c0e2cde131b8535716ff4b94108ffeee3b"),
    ("6", "d5b7b1c8e990bc09d21460941fa41fcb77e417833be2cbe0c14e43ee26b1538c"),
    ("7", "1d7a41c8a6b24399c3a5d9302b8afcf7fdd3005111de3f5e72039ec4a69f39bc"),
)
"""Each published revision before the present one, with the SHA-256 of its suite. A certificate of one is checked
against that revision's list of cases."""

CONTRACT_OF_EARLIER = {"1": 1, "2": 1}
"""The contract that each of them judges; the present revision judges the present contract."""

LEVELS: dict[str, tuple[str, ...]] = {
    "L0": ("10", "11"),
    "L1": ("20", "30", "31", "32", "33", "34"),
    "L2": ("40", "41", "42", "43", "44", "45", "46", "47", "48"),
    "L3": ("50", "51", "52"),
    "L4": ("60", "70", "80", "85", "90", "91", "95"),
}
"""present, numbers, training, state, trust"""


@cache
def all_cases(revision: str = SUITE_VERSION) -> tuple[str, ...]:
    """Every case id of a revision, in the order of the sections."""
    lines = (MUSTPASS / f"v{revision}.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def case_id(node_id: str) -> str:
    """`.../test_30_forward.py::test_b_of_zero[nf4]` is `30_forward/b_of_zero[nf4]`."""
    file, _, name = node_id.partition("::")
    return f"{Path(file).stem.removeprefix('test_')}/{name.removeprefix('test_')}"


def section_of(case: str) -> str:
    """`30_forward` of `30_forward/b_of_zero[nf4]`."""
    return case.partition("/")[0]


def number_of(case: str) -> str:
    """`30` of `30_forward/b_of_zero[nf4]`."""
    return case.partition("_")[0]


def level_of(case: str) -> str:
    """`L1` of `30_forward/...`; an unknown section has none."""
    number = number_of(case)
    return next((level for level, sections in LEVELS.items() if number in sections), "")


def revision_of(sha256: object) -> str:
    """The revision whose suite has this hash; empty for sources that were never published."""
    return next((name for name, known in ((SUITE_VERSION, suite_hash()), *EARLIER_REVISIONS) if known == sha256), "")


def contract_judged(revision: str) -> int:
    """The number of the contract that a revision of the suite judges."""
    return CONTRACT_OF_EARLIER.get(revision, CONTRACT_VERSION)


@cache
def suite_hash() -> str:
    """SHA-256 over every source that decides a verdict: the oracle, and all of this package but what decides none: the
    backends made for its own tests, the reference convergence points, which name their own sources, and the pages that
    show a certificate."""
    digest = hashlib.sha256()
    for name, path in sorted((*_sources("oracle/", Path(qlora_hal_oracle.__file__).parent), *_sources("", HERE))):
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).digest())
    return digest.hexdigest()


def _sources(prefix: str, root: Path) -> Iterator[tuple[str, Path]]:
    apart = ("mutants", "reference_backend", "convergence", "report", "__pycache__")
    for path in root.rglob("*"):
        relative = path.relative_to(root)
        if path.suffix in (".py", ".txt") and relative.parts[0] not in apart and "__pycache__" not in relative.parts:
            yield f"{prefix}{relative.as_posix()}", path
