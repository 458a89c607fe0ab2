"""The pytest plugin: fixtures for cases, and the verdict of each case written to the journal as soon as it is known.

Only the journal counts. pytest's own outcome, exit status and output decide nothing.
"""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from qlora_hal.contract.backend import QuantizedLoRATrainer
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.catalogue import case_id
from qlora_hal_conformance.device_features import with_device_features
from qlora_hal_conformance.fixtures import Models, Opened, Opener
from qlora_hal_conformance.journal import Journal, result_as_json
from qlora_hal_conformance.random_inputs import stream
from qlora_hal_conformance.request import Request, read_request
from qlora_hal_conformance.subject import Need, Subject, import_subject, probe_record, spec_record
from qlora_hal_conformance.verdicts import CaseResult, Claim, Phase, judge
from qlora_hal_conformance.worlds import Worlds, devices_of_ranks
from qlora_hal_oracle import OracleTrainer


@dataclass(slots=True)
class CaseNotes:
    """What a case leaves behind while it runs."""

    started: float = 0.0
    phases: list[Phase] = field(default_factory=list)
    judge: Judge = field(default_factory=Judge)
    ran: set[str] = field(default_factory=set)


CASE_VARIABLE = "PYTEST_CURRENT_TEST"

_REQUEST = pytest.StashKey[Request]()
_JOURNAL = pytest.StashKey[Journal]()
_NOTES = pytest.StashKey[CaseNotes]()
_SUBJECT = pytest.StashKey[Subject]()


# the run --------------------------------------------------------------------------------------------------------------
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs(*needs): features, weight formats, dtypes and block sizes a case asks for"
    )
    request = read_request()
    config.stash[_REQUEST] = request
    config.stash[_JOURNAL] = Journal(request.journal_path)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Import the backend's light module and ask its probe; a machine without the hardware is "not run", no verdict."""
    request, journal = session.config.stash[_REQUEST], session.config.stash[_JOURNAL]
    if request.collect_only:
        return
    journal.write("opening")
    can_run = True
    # What goes wrong here comes again, as a failed case, when the fixture asks for the subject.
    with contextlib.suppress(Exception, SystemExit):
        subject = _imported(request)
        report = subject.spec.probe()
        subject = replace(subject, devices=devices_of_ranks(subject.spec, report))
        session.config.stash[_SUBJECT] = subject
        journal.write("subject", spec=spec_record(subject), probe=dict(probe_record(report)))
        if not report.ready:
            journal.write("not_ready", reason=report.reason, fix=report.fix)
            can_run = False
        elif request.combination is not None:
            _prove(session.config)  # which cases are about a run depends on what `auto` takes here
    if not can_run:  # `pytest.exit` raises an Exception: it stands outside of what is suppressed
        journal.write("finished")
        pytest.exit("the backend cannot run on this machine", returncode=0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    request, journal = config.stash[_REQUEST], config.stash[_JOURNAL]
    journal.write("collected", cases=[case_id(item.nodeid) for item in items])
    done, subject = set(request.done), config.stash.get(_SUBJECT, None)
    wanted = [item for item in items if request.extra or request.wants(case_id(item.nodeid))]
    if request.combination is not None:
        dtype = subject.main_dtype if subject is not None else ""
        wanted = [item for item in wanted if request.combination.covers(needs_of(item), dtype)]
    selected = [case_id(item.nodeid) for item in wanted]
    journal.write("wanted", cases=selected)
    mine = request.share(selected) - done
    items[:] = [item for item in wanted if case_id(item.nodeid) in mine]


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[_JOURNAL].write("finished")


# one case -------------------------------------------------------------------------------------------------------------
def pytest_runtest_logstart(nodeid: str) -> None:
    """Nothing: the start is written where the item is at hand."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    journal, notes = item.config.stash[_JOURNAL], CaseNotes(started=time.perf_counter())
    item.stash[_NOTES] = notes
    journal.write("started", case=case_id(item.nodeid))
    outcome = yield
    result = _result(item, notes)
    journal.write("ended", **result_as_json(result))
    return outcome


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Without the name of the case in the environment, where a backend could read it."""
    name = os.environ.pop(CASE_VARIABLE, None)
    try:
        return (yield)
    finally:
        if name is not None:
            os.environ[CASE_VARIABLE] = name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    skipped = report.outcome == "skipped" or hasattr(report, "wasxfail")
    error = call.excinfo.value if call.excinfo is not None and not skipped else None
    item.stash[_NOTES].phases.append(Phase(call.when or "", error, skipped))
    return report


def _result(item: pytest.Item, notes: CaseNotes) -> CaseResult:
    subject = item.config.stash.get(_SUBJECT, None)
    claim = subject.claim(needs_of(item)) if subject is not None else Claim.DECLARED
    judgement = judge(notes.phases, claim)
    return CaseResult(
        case=case_id(item.nodeid),
        verdict=judgement.verdict,
        message=judgement.message,
        claim=claim,
        seconds=time.perf_counter() - notes.started,
        measures=tuple(notes.judge.measures),
        ran=tuple(sorted(notes.ran)),
    )


def needs_of(item: pytest.Item) -> tuple[Need, ...]:
    """Everything the marks of a case ask for."""
    return tuple(need for mark in item.iter_markers("needs") for need in mark.args)


# fixtures -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def run_request(pytestconfig: pytest.Config) -> Request:
    """What this run was asked for."""
    return pytestconfig.stash[_REQUEST]


@pytest.fixture(scope="session")
def subject(pytestconfig: pytest.Config) -> Subject:
    """The backend under judgement, with the dtypes its device proved."""
    known = pytestconfig.stash.get(_SUBJECT, None)
    return known if known is not None and known.proved_dtypes else _prove(pytestconfig)


def _imported(request: Request) -> Subject:
    return replace(import_subject(request.reference), combination=request.combination)


def _prove(config: pytest.Config) -> Subject:
    imported = config.stash.get(_SUBJECT, None) or _imported(config.stash[_REQUEST])
    proved = with_device_features(imported.with_proof())
    config.stash[_SUBJECT] = proved
    config.stash[_JOURNAL].write("subject", spec=spec_record(proved))
    return proved


@pytest.fixture(scope="session")
def models(run_request: Request) -> Models:
    """Tiny models drawn from the run's seed."""
    return Models(Path(tempfile.mkdtemp()), run_request.seed)


@pytest.fixture(scope="session")
def worlds(subject: Subject, models: Models) -> Iterator[Worlds]:
    """Several ranks of the backend, asked once for each number of them."""
    with contextlib.closing(Worlds(subject, models, Path(tempfile.mkdtemp()))) as found:
        yield found


@pytest.fixture
def seeded(request: pytest.FixtureRequest, run_request: Request) -> np.random.Generator:
    """This case's own generator, a function of the run's seed and the case's id."""
    return stream(run_request.seed, case_id(request.node.nodeid))


@pytest.fixture
def judging(request: pytest.FixtureRequest) -> Judge:
    """Takes every comparison of the case."""
    judge_of_case: Judge = request.node.stash[_NOTES].judge
    return judge_of_case


@pytest.fixture
def main_dtype(request: pytest.FixtureRequest, subject: Subject) -> str:
    """The compute dtype of trainers that are opened without naming one: the case's own, where it has one."""
    return str(getattr(request, "param", subject.main_dtype))


@pytest.fixture
def opened(
    request: pytest.FixtureRequest,
    subject: Subject,
    models: Models,
    main_dtype: str,
    _note_device: Callable[[QuantizedLoRATrainer], None],
) -> Iterator[Opener]:
    """Opens trainers; closes them when the case is over."""
    opener = Opener(subject, models, main_dtype, _note_device, request.node.stash[_NOTES].ran)
    yield opener
    opener.close()


@pytest.fixture
def oracle() -> Callable[[Opened], OracleTrainer]:
    """The reference on an opened trainer's own weights."""
    return Opened.oracle


@pytest.fixture(scope="session")
def _note_device(pytestconfig: pytest.Config) -> Callable[[QuantizedLoRATrainer], None]:
    paths: set[str] = set()

    def note(trainer: QuantizedLoRATrainer) -> None:
        facts = trainer.device_facts()
        if not paths:
            # The libraries are loaded by now. Their objects stay to the end; leaving them out of every later
            # collection (some backends collect at each close) saves a quarter of a second for each trainer.
            gc.freeze()
        if facts.kernel_path not in paths:
            paths.add(facts.kernel_path)
            pytestconfig.stash[_JOURNAL].write(
                "device",
                device=facts.device,
                driver=facts.driver,
                versions=dict(facts.versions),
                memory_limit_bytes=facts.memory_limit_bytes,
                kernel_paths=sorted(paths),
            )

    return note


@pytest.fixture
def scratch() -> Path:
    """A folder of the case's own, which does not have its name. It goes with the folder of the run."""
    return Path(tempfile.mkdtemp())
