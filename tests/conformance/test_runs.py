"""Whole runs: misbehaving backends end as verdicts with their names, filters give no certificate, cheats of
configuration have no effect."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conformance.conftest import suite, verdicts

from qlora_hal_conformance.conformance_run import Outcome
from qlora_hal_conformance.verdicts import Verdict

pytestmark = pytest.mark.slow

REFERENCE = "qlora_hal_conformance.reference_backend:SPEC"
KEYWORD = "evaluation or device_facts"
EVALUATES = "11_contract/evaluation_gives_a_sum_and_a_count"
HARMLESS = "11_contract/device_facts_are_complete"
Judged = Callable[..., Outcome]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("DIES", "SIGABRT"),
        ("LEAVES", "exited with status 0"),
        ("EXITS", "SystemExit"),
        ("HANGS", "hung: no answer within 5 s"),
        ("INTERRUPTS", "crashed"),
        ("ENDS", "crashed"),
    ],
)
def test_end_of_the_process_is_the_verdict_of_its_case(spec: str, words: str, judged: Judged) -> None:
    """And the cases after it are still judged."""
    outcome = judged(spec, keyword="evaluation_gives or device_facts_are", timeout=5.0 if spec == "HANGS" else 60.0)
    assert outcome.status == 20
    found = {result.case: result for result in outcome.count.results}
    assert found[EVALUATES].verdict is Verdict.FAILED
    assert words in found[EVALUATES].message
    assert found[HARMLESS].verdict is Verdict.PASSED


def test_crash_in_one_lane_is_the_verdict_of_its_case_alone(judged: Judged) -> None:
    """Every other case is judged once, in whichever lane it is, and the figures are those of a single lane."""
    keyword = "(11_contract or b_of_zero or losses_of_tokens) and float32 or evaluation_gives or device_facts_are"
    outcomes = [judged("DIES", keyword=keyword, lanes=lanes) for lanes in (1, 3)]
    alone, beside = (
        {result.case: (result.verdict, result.measures) for result in outcome.count.results} for outcome in outcomes
    )
    assert alone == beside
    assert {case for case, (verdict, _) in beside.items() if verdict is not Verdict.PASSED} >= {EVALUATES}
    assert beside[HARMLESS][0] is Verdict.PASSED


def test_lanes_are_said_and_kept_with_the_seed(tmp_path: Path) -> None:
    """Together they put the same cases into the same processes again."""
    ended = suite("--spec", REFERENCE, "-k", KEYWORD, "--lanes", "2", "--seed", "3", "--out", "out", cwd=tmp_path)
    assert "seed 3, 2 lanes" in ended.stderr
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (document["seed"], document["lanes"]) == (3, 2)


def test_honest_reference_passes_every_case_of_errors(tmp_path: Path) -> None:
    """No mutant is caught there first, so none would tell that the copy without a change fails."""
    ended = suite("--spec", REFERENCE, "--section", "70", "--out", "out", cwd=tmp_path)
    cases = json.loads((tmp_path / "out" / "results.json").read_text())["cases"]
    assert {case["verdict"] for case in cases} == {"passed"}, ended.stderr


def test_reader_that_leaves_has_what_it_wanted() -> None:
    """`--list | head`: status 0, and no traceback."""
    command = [sys.executable, "-m", "qlora_hal_conformance", "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait() == 0


@pytest.mark.parametrize("lanes", ["0", "-1", "65"])
def test_lanes_out_of_range_are_refused(lanes: str, tmp_path: Path) -> None:
    ended = suite("--spec", REFERENCE, "--lanes", lanes, "--out", "out", cwd=tmp_path)
    assert ended.returncode == 2
    assert "QH-N19" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_skip_raised_by_a_backend_is_inconclusive(judged: Judged) -> None:
    outcome = judged("SKIPS", keyword="evaluation_gives or device_facts_are")
    assert verdicts(outcome) == {HARMLESS: Verdict.PASSED, EVALUATES: Verdict.INCONCLUSIVE}


def test_backend_that_dies_whenever_it_is_opened_has_no_green_case(judged: Judged) -> None:
    outcome = judged("AT_ONCE", keyword="evaluation")
    assert outcome.status == 20
    assert not any(result.verdict.is_green for result in outcome.count.results)


def test_backend_without_its_hardware_is_not_run_and_gets_no_certificate(tmp_path: Path) -> None:
    ended = suite("--spec", "odd_backends:ABSENT", "--out", "out", cwd=tmp_path)
    assert ended.returncode == 3
    assert "No such card." in ended.stderr
    assert "Buy one." in ended.stderr
    assert "failed" not in ended.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_crashed_backend_had_started_ends_with_it(
    judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    monkeypatch.setenv("LOCKED_BY_ANOTHER", str(locked))
    found = verdicts(judged("ANOTHER", keyword="evaluation_gives"))
    assert found == {EVALUATES: Verdict.FAILED}
    with open(locked) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises BlockingIOError while it lives


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.abort()", "broke off: crashed: the process was ended by SIGABRT"),
        ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
    ],
)
def test_end_at_import_is_said_on_the_console(program: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "ends_at_import.py").write_text(program)
    ended = suite("--spec", "ends_at_import:SPEC", "--section", "10", "--out", "out", cwd=tmp_path)
    assert ended.returncode == 20
    assert words in ended.stderr


def test_spec_that_cannot_be_imported_fails_every_case_by_name(tmp_path: Path) -> None:
    ended = suite("--spec", "nowhere_at_all:SPEC", "--section", "10", "--out", "out", cwd=tmp_path)
    assert ended.returncode == 20
    cases = json.loads((tmp_path / "out" / "results.json").read_text())["cases"]
    assert {case["verdict"] for case in cases} == {"failed"}
    assert all("nowhere_at_all" in case["message"] for case in cases)


def test_name_that_nothing_offers_is_refused(tmp_path: Path) -> None:
    ended = suite("--backend", "cpu_tarch", cwd=tmp_path)
    assert ended.returncode == 3
    assert "Did you mean --backend cpu_torch?" in ended.stderr


@pytest.mark.fault("U52")
def test_section_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    ended = suite("--spec", REFERENCE, "--section", "foward", "--out", "out", cwd=tmp_path)
    assert ended.returncode == 2
    assert "no section or level foward" in ended.stderr
    assert "30_forward" in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("U52")
@pytest.mark.parametrize(
    ("filters", "words"),
    [
        (("-k", "nosuchcase"), "no case that matches -k 'nosuchcase'"),
        (("--section", "10", "--level", "L1"), "no case in both the sections and the levels"),
    ],
)
def test_filters_that_select_nothing_are_refused(filters: tuple[str, ...], words: str, tmp_path: Path) -> None:
    ended = suite("--spec", REFERENCE, *filters, "--out", "out", cwd=tmp_path)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1"])
def test_time_for_a_case_that_never_or_always_ends_it_is_refused(seconds: str, tmp_path: Path) -> None:
    ended = suite("--spec", REFERENCE, "--timeout", seconds, "--out", "out", cwd=tmp_path)
    assert ended.returncode == 2
    assert "QH-N19" in ended.stderr


def test_out_that_is_no_folder_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ended = suite("--spec", REFERENCE, "-k", "device_facts_are", "--out", "file", cwd=tmp_path)
    assert ended.returncode == 8
    assert "Name another folder with --out." in ended.stderr
    assert "passed" not in ended.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_filtered_run_yields_no_certificate(tmp_path: Path) -> None:
    ended = suite("--spec", REFERENCE, "-k", "device_facts_are", "--out", "out", cwd=tmp_path)
    assert ended.returncode == 20
    assert "no certificate" in ended.stderr
    assert not (tmp_path / "out" / "certificate.json").exists()
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (document["conformant"], document["filtered"], "sha256" in document) == (False, True, False)
    assert [case["verdict"] for case in document["cases"]] == ["passed"]


def test_filtered_run_leaves_the_files_of_a_whole_run_alone_and_says_where_its_own_are(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    names = ("certificate.json", "badge.json", "results.json", "matrix.md")
    for name in names:
        (out / name).write_text("of the whole run")
    ended = suite("--spec", REFERENCE, "-k", "device_facts_are", "--out", "out", cwd=tmp_path)
    assert ended.returncode == 20
    assert "out holds the certificate of a whole run, which stays" in ended.stderr
    assert {path.name for path in out.iterdir()} == {*names, "filtered"}
    assert {(out / name).read_text() for name in names} == {"of the whole run"}
    assert json.loads((out / "filtered" / "results.json").read_text())["filtered"] is True


def test_same_seed_gives_the_same_figures_and_another_seed_others(tmp_path: Path) -> None:
    measured = []
    for number, seed in enumerate(("5", "5", "6")):
        suite("--spec", REFERENCE, "-k", "rows_of_one_and_two", "--seed", seed, "--out", str(number), cwd=tmp_path)
        (case,) = json.loads((tmp_path / str(number) / "results.json").read_text())["cases"]
        measured.append(case["measured"])
    assert measured[0] == measured[1]
    assert measured[0] != measured[2]


@pytest.mark.long
def test_whole_suite_certifies_the_reference_backend_whatever_the_user_has_configured(tmp_path: Path) -> None:
    """In a folder with a pytest.ini, a conftest and options that would deselect everything."""
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -k nothing --maxfail=1\npython_functions = check_*\n")
    (tmp_path / "conftest.py").write_text("def pytest_collection_modifyitems(items): items.clear()\n")
    ended = suite("--spec", REFERENCE, "--out", "out", cwd=tmp_path, PYTEST_ADDOPTS="-k nothing")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout == ""
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {
        "certificate.json",
        "junit.xml",
        "matrix.md",
        "report.html",
        "badge.json",
    }
    assert suite("--verify", "out/certificate.json", cwd=tmp_path).returncode == 0
    document = json.loads((out / "certificate.json").read_text())
    assert document["conformant"] is True
    assert document["seed_was_given"] is False
    assert document["backend"]["listed"] is False
    assert document["device"]["kernel_paths"]
    assert document["ran"]


def test_sections_of_a_plugin_run_and_do_not_count(tmp_path: Path) -> None:
    """A real distribution with an entry point, whose one case fails; asked for through the hook."""
    site = tmp_path / "site"
    info = site / "toy_sections-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-sections\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qlora_hal.hooks]\ntoy = toy_sections\n")
    (site / "toy_sections.py").write_text(
        "from pathlib import Path\nfrom qlora_hal.hooks import hookimpl\n"
        "@hookimpl\ndef qlora_hal_conformance_sections():\n    return [Path(__file__).parent / 'test_toy_own.py']\n"
    )
    (site / "test_toy_own.py").write_text(
        "def test_good(subject, judging):\n    assert subject.spec.name\n\ndef test_bad():\n    assert False, 'toy'\n"
    )
    program = (
        "from qlora_hal_conformance.extra_sections import offered_sections, run_extra\n"
        "from qlora_hal_conformance.request import Request\n"
        "from qlora_hal_conformance.subject import Reference\n"
        "import sys\n"
        f"request = Request(Reference(spec={REFERENCE!r}), 1, sys.argv[1])\n"
        "for result in run_extra(request, offered_sections(print), lambda event: None):\n"
        "    print(result.case, result.verdict.value)\n"
    )
    import os
    import subprocess
    import sys

    folder = tmp_path / "run"
    folder.mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert ended.stdout.splitlines() == ["toy_own/good passed", "toy_own/bad failed"]
