"""One JSON line for every event of a run, appended at once: what was written survives the death of the process."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_hal_conformance.verdicts import CaseResult, Claim, Measure, Verdict


@dataclass(frozen=True, slots=True)
class Journal:
    """Events: `collected`, `wanted`, `subject`, `not_ready`, `device`, `started`, `ended`, `finished`."""

    path: Path

    def write(self, event: str, **facts: object) -> None:
        """Append one event. Its line starts with a line break, so that a torn line before it spoils nothing else."""
        line = "\n" + json.dumps({"event": event, **facts}, allow_nan=False, default=str) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode("utf-8"))
        finally:
            os.close(descriptor)

    def read(self) -> Iterator[dict[str, object]]:
        """Every whole event; a torn line is left out."""
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                yield event


def result_as_json(result: CaseResult) -> dict[str, object]:
    """A case as JSON; infinity and NaN, which JSON lacks, as words."""
    record: dict[str, object] = {
        "case": result.case,
        "verdict": result.verdict.value,
        "message": result.message,
        "claim": result.claim.value,
        "seconds": round(result.seconds, 4),
        "ran": list(result.ran),
        "measures": [
            {**asdict(measure), "measured": _number(measure.measured), "bound": _number(measure.bound)}
            for measure in result.measures
        ],
    }
    tightest = result.tightest
    if tightest is not None:
        record["measured"], record["bound"] = _number(tightest.measured), _number(tightest.bound)
        record["margin"] = _number(1.0 / tightest.used) if tightest.used > 0.0 else "exact"
    if result.waiver:
        record["waiver"] = dict(result.waiver)
    return record


def result_from_json(record: Mapping[str, object]) -> CaseResult:
    """The inverse of `result_as_json`. Raises ValueError, KeyError or TypeError for anything else."""
    measures = record.get("measures", [])
    ran, waiver = record.get("ran", []), record.get("waiver", {})
    if not isinstance(measures, list) or not isinstance(ran, list) or not isinstance(waiver, dict):
        raise ValueError("a case whose measures are no list")
    return CaseResult(
        case=str(record["case"]),
        verdict=Verdict(str(record["verdict"])),
        message=str(record.get("message", "")),
        claim=Claim(str(record.get("claim", Claim.DECLARED.value))),
        seconds=float(str(record.get("seconds", 0.0))),
        measures=tuple(
            Measure(str(m["what"]), float(str(m["measured"])), float(str(m["bound"])), str(m["formula"]))
            for m in measures
        ),
        ran=tuple(str(name) for name in ran),
        waiver={str(key): str(value) for key, value in waiver.items()},
    )


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
