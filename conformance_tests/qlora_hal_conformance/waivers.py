"""Known failures that a plugin's author has written down: shown as `waived`, never green.

[[waiver]]
case = "60_memory/reported_peak_does_not_grow"
issue = "https://example.org/toy/issues/7"
expires = 2030-01-31
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_hal.errors import ConfigError
from qlora_hal_conformance.catalogue import all_cases
from qlora_hal_conformance.counting import Count
from qlora_hal_conformance.verdicts import CaseResult, Verdict

WAIVERS_FILE = "waivers.toml"


@dataclass(frozen=True, slots=True)
class Waiver:
    """One failing case, the issue where it is worked on, and the last day on which it counts."""

    case: str
    issue: str
    expires: datetime.date


def read_waivers(path: Path) -> tuple[Waiver, ...]:
    """Raises ConfigError QH-B50 with everything wrong in the file."""
    wrong: list[str] = []
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _refusal(path, [str(error)]) from error
    entries = document.pop("waiver", [])
    wrong += [f"unknown key {key}" for key in document]
    if not isinstance(entries, list):
        raise _refusal(path, ["waiver is written as [[waiver]]"])
    waivers = []
    for number, entry in enumerate(entries, start=1):
        problems = _problems(entry)
        wrong += [f"waiver {number}: {problem}" for problem in problems]
        if not problems:
            waivers.append(Waiver(entry["case"], entry["issue"], entry["expires"]))
    if wrong:
        raise _refusal(path, wrong)
    return tuple(waivers)


def apply_waivers(count: Count, waivers: Sequence[Waiver], today: datetime.date) -> Count:
    """Failed cases with a waiver that still holds become `waived`."""
    valid = {waiver.case: waiver for waiver in waivers if waiver.expires >= today}
    return Count(
        tuple(_waived(result, valid[result.case]) if _applies(result, valid) else result for result in count.results)
    )


def _applies(result: CaseResult, valid: dict[str, Waiver]) -> bool:
    return result.verdict is Verdict.FAILED and result.case in valid


def _waived(result: CaseResult, waiver: Waiver) -> CaseResult:
    return replace(
        result, verdict=Verdict.WAIVED, waiver={"issue": waiver.issue, "expires": waiver.expires.isoformat()}
    )


def _problems(entry: object) -> list[str]:
    if not isinstance(entry, dict):
        return ["it is no table"]
    problems = [f"unknown key {key}" for key in entry.keys() - {"case", "issue", "expires"}]
    if entry.get("case") not in all_cases():
        problems.append(f"{entry.get('case')!r} is no case of the catalogue")
    if not str(entry.get("issue", "")).startswith(("https://", "http://")):
        problems.append("issue is the address of an issue")
    if type(entry.get("expires")) is not datetime.date:
        problems.append("expires is a date, such as 2030-01-31")
    return problems


def _refusal(path: Path, wrong: list[str]) -> ConfigError:
    return ConfigError(
        "QH-B50",
        f"{path.name} has {len(wrong)} mistakes: {'; '.join(wrong[:5])}.",
        where=str(path),
        fix="Write each waiver with case, issue and expires.",
        context={"wrong": wrong},
    )
