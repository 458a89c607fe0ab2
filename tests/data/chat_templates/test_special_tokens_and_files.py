"""Special tokens in what users wrote are text; template files are read or refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from data.chat_templates.conversations import (
    ASKED,
    CALLING,
    DRY,
    END,
    RESULT,
    TOOLS,
    Render,
    call,
    said,
)

from qlora_hal.data import ChatTokenizer
from qlora_hal.errors import DataError, ModelError


def test_special_tokens_in_calls_and_tools_are_text(render: Render) -> None:
    turn = said("assistant", "", tool_calls=[call(town="<|im_end|>")])
    tools = [{"type": "function", "function": {**TOOLS[0]["function"], "description": "tells <|im_end|>"}}]  # type: ignore[dict-item]
    found = render(CALLING, [ASKED, turn, RESULT, DRY], tools)
    assert found.trained == [
        '<call>{"name": "rain", "arguments": {"town": "<|im_end|>"}}</call><|im_end|>',
        DRY["content"] + END,
    ]
    assert found.text == found.theirs(tokenize=False)
    number = found.theirs([DRY], tokenize=True)[-2]
    assert found.ids.count(number) == found.text.count(END) - 2


def test_special_tokens_in_keys_are_text_and_counted(render: Render) -> None:
    turn = said("assistant", "", tool_calls=[{"function": {"name": "rain", "arguments": {"<|im_end|>": "Oslo"}}}])
    schema = {"type": "object", "properties": {"<|user|>": {"type": "string"}}}
    tools = [{"type": "function", "function": {**TOOLS[0]["function"], "parameters": schema}}]  # type: ignore[dict-item]
    found = render(CALLING, [ASKED, turn, RESULT, DRY], tools)
    assert found.trained[0] == '<call>{"name": "rain", "arguments": {"<|im_end|>": "Oslo"}}</call><|im_end|>'
    assert found.text == found.theirs(tokenize=False)
    assert found.ids.count(found.theirs([DRY], tokenize=True)[-2]) == found.text.count(END) - 1
    assert found.data.report.train.special_in_text == {"<|im_end|>": 1, "<|user|>": 1}


def test_special_tokens_that_the_template_reads_are_tokens_and_told(render: Render) -> None:
    source = CALLING.replace(
        "m.content or ''", "(m.content or '').split('[THINK]')[0] ~ '[THINK]' if '[THINK]' in m.content else m.content"
    )
    found = render(source, [ASKED, said("assistant", "so[THINK]No.")])
    assert found.ids == found.theirs(tokenize=True)
    assert "special tokens in messages that the template reads, encoded as tokens: [THINK] 1" in found.alerts


@pytest.mark.fault("D12")
@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("{# für #}x".encode("latin-1"), r"byte 0xfc on line 1, column 5 is not UTF-8 text"),
        ("x\ny é".encode("cp1252"), r"byte 0xe9 on line 2, column 3 is not UTF-8 text"),
        ("x".encode("utf-16"), r"byte 0xff on line 1, column 1 is not UTF-8 text"),
    ],
)
def test_a_template_file_that_is_not_utf8_is_told_with_byte_and_place(
    raw: bytes, reason: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.jinja").write_bytes(raw)
    with pytest.raises(DataError, match=rf"QH-D12.*mine\.jinja cannot be read: {reason}") as caught:
        ChatTokenizer.from_folder(folders["chatml"], chat_template=str(tmp_path / "mine.jinja"))
    assert caught.value.where == "data.chat_template"
    assert caught.value.fix == "Save the file as UTF-8."
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["chatml"] / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes(raw)
    with pytest.raises(ModelError, match=rf"QH-D52.*{reason}"):
        ChatTokenizer.from_folder(tmp_path)


def test_a_json_file_that_holds_a_template_is_no_template(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """It is a valid one: its braces and quotes would be written around every conversation, and partly trained."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}, indent=2))
    with pytest.raises(
        DataError, match=r"QH-D12.*tokenizer_config\.json cannot be read: it is a JSON object"
    ) as caught:
        ChatTokenizer.from_folder(folders["chatml"], chat_template=str(tmp_path / "tokenizer_config.json"))
    assert ".jinja" in caught.value.fix


def test_a_byte_order_mark_is_no_part_of_a_template(folders: Mapping[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_bytes("\ufeff{{ messages[0].content }}é".encode())
    tokenizer = ChatTokenizer.from_folder(folders["chatml"], chat_template=str(tmp_path / "mine.jinja"))
    assert tokenizer.render([said("user", "a")], add_generation_prompt=False) == "aé"
