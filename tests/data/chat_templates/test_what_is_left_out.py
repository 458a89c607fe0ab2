"""What the text does not hold is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data.chat_templates.conversations import (
    ASKED,
    CALLING,
    DRY,
    END,
    LEAVING_OUT,
    RAIN,
    RESULT,
    THINKING,
    Message,
    Prepare,
    Render,
    call,
    said,
)

from qlora_hal.data import ChatTokenizer
from qlora_hal.errors import DataError

TWO_ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
    "{{ '<|' + m.role + '|>' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_messages_that_the_template_does_not_write_are_told_by_role(
    prepared: Prepare, render: Render, tmp_path: Path
) -> None:
    looked = [said("user", "I know it rains?"), said("assistant", "Let me look."), said("tool", "no"), DRY]
    french = [said("developer", "Answer in French."), said("user", "Hello"), said("assistant", "Bonjour.")]
    found = render(TWO_ROLES, looked)
    assert found.alerts == [f"1 message is {LEAVING_OUT}: tool 1"]
    assert found.trained == ["Let me look.<|im_end|>", "No, it is dry.<|im_end|>"]
    assert found.ids == found.theirs(tokenize=True)
    rows = [{"messages": looked}, {"messages": french}, {"messages": [said("system", "Be brief."), *french[1:]]}]
    tokenizer = ChatTokenizer.from_folder(tmp_path / "model")
    assert prepared(rows, tokenizer=tokenizer).report.alerts == [
        f"3 messages are {LEAVING_OUT}: tool 1, developer 1, system 1"
    ]
    assert prepared(rows[2:], tokenizer=tokenizer).report.alerts == [f"1 message is {LEAVING_OUT}: system 1"]


def test_a_message_that_is_moved_is_not_told(render: Render) -> None:
    moved = (
        "{% set first = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<|user|>' + first + ' ' + m.content + '<|im_end|>\n' }}"
        "{% elif m.role == 'assistant' %}{{ '<|assistant|>' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    found = render(moved, [said("system", "Be brief."), said("user", "Hello"), said("assistant", "Hi.")])
    assert found.alerts == []
    assert found.trained == ["Hi.<|im_end|>"]


def test_a_part_of_a_message_that_is_left_out_is_told(render: Render) -> None:
    source = CALLING.replace("m.content or ''", "(m.content or '').split('</think>')[-1]")
    found = render(source, THINKING)
    assert found.trained == [f"Hello.{END}", f"See you.{END}"]
    assert found.alerts == [f"parts of 2 messages are {LEAVING_OUT}: assistant 2"]
    cut = CALLING.replace("m.content or ''", "(m.content or '')[:9]")
    found = render(cut, [said("user", "Count."), said("assistant", "one\ntwo\nthree\nfour")])
    assert found.alerts == [f"parts of 1 message are {LEAVING_OUT}: assistant 1"]
    strict = CALLING.replace("m.content or ''", "m.content or '' if not m.tool_calls else ''")
    found = render(strict, [ASKED, said("assistant", "I will check.", tool_calls=[call(town="Oslo")]), RESULT, DRY])
    assert found.trained[0] == f"\n{RAIN}{END}"
    assert f"parts of 1 message are {LEAVING_OUT}: assistant 1" in found.alerts


def test_a_content_that_is_only_laid_out_anew_is_not_told(render: Render) -> None:
    for write in ("m.content | trim | replace('\n', ' ')", "m.content | tojson", "m.content | upper"):
        source = (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' ~ (" + write + ") ~ '<|im_end|>' }}{% endfor %}"
        )
        assert render(source, [said("user", ' a "b"\nc é'), said("assistant", "x\n\ny")]).alerts == []


def test_fields_that_change_nothing_are_told(render: Render) -> None:
    messages = [said("user", "Hello", name="anna"), said("assistant", "Hi.", mood="kind")]
    assert render(CALLING, messages).alerts == [f"mood: {LEAVING_OUT} (1 rows)", f"name: {LEAVING_OUT} (1 rows)"]
    named = CALLING.replace("m.role +", "m.role + (' ' + m.name if m.name else '') +")
    assert render(named, messages).alerts == [f"mood: {LEAVING_OUT} (1 rows)"]


def test_fields_inside_parts_and_calls_that_change_nothing_are_told(render: Render) -> None:
    asking = {"id": "c1", "type": "function", "index": 0, "function": {"name": "rain", "arguments": {}, "thought": "z"}}
    messages = [
        said("user", [{"type": "text", "text": "Hi", "cache": "x"}]),
        said("assistant", "", tool_calls=[asking]),
    ]
    assert render(CALLING, messages).alerts == [
        f"content.cache: {LEAVING_OUT} (1 rows)",
        f"tool_calls.function.thought: {LEAVING_OUT} (1 rows)",
        f"tool_calls.index: {LEAVING_OUT} (1 rows)",
    ]
    whole = CALLING.replace("{'name': one.function.name, 'arguments': one.function.arguments}", "one")
    assert render(whole, messages[1:]).alerts == []


def test_a_field_that_is_written_for_one_role_alone_is_told_of_the_others(render: Render) -> None:
    named = CALLING.replace("m.role +", "m.role + (' ' + m.name if m.name and m.role == 'tool' else '') +")
    messages = [said("user", "Hello", name="anna"), said("assistant", "", tool_calls=[call()])]
    messages += [said("tool", "no", name="rain"), DRY]
    assert render(named, messages).alerts == [f"name of user messages: {LEAVING_OUT} (1 rows)"]


WRITING_TOOLS = [
    ("{{ tool | tojson }}", []),
    ("{{ tool.function.name }}", ["descriptions of tool parameters", "tool descriptions", "tool parameters"]),
    (
        "{{ tool.function.name + ': ' + tool.function.description }}",
        ["descriptions of tool parameters", "tool parameters"],
    ),
    (
        "{{ tool.function.name }}{{ tool.function.parameters.properties | list }}",
        ["descriptions of tool parameters", "tool descriptions"],
    ),
    ("{{ tool | tojson if loop.first }}", ["tools"]),
]


@pytest.mark.parametrize(("writing", "missing"), WRITING_TOOLS)
def test_what_is_not_written_of_tools_is_told(writing: str, missing: list[str], render: Render) -> None:
    schema = {"type": "object", "properties": {"town": {"type": "string", "description": "where it falls"}}}
    # The name of the second stands in the question, too.
    tools = [
        {"type": "function", "function": {"name": name, "description": "tells it", "parameters": schema}}
        for name in ("time", "rain")
    ]
    source = CALLING.replace("{{ tool | tojson }}", writing)
    found = render(source, [said("user", "Ask rain."), DRY], tools)
    assert found.alerts == [f"{what}: {LEAVING_OUT} (1 rows)" for what in missing]
    plain = {"type": "object", "properties": {"town": {"type": "string"}}}
    undescribed = [{**tool, "function": {**tool["function"], "parameters": plain}} for tool in tools]  # type: ignore[dict-item]
    found = render(source, [said("user", "Ask rain."), DRY], undescribed)
    assert f"descriptions of tool parameters: {LEAVING_OUT} (1 rows)" not in found.alerts
    bare = [{"type": "function", "function": {"name": name}} for name in ("time", "rain")]
    without = source.replace("tool.function.description", "''").replace("tool.function.parameters.properties", "{}")
    alerts = render(without, [said("user", "Ask rain."), DRY], bare).alerts
    assert alerts == ([f"tools: {LEAVING_OUT} (1 rows)"] if missing == ["tools"] else [])


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("kept", "arguments", "is_lost"),
    [
        ("if value is string", {"town": "Oslo"}, False),
        ("if value is string", {"town": "Oslo", "days": 2}, True),
        ("if value is not mapping", {"town": "Oslo", "where": {"north": 2}}, True),
        ("if loop.first", {"town": "Oslo"}, False),
        ("if loop.first", {"town": "Oslo", "zone": "UTC"}, True),
        ("if loop.first", {"days": 1, "town": "Oslo"}, True),
    ],
)
def test_a_call_of_which_an_argument_is_not_written_is_told_and_not_trained(
    kept: str, arguments: Message, is_lost: bool, as_text: bool, render: Render
) -> None:
    source = CALLING.replace(
        "({'name': one.function.name, 'arguments': one.function.arguments} | tojson)", "one.function.name"
    ).replace(
        "+ '</call>' }}",
        "}}{% for key, value in one.function.arguments.items() %}{{ key ~ value " + kept + " }}{% endfor %}</call>",
    )
    given = json.dumps(arguments) if as_text else arguments
    turn = said("assistant", "", tool_calls=[{"function": {"name": "rain", "arguments": given}}])
    found = render(source, [ASKED, turn, DRY])
    assert (f"tool_calls: {LEAVING_OUT} (1 rows)" in found.alerts) == is_lost
    assert len(found.trained) == 2 - is_lost


def test_reasoning_that_stands_under_a_name_that_is_not_read_is_told(render: Render) -> None:
    found = render(CALLING, [ASKED, said("assistant", "No.", reasoning_content="", reasoning="It is dry.")])
    assert found.alerts == [f"reasoning: {LEAVING_OUT} (1 rows)"]


def test_a_turn_that_would_be_trained_without_what_it_says_carries_no_loss(render: Render) -> None:
    lost = "assistant turns that carry no loss, because the template omits what they say or call: 1"
    turn = said("assistant", "I will check.", tool_calls=[call(town="Oslo")])
    found = render(TWO_ROLES, [ASKED, turn, DRY])
    assert found.trained == [f"No, it is dry.{END}"]
    assert found.alerts == [f"tool_calls: {LEAVING_OUT} (1 rows)", lost]
    one = CALLING.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    both = said("assistant", "", tool_calls=[call(town="Oslo"), call("time", 2, zone="UTC")])
    found = render(one, [ASKED, both, DRY])
    assert found.trained == [f"No, it is dry.{END}"]
    assert lost in found.alerts
    dropping = CALLING.replace("m.content or ''", "m.content if m.content and loop.index0 != 1 else ''")
    found = render(dropping, [ASKED, said("assistant", "Maybe."), ASKED, DRY])
    assert found.trained == [f"No, it is dry.{END}"]
    assert found.alerts == [f"1 message is {LEAVING_OUT}: assistant 1", lost]
    with pytest.raises(DataError, match="QH-D05") as caught:
        render(TWO_ROLES.replace("m.content", "''"), [ASKED, DRY])
    assert f"2 messages are {LEAVING_OUT}: user 1, assistant 1" in caught.value.cause


def test_a_turn_of_which_only_the_frame_is_written_carries_no_loss(render: Render) -> None:
    source = CALLING.replace("m.content or ''", "(m.content or '').split('</think>')[-1]")
    found = render(source, [said("user", "Hi"), said("assistant", "<think>one</think>"), ASKED, DRY])
    assert found.trained == [f"No, it is dry.{END}"]
