"""What strangers write is shown, and does not act in a terminal."""

from __future__ import annotations

import ast
import io
import json
import logging
import unicodedata
import warnings
from pathlib import Path

import pytest
from rich.console import Console

import qlora_hal
from qlora_hal.cli.__main__ import main
from qlora_hal.cli.chat import converse
from qlora_hal.cli.failures import report_unexpected, reported
from qlora_hal.contract.checked_trainer import _to_stderr
from qlora_hal.errors import ConfigError, DataError
from qlora_hal.errors.foreign_output import foreign_output_visible
from qlora_hal.errors.terminal_text import json_line, show, show_json, visible, visible_line
from qlora_hal.report.console import RunConsole

PACKAGE = Path(qlora_hal.__file__).parent
ACTING = {
    "an escape sequence": ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
    "a C1 control": ("\x9b31m\x90", "\\x9b31m\\x90"),
    "a bidirectional override": ("\u202eabc\u2066", "\\u202eabc\\u2066"),
    "a carriage return": ("paid\rfree", "paid\\x0dfree"),
    "backspaces": ("ab\b\bcd\x7f", "ab\\x08\\x08cd\\x7f"),
    "a null": ("a\0b", "a\\x00b"),
    "half of a character": ("a\ud800b", "a\\ud800b"),
    "a line separator": ("a\u2028b\u0085", "a\\u2028b\\x85"),
}
HOSTILE = "".join(text for text, _ in ACTING.values())
SHOWN = "".join(shown for _, shown in ACTING.values())


def acts(text: str) -> list[str]:
    return [
        c for c in text if (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t") or c == "\u202e"
    ]


@pytest.mark.parametrize(("text", "shown"), ACTING.values(), ids=list(ACTING))
def test_what_acts_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert not acts(visible(text))


def test_what_people_read_stays() -> None:
    text = "a\tb\nשלום مرحبا \U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 ▁ \u200f"
    assert visible(text) == text
    assert visible("a\r\nb") == "a\nb"
    assert visible_line("a\nb\tc") == "a\\nb\\tc"


def test_json_stays_json_and_does_not_act() -> None:
    value = {"a" + HOSTILE: [HOSTILE, {"b": "é\U0001f600"}]}
    line = json_line(value)
    assert json.loads(line) == value
    assert not acts(line)
    assert "é\U0001f600" in line


def test_errors_do_not_act(capsys: pytest.CaptureFixture[str]) -> None:
    error = DataError("QH-D03", f"A row has {HOSTILE}.", where=f"{HOSTILE}\nfake.jsonl:1", cause=HOSTILE, fix=HOSTILE)
    assert not acts(str(error))
    reported(error, as_json=False)
    said = capsys.readouterr().err
    assert not acts(said)
    assert SHOWN in said
    assert "\\nfake.jsonl:1" in said  # a name with a new line in it cannot forge a line
    reported(error, as_json=True)
    printed = capsys.readouterr().out
    assert not acts(printed)
    assert json.loads(printed)["message"] == f"A row has {HOSTILE}."


def test_defects_do_not_act(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_HAL_TRACEBACK", "1")
    for as_json in (False, True):
        report_unexpected(ValueError(HOSTILE), as_json=as_json)
        said = capsys.readouterr()
        assert not acts(said.out + said.err)
        assert "x1b]0;title" in said.err


def test_notes_and_samples_of_a_run_do_not_act() -> None:
    stream = io.StringIO()
    console = RunConsole(stream=stream, environ={})
    console.note(HOSTILE)
    console.data_report([HOSTILE])
    console.detection("cpu_torch", HOSTILE, [], {})
    console.checkpoint(3, Path("runs") / "\x1b[2J")
    console.samples([{"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE}])
    console.close()
    assert not acts(stream.getvalue())
    assert stream.getvalue().count("\\x1b]0;title") == 6


def test_answers_of_a_model_do_not_act_and_keep_their_lines() -> None:
    class Model:
        def generate(self, messages: object, *, adapter: bool, max_new_tokens: int) -> str:
            return f"one\ntwo {HOSTILE}"

    for is_terminal in (False, True):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=is_terminal, color_system=None, width=400, legacy_windows=False)
        converse(Model(), io.StringIO("hello\n/quit\n"), console, max_new_tokens=4)
        assert "\\x1b]0;title" in stream.getvalue()
        assert not acts(stream.getvalue())
        assert len(stream.getvalue().splitlines()) >= 3


def test_other_streams_do_not_act(capsys: pytest.CaptureFixture[str]) -> None:
    _to_stderr(HOSTILE)
    show(HOSTILE)
    show_json({"x": HOSTILE})
    said = capsys.readouterr()
    assert not acts(said.out + said.err)


def test_names_of_settings_do_not_act(capsys: pytest.CaptureFixture[str]) -> None:
    from qlora_hal.config.resolve import resolve_settings

    with pytest.raises(ConfigError) as caught:
        resolve_settings({HOSTILE: 1, "lora": {HOSTILE: HOSTILE}}, environ={})
    reported(caught.value, as_json=False)
    assert not acts(capsys.readouterr().err)


def test_everything_is_printed_through_the_one_place() -> None:
    raw = {
        f"{file.relative_to(PACKAGE)}:{call.lineno}"
        for file in PACKAGE.rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print"
    }
    files = sorted(place.rpartition(":")[0] for place in raw)
    # Texts that hold nothing of a stranger: settings with their meanings, the schema, a batch whose texts are visible.
    assert files == [
        "cli/init.py",
        "cli/schema.py",
        "cli/train.py",
        "errors/terminal_text.py",
        "errors/terminal_text.py",
    ]


def test_what_libraries_log_and_warn_of_does_not_act() -> None:
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    log = logging.getLogger("a library of others")
    log.addHandler(handler)
    try:
        with foreign_output_visible():
            log.warning("rope_type %r %s", "a", HOSTILE)
            warned = warnings.formatwarning(HOSTILE, UserWarning, "file.py", 1, "")
    finally:
        log.removeHandler(handler)
    assert SHOWN in printed.getvalue()
    assert SHOWN in warned
    assert not acts(printed.getvalue() + warned)


def test_a_command_shows_what_libraries_log(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[logging.LogRecord] = []

    def logging_verb(tokens: list[str]) -> int:
        made.append(logging.getLogRecordFactory()("a", logging.WARNING, "file.py", 1, HOSTILE, (), None))
        return 0

    before = logging.getLogRecordFactory()
    monkeypatch.setattr("qlora_hal.cli.__main__._run", logging_verb)
    assert main(["schema"]) == 0
    assert made[0].getMessage() == SHOWN
    assert logging.getLogRecordFactory() is before
