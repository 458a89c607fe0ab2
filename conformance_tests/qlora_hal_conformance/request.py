"""What the parent asks of a child: written as JSON, read by the pytest plugin and by continuing processes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qlora_hal_conformance.combination import Combination
from qlora_hal_conformance.subject import Reference

REQUEST_VARIABLE = "QLORA_HAL_CONFORMANCE_REQUEST"
DEFAULT_TIMEOUT_SECONDS = 180.0
BUNDLE = 4
IN_ONE_LANE = ("85",)
"""Sections whose cases share what is dear to start."""


@dataclass(frozen=True, slots=True)
class Request:
    """One run. `folder` is the run's own temporary folder; `done` are the cases that a restarted child leaves out. With
    a `combination` the cases are those that are about it. A child in a `lane` takes its share of what was selected."""

    reference: Reference
    seed: int
    folder: str
    sections: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    keyword: str = ""
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    done: tuple[str, ...] = ()
    extra: bool = False
    collect_only: bool = False
    combination: Combination | None = None
    lane: int = 0
    lanes: int = 1

    @property
    def is_filtered(self) -> bool:
        return bool(self.sections or self.levels or self.keyword or self.combination)

    @property
    def journal_path(self) -> Path:
        return Path(self.folder) / ("journal-extra.jsonl" if self.extra else "journal.jsonl")

    def wants(self, case: str) -> bool:
        """Whether section and level filters let a case through."""
        from qlora_hal_conformance.catalogue import level_of, number_of, section_of

        by_section = not self.sections or number_of(case) in self.sections or section_of(case) in self.sections
        return by_section and (not self.levels or level_of(case) in self.levels)

    def share(self, selected: Sequence[str]) -> set[str]:
        """The cases of this lane: bundles of neighbours, which draw the same models, each dealt out to the lane with
        the fewest cases; first the sections of `IN_ONE_LANE`, as one bundle. It depends on nothing that happens in a
        run, so the same seed and lanes put the same cases into one process."""
        from qlora_hal_conformance.catalogue import number_of

        others = [case for case in selected if number_of(case) not in IN_ONE_LANE]
        together = [case for case in selected if number_of(case) in IN_ONE_LANE]
        bundles = [together, *(others[start : start + BUNDLE] for start in range(0, len(others), BUNDLE))]
        hands: list[list[str]] = [[] for _ in range(self.lanes)]
        for bundle in bundles:
            min(hands, key=len).extend(bundle)
        return set(hands[self.lane])

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_request(path: Path | None = None) -> Request:
    """The request of this process: of `path`, or of the file that the environment names."""
    chosen = path or Path(os.environ[REQUEST_VARIABLE])
    return _from_json(json.loads(chosen.read_text(encoding="utf-8")))


def _from_json(record: Mapping[str, object]) -> Request:
    fields = dict(record)
    reference = fields.pop("reference")
    assert isinstance(reference, dict)
    combination = fields.pop("combination", None)
    if isinstance(combination, dict):
        fields["combination"] = Combination.from_json(combination)
    made = Request(reference=Reference(**reference), **fields)  # type: ignore[arg-type]
    return replace(made, **{n: tuple(fields[n]) for n in ("sections", "levels", "done")})  # type: ignore[arg-type]
