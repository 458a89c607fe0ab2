"""What is written to the error stream while it is held: shown at the end, or not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

from qlora_hal.processes.held_stderr import STDERR, held_stderr


def test_what_is_written_is_shown_at_the_end_unless_it_is_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    with held_stderr():
        os.write(STDERR, b"by a library\n")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "by a library\n"
    with held_stderr() as held:
        os.write(STDERR, b"by a library\n")
        held.drop()
    os.write(STDERR, b"later\n")
    assert capfd.readouterr().err == "later\n"


def test_one_within_another_leaves_the_stream_to_the_outer(capfd: pytest.CaptureFixture[str]) -> None:
    with held_stderr(), held_stderr() as inner:
        os.write(STDERR, b"text\n")
        inner.drop()
    assert capfd.readouterr().err == "text\n"


def test_what_is_raised_passes_and_what_was_written_before_it_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with held_stderr():
            os.write(STDERR, b"before\n")
            raise ValueError("reason")

    with pytest.raises(ValueError, match="reason"):
        fail()
    assert capfd.readouterr().err == "before\n"


def test_a_process_without_the_stream_has_none_to_hold() -> None:
    code = "import os; os.close(2)\nfrom qlora_hal.processes.held_stderr import held_stderr\nwith held_stderr(): pass"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_room_for_a_file_the_stream_is_as_always(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as changed:
        changed.setattr(tempfile, "tempdir", "/nowhere")
        with held_stderr():
            os.write(STDERR, b"at once\n")
            assert capfd.readouterr().err == "at once\n"
