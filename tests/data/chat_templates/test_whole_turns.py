"""What a chat template writes is the truth: what is trained is the whole turn of the assistant."""

from __future__ import annotations

import json

import pytest
from data.chat_templates.conversations import (
    ASKED,
    CALLING,
    DRY,
    END,
    LEAVING_OUT,
    RAIN,
    RESULT,
    REWRITING,
    TIME,
    TOOLS,
    Message,
    Render,
    call,
    said,
)


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (said("assistant", "I will check.", tool_calls=[call(town="Oslo")]), f"I will check.\n{RAIN}{END}"),
        (said("assistant", "", tool_calls=[call(town="Oslo")]), f"{RAIN}{END}"),
        (said("assistant", None, tool_calls=[call(town="Oslo")]), f"{RAIN}{END}"),
        (said("assistant", "Both.", tool_calls=[call(town="Oslo"), call("time", 2)]), f"Both.\n{RAIN}\n{TIME}{END}"),
        (said("assistant", "<call>", tool_calls=[call(town="Oslo")]), f"<call>\n{RAIN}{END}"),
        (said("assistant", "  I will check.\n", tool_calls=[call(town="Oslo")]), f"  I will check.\n\n{RAIN}{END}"),
    ],
)
@pytest.mark.parametrize(("source", "thought"), [(CALLING, ""), (REWRITING, "<think></think>")])
def test_a_turn_with_calls_is_trained_whole_and_nothing_is_put_into_the_text(
    source: str, thought: str, turn: Message, expected: str, render: Render
) -> None:
    found = render(source, [ASKED, turn, RESULT, DRY], TOOLS)
    assert found.trained == [expected, f"{thought}No, it is dry.{END}"]
    assert found.ids == found.theirs(tokenize=True)
    last = render(source, [ASKED, turn], TOOLS)
    assert last.trained == [thought + expected]
    assert last.ids == last.theirs(tokenize=True)


def test_reasoning_is_trained_where_the_template_writes_it_and_told_where_it_does_not(render: Render) -> None:
    thought = said("assistant", "Four.", reasoning_content="2+2=4")
    found = render(CALLING, [said("user", "Two and two?"), thought])
    assert found.trained == [f"<think>2+2=4</think>Four.{END}"]
    assert found.alerts == []
    found = render(CALLING, [said("user", "Two and two?"), thought, said("user", "Sure?"), said("assistant", "Yes.")])
    assert found.trained == [f"Four.{END}", f"Yes.{END}"]
    assert found.ids == found.theirs(tokenize=True)
    assert found.alerts == [f"reasoning: {LEAVING_OUT} (1 rows)"]


@pytest.mark.parametrize("given", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
def test_reasoning_is_one_thing_under_any_of_its_names(given: str, read: str, render: Render) -> None:
    """transformers fills one in from another too, but not every allowed release does: it is given what is read."""
    source, asked = CALLING.replace("reasoning_content", read), said("user", "Two and two?")
    found = render(source, [asked, said("assistant", "Four.", **{given: "2+2=4"})])
    assert found.trained == [f"<think>2+2=4</think>Four.{END}"]
    assert found.ids == found.theirs([asked, said("assistant", "Four.", **{read: "2+2=4"})], tokenize=True)
    assert found.alerts == []


def test_a_turn_without_loss_leaves_the_other_turns_whole(render: Render) -> None:
    turn = said("assistant", "I will check.", tool_calls=[call(town="Oslo")], weight=0)
    assert render(CALLING, [ASKED, turn, RESULT, DRY], TOOLS).trained == [f"No, it is dry.{END}"]


@pytest.mark.parametrize(
    ("reads", "given", "form"),
    [
        ("one.function.arguments.items() | list", '{"town": "Oslo"}', "objects"),
        ("one.function.arguments + ''", {"town": "Oslo"}, "text"),
    ],
)
def test_arguments_are_given_in_the_form_that_a_template_takes_with_a_note(
    reads: str, given: object, form: str, render: Render
) -> None:
    source = CALLING.replace("one.function.arguments", reads)
    turn = said("assistant", "", tool_calls=[{"function": {"name": "rain", "arguments": given}}])
    found = render(source, [ASKED, turn])
    assert "Oslo" in found.trained[0]
    assert (
        f"the arguments of calls were given to the template as {form} in 1 rows: it accepts no other form"
        in found.notes
    )


WITHOUT_QUOTES = CALLING.replace(
    "({'name': one.function.name, 'arguments': one.function.arguments} | tojson)",
    "one.function.name ~ ' ' ~ (one.function.arguments if one.function.arguments is string "
    "else one.function.arguments | tojson)",
)


@pytest.mark.parametrize("arguments", [{"town": "Oslo", "days": 2}, {"a": {"b": ['"', "\\"]}}, {}])
def test_arguments_as_text_are_trained_as_the_object_they_hold_where_they_would_be_quoted(
    arguments: dict[str, object], render: Render
) -> None:
    def calling(given: object) -> list[Message]:
        return [ASKED, said("assistant", "", tool_calls=[{"function": {"name": "rain", "arguments": given}}])]

    found = render(CALLING, calling(json.dumps(arguments)))
    assert found.ids == render(CALLING, calling(arguments)).ids
    assert found.notes == [
        "the arguments of calls were given to the template as objects in 1 rows: "
        "it would write their JSON text as a string, in quotes"
    ]
    text = json.dumps(arguments, separators=(" ,", ": "))
    written = render(WITHOUT_QUOTES, calling(text))
    assert f"<call>rain {text}</call>" in written.text
    assert written.notes == []
    assert written.ids == written.theirs(tokenize=True)


def test_text_that_is_no_object_stays_the_text_that_it_is(render: Render) -> None:
    for text in ("Oslo", '{"town": NaN}', '["Oslo"]'):
        turn = said("assistant", "", tool_calls=[{"function": {"name": "rain", "arguments": text}}])
        found = render(CALLING, [ASKED, turn])
        assert json.dumps(text) in found.trained[0]
        assert found.notes == []
