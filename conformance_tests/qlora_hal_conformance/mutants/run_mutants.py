"""Running a mutant through the suite, as any backend is run, until a case catches it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from qlora_hal_conformance.catalogue import all_cases, number_of
from qlora_hal_conformance.request import Request
from qlora_hal_conformance.running import run_cases
from qlora_hal_conformance.subject import Reference
from qlora_hal_conformance.verdicts import Verdict

from .registry import Mutant

HONEST = "qlora_hal_conformance.reference_backend:SPEC"
BROKE_OFF = "broke_off"
_SMALL_PRODUCTS = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


@dataclass(frozen=True, slots=True)
class Hunt:
    """What became of one mutant. `caught_by` are failed cases of its own sections, `too_early` those of sections
    before them."""

    mutant: str
    caught_by: tuple[str, ...]
    too_early: tuple[str, ...]
    reason: str
    seconds: float

    @property
    def survived(self) -> bool:
        return not self.caught_by


class _Caught(Exception):
    """Ends a hunt at the first failed case."""


def hunt(mutant: Mutant, *, seed: int, full: bool = False) -> Hunt:
    """Run the sections that must catch it, the earliest first; with `full` all up to the last of them, to the end."""
    sections = sections_up_to(mutant) if full else mutant.caught_by
    started = time.monotonic()
    failed: dict[str, str] = {}

    def progress(event: Mapping[str, object]) -> None:
        if event["event"] == "ended" and not Verdict(str(event["verdict"])).is_green:
            failed[str(event["case"])] = str(event["message"])
            if not full and number_of(str(event["case"])) in mutant.caught_by:
                raise _Caught

    rounds = [sections] if full else [(section,) for section in sections]
    for chosen in rounds:
        try:
            run(f"{__package__}.specs:{mutant.name}", chosen, progress, seed=seed, case_seconds=mutant.case_seconds)
        except _Caught:
            break
    own = tuple(case for case in failed if number_of(case) in mutant.caught_by)
    allowed = {*mutant.caught_by, *mutant.may_fail}
    early = tuple(case for case in failed if number_of(case) < mutant.caught_by[0] and number_of(case) not in allowed)
    return Hunt(mutant.name, own, early, failed[own[0]] if own else "", time.monotonic() - started)


def hunt_all(
    mutants: Sequence[Mutant], *, seed: int, jobs: int, full: bool, told: Callable[[Hunt], None]
) -> list[Hunt]:
    """Several at once; `told` hears of each as it ends."""

    def one(mutant: Mutant) -> Hunt:
        found = hunt(mutant, seed=seed, full=full)
        told(found)
        return found

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return list(pool.map(one, mutants))


def failures_of_the_honest(sections: Iterable[str] = (), *, seed: int, spec: str = HONEST) -> dict[str, str]:
    """Failed cases of the reference backend, or of another honest one, with their reasons; it must have none."""
    failed: dict[str, str] = {}

    def progress(event: Mapping[str, object]) -> None:
        if event["event"] == "ended" and not Verdict(str(event["verdict"])).is_green:
            failed[str(event["case"])] = str(event["message"])

    run(spec, tuple(sections), progress, seed=seed)
    return failed


def first_failure(
    spec: str, sections: Sequence[str] = (), *, seed: int, case_seconds: float = 120.0
) -> tuple[str, str] | None:
    """(case, reason) of the first case that fails in some sections, by default in all; None where all are green. A run
    that breaks off outside of any case has `BROKE_OFF` in the place of one."""
    failed: list[tuple[str, str]] = []

    def progress(event: Mapping[str, object]) -> None:
        if event["event"] == "broke_off":
            failed.append((BROKE_OFF, str(event["how"])))
        elif event["event"] == "ended" and not Verdict(str(event["verdict"])).is_green:
            failed.append((str(event["case"]), str(event["message"])))
            raise _Caught

    with contextlib.suppress(_Caught):
        run(spec, sections, progress, seed=seed, case_seconds=case_seconds)
    return failed[0] if failed else None


def run(
    spec: str,
    sections: Sequence[str],
    progress: Callable[[Mapping[str, object]], None],
    *,
    seed: int,
    case_seconds: float = 60.0,
    keyword: str = "",
) -> None:
    """One run of some sections on the backend that `spec` names."""
    # The tiny models' products are far below what a second thread is worth, and hunts run side by side.
    os.environ.update({name: value for name, value in _SMALL_PRODUCTS.items() if name not in os.environ})
    with tempfile.TemporaryDirectory(prefix="qlora-hal-mutant-") as folder:
        reference = Reference(spec=spec)
        request = Request(
            reference, seed, folder, sections=tuple(sections), keyword=keyword, timeout_seconds=case_seconds
        )
        run_cases(request, progress)


def sections_up_to(mutant: Mutant) -> tuple[str, ...]:
    """The numbers of all sections up to the last one that must catch it."""
    return tuple(sorted({number_of(case) for case in all_cases() if number_of(case) <= max(mutant.caught_by)}))
