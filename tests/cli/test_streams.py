"""Streams that are closed, full or without a reader: the work is done, a result that is lost is missed, and the exit
status is the command's own."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import SMALL, merged

from qlora_hal.report.console import RunConsole
from qlora_hal.report.lasting_stream import LastingStream

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")


def shell(redirected: str, *arguments: str, unbuffered: bool = False) -> subprocess.CompletedProcess[str]:
    """`qlora-hal arguments` with a shell's redirections behind it."""
    words = " ".join(f"'{word}'" for word in (sys.executable, "-m", "qlora_hal.cli", *arguments))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{words} {redirected}"],
        capture_output=True,
        text=True,
        env={**environment, "CI": "1", **({"PYTHONUNBUFFERED": "1"} if unbuffered else {})},
        check=False,
    )


@pytest.mark.fault("S11")
@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("arguments", [["schema"], ["explain", "QH-S09", "--json"], ["--help"], ["--version"]])
@pytest.mark.parametrize(("redirected", "why"), [(">&-", "Bad file"), (">/dev/full", "No space left")])
def test_a_result_that_cannot_be_written_is_missed(
    arguments: list[str], redirected: str, why: str, unbuffered: bool
) -> None:
    done = shell(redirected, *arguments, unbuffered=unbuffered)
    assert done.returncode == 8, done.stderr
    assert "error[QH-S11]: The result could not be written to standard output." in done.stderr
    assert why in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_reader_that_has_seen_enough_is_no_error(unbuffered: bool) -> None:
    done = shell("| head -n 1", "schema", unbuffered=unbuffered)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full", ">&- 2>&- <&-", "2>&1 | true"])
def test_an_error_that_cannot_be_told_keeps_its_exit_status(redirected: str) -> None:
    assert shell(redirected, "explain", "QH-NONE").returncode == 2


def test_an_error_as_json_that_cannot_be_written_is_told_on_the_other_stream() -> None:
    done = shell(">/dev/full", "explain", "QH-NONE", "--json")
    assert done.returncode == 2
    assert "error[QH-U06]" in done.stderr


def test_a_stream_that_fails_is_written_to_no_more_and_says_what_was_wrong() -> None:
    with open("/dev/full", "w") as full:
        stream = LastingStream(full)
        stream.write("x" * 10 * io.DEFAULT_BUFFER_SIZE)
        assert stream.problem is not None
        assert stream.problem.errno == errno.ENOSPC
        stream.writelines(["y", "z"])
        stream.flush()
        assert not stream.isatty()
    # closing it did not raise: its descriptor leads nowhere by now


def test_a_stream_that_the_program_closed_is_written_to_no_more() -> None:
    closed = io.StringIO()
    closed.close()
    stream = LastingStream(closed)
    assert not stream.isatty()
    assert stream.write("abc") == 3
    stream.flush()
    assert stream.why == "I/O operation on closed file"


def test_what_the_encoding_of_a_stream_has_no_form_for_is_escaped() -> None:
    for encoding, written in (("ascii", rb"\xfc \u2581"), ("cp1252", b"\xfc \\u2581"), ("utf-8", "ü ▁".encode())):
        held = io.BytesIO()
        stream = LastingStream(io.TextIOWrapper(held, encoding=encoding))
        stream.write("ü ▁")
        stream.flush()
        assert (held.getvalue(), stream.problem) == (written, None)


def test_a_stream_that_raises_anything_ends_nothing() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise RuntimeError("the window is gone")

    console = RunConsole(stream=Gone(), environ={})
    console.note("first")
    console.note("second")
    assert console.notes == ["first", "standard error can no longer be written (the window is gone)", "second"]


def test_without_any_stream_nothing_is_written_and_nothing_fails() -> None:
    stream = LastingStream(None)
    assert (stream.write("abc"), stream.isatty(), stream.problem) == (3, False, None)
    stream.flush()


@pytest.mark.parametrize("redirected", [">&- 2>&- <&-", pytest.param("2>&1 | head -n 1", marks=pytest.mark.long)])
@pytest.mark.long
def test_a_run_goes_on_when_nobody_can_read_of_it(tmp_path: Path, redirected: str) -> None:
    run = tmp_path / "run"
    changes = {"output_dir": str(run), "training.max_steps": 2, "training.gradient_accumulation_steps": 1}
    (tmp_path / "settings.json").write_text(json.dumps(merged(SMALL, changes)))
    done = shell(redirected, "train", str(tmp_path / "settings.json"))
    assert done.returncode == 0, done.stderr
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["steps"]) == ("finished", 2)
    told = [note for note in record["notes"] if "standard error can no longer be written" in note]
    assert len(told) == (0 if "2>&-" in redirected else 1)
    for file in ("run.json", "metrics.jsonl", "run.lock"):  # none was opened under the number of a closed stream
        assert b"step 1/2" not in (run / file).read_bytes()
