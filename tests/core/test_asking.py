"""A child that is asked answers with one object, or is described in one line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qlora_hal.processes.subprocess_call import SubprocessCallError, ask, load_of_machine, one_line

ANSWER = (
    "from qlora_hal.processes.subprocess_call import answer_stream\n"
    "with answer_stream() as stream:\n    stream.write('{\"a\": 1}')\n"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_prints_of_a_child_are_no_part_of_its_answer(folder: Path) -> None:
    native = "    import os, sys\n    print('{'); sys.stdout.flush(); os.system('echo native')\n"
    (folder / "child.py").write_text(ANSWER + native)
    assert ask("child", seconds=60) == {"a": 1}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os; os._exit(0)", "ended with exit status 0 and no response: no message"),
        ("import os; os.abort()", "ended with signal 6 and no response"),
        ("raise ValueError('no such flag')", "ended with exit status 1 and no response: ValueError: no such flag"),
        ("print('{not json')", "ended with exit status 0 and no response"),
        ("print('[' * 100000)", "ended with exit status 0 and no response"),
        ("print(7)", "ended with exit status 0 and no response"),
    ],
)
def test_a_child_without_an_answer_is_told_by_how_it_ended(folder: Path, source: str, said: str) -> None:
    (folder / "child.py").write_text(source)
    with pytest.raises(SubprocessCallError) as silence:
        ask("child", seconds=60)
    assert str(silence.value).startswith(said)


@pytest.mark.parametrize(("load", "said"), [((0.0, 9.0, 9.0), ""), ((999.0, 0.0, 0.0), "load 999.0 on ")])
def test_a_machine_is_busy_when_more_wants_to_run_than_it_has_processors(
    monkeypatch: pytest.MonkeyPatch, load: tuple[float, float, float], said: str
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: load)
    assert load_of_machine().startswith(said)
    assert bool(load_of_machine()) == bool(said)
    monkeypatch.delattr("os.getloadavg")
    assert load_of_machine() == ""


def test_a_child_that_hangs_is_not_waited_for(folder: Path) -> None:
    (folder / "child.py").write_text("import time; time.sleep(100)")
    with pytest.raises(SubprocessCallError, match="did not respond within 2 s"):
        ask("child", seconds=2)


def test_what_a_child_leaves_running_is_not_waited_for(folder: Path) -> None:
    leave = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(15)'])\n"
    (folder / "child.py").write_text(leave + ANSWER)
    started = time.monotonic()
    assert ask("child", seconds=60) == {"a": 1}
    assert time.monotonic() - started < 12


def test_a_foreign_text_becomes_one_plain_line() -> None:
    assert one_line("\x1b[31mred\nsecond\r\t\udc80 \u202eand \u00fcber") == "[31mred second and \u00fcber"
    assert len(one_line("x" * 5_000)) < 600
