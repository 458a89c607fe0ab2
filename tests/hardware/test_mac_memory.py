"""A Mac under memory pressure is told of before a model is loaded, and by doctor; other systems are asked nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_run

from qlora_hal.cli.findings import Verdict, memory_finding
from qlora_hal.detect.hardware import inventory
from qlora_hal.detect.mac_memory import pressure, pressure_note
from qlora_hal.detect.machine_facts import LiveFacts
from qlora_hal.run import session
from tests.hardware.replay import ReplayedFacts, load

MAC = load("apple_m3_macos15")
SWAP = "total = 3072.00M  used = 1843.25M  free = 1228.75M  (encrypted)"
"""`sysctl vm.swapusage` as macOS prints it, without its name."""


def mac(level: str | None, swap: str = SWAP) -> ReplayedFacts:
    told = {} if level is None else {"kern.memorystatus_vm_pressure_level": level, "vm.swapusage": swap}
    return ReplayedFacts({**MAC, "sysctl": {**MAC["sysctl"], **told}})


@pytest.mark.fault("E21")
@pytest.mark.parametrize(("level", "words"), [("2", "(a warning)"), ("4", "(critical)")])
def test_pressure_is_a_note_before_a_run_and_a_warning_of_doctor(level: str, words: str) -> None:
    note = pressure_note(mac(level))
    assert words in note
    assert "1843 MiB are swapped out" in note
    assert note.endswith("Close other programs before you train.")
    machine = inventory(mac(level))
    finding = memory_finding(machine.memory_available_bytes, machine.memory_pressure)
    assert (finding.verdict, finding.fix) == (Verdict.WARN, "Close other programs before you train.")
    assert words in finding.text


@pytest.mark.parametrize("level", ["1", "", "0", "8", "what", None])
def test_a_normal_or_unknown_level_is_no_note(level: str | None) -> None:
    assert pressure_note(mac(level)) == ""
    machine = inventory(mac(level))
    assert memory_finding(machine.memory_available_bytes, machine.memory_pressure).verdict is Verdict.PASS


@pytest.mark.parametrize("swap", ["", "total = 0.00M  used = 0.00M  free = 0.00M  (encrypted)", "none"])
def test_swap_is_told_only_where_there_is_some(swap: str) -> None:
    assert pressure(mac("2", swap).sysctl()) == "macOS reports memory pressure (a warning)"


def test_other_systems_are_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(ReplayedFacts):
        def sysctl(self) -> Any:
            raise AssertionError("asked")

    assert pressure_note(Silent(load("plain_cpu"))) == ""


def test_the_lines_of_sysctl_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader against a program that prints what a Mac prints."""
    program = tmp_path / "sysctl"
    program.write_text(f'#!/bin/sh\necho "kern.memorystatus_vm_pressure_level: 4"\necho "vm.swapusage: {SWAP}"\n')
    program.chmod(0o755)
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **how: real([str(program), *command[1:]], **how))
    assert "(critical), 1843 MiB" in pressure(LiveFacts().sysctl())


def test_a_run_says_it_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "pressure_note", lambda: pressure_note(mac("4")))
    small_run(tmp_path / "run", {"training.max_steps": 1})
    assert "memory pressure (critical)" in capsys.readouterr().err
