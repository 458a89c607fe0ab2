"""A conversation with two models."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from qlora_hal.cli.chat import converse
from qlora_hal.run.samples import prompt_tokens


class Echo:
    """Answers with the number of turns it was shown: a stand-in for two loaded models, small enough to check."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []

    def generate(self, messages: Sequence[dict[str, str]], *, adapter: bool, max_new_tokens: int) -> str:
        name = "adapter" if adapter else "base"
        self.asked.append((name, [m["content"] for m in messages if m["role"] == "assistant"]))
        return f"{name} {len(messages)} messages, last {messages[-1]['content']} [x]"


def talk(typed: str) -> tuple[str, Echo]:
    shown, echo = io.StringIO(), Echo()
    console = Console(file=shown, force_terminal=False, highlight=False, markup=False, width=200)
    converse(echo, io.StringIO(typed), console, max_new_tokens=8)
    return shown.getvalue(), echo


def test_both_answers_are_shown_and_each_model_answers_a_turn_once_from_its_own_history() -> None:
    shown, echo = talk("one\ntwo\n/quit\nnever\n")
    assert "base:    base 1 messages, last one [x]" in shown
    assert "adapter: adapter 3 messages, last two [x]" in shown
    assert "never" not in shown
    assert echo.asked == [
        ("base", []),
        ("adapter", []),
        ("base", ["base 1 messages, last one [x]"]),
        ("adapter", ["adapter 1 messages, last one [x]"]),
    ]


def test_reset_begins_again_and_stats_count() -> None:
    shown, _ = talk("one\n/reset\n/stats\ntwo\n/stats\n")
    assert "0 turns" in shown
    assert "1 turn," in shown
    assert "adapter 1 messages, last two" in shown


def test_save_writes_both_conversations_and_never_replaces_a_file(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    shown, _ = talk(f"one\n/save {file}\n/save {file}\n/save\n/what\n")
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert [m["role"] for m in saved["base"]] == ["user", "assistant"]
    assert saved["adapter"][1]["content"].startswith("adapter")
    assert "cannot be written" in shown
    assert "/save needs a file name" in shown
    assert "/reset starts over" in shown


def test_a_name_that_no_file_can_have_and_a_full_disk_are_told_and_the_chat_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, echo = talk("/save a\0b\none\n")
    assert "no file can have that name" in shown
    assert len(echo.asked) == 2
    file = tmp_path / "talk.json"
    file.write_text("mine")
    assert "something of that name is there already" in talk(f"/save {file}\n")[0]
    assert file.read_text() == "mine"
    file.unlink()
    monkeypatch.setattr(Path, "open", lambda path, mode, encoding: FullDisk(path))
    assert "No space left" in talk(f"/save {file}\n")[0]
    assert not file.exists()


@pytest.mark.fault("D08")
def test_a_line_that_is_no_text_is_refused_and_the_chat_goes_on() -> None:
    class Strict(Echo):
        def generate(self, messages: Sequence[dict[str, str]], *, adapter: bool, max_new_tokens: int) -> str:
            prompt_tokens(Untokenized(), messages)  # type: ignore[arg-type]
            return super().generate(messages, adapter=adapter, max_new_tokens=max_new_tokens)

    shown, echo = io.StringIO(), Strict()
    console = Console(file=shown, force_terminal=False, highlight=False, markup=False, width=200)
    converse(echo, io.StringIO("hello \udcff\none \ud800\nthree\n"), console, max_new_tokens=8)
    assert "The prompt is not UTF-8 text: it holds the byte 0xff." in shown.getvalue()
    assert "it holds U+D800, half of a character." in shown.getvalue()
    assert "last three" in shown.getvalue()
    assert [name for name, _ in echo.asked] == ["base", "adapter"]


class FullDisk(io.StringIO):
    def __init__(self, path: Path) -> None:
        super().__init__()
        path.touch()

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Untokenized:
    template = None
    opening_ids = ()

    def encode(self, text: str) -> list[int]:
        return [0]
