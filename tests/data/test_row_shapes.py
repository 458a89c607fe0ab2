"""Rows as people have them: every spelling is read as what it means, and what cannot be honoured is refused by name."""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_hal.data import ChatTokenizer, PreparedData
from qlora_hal.data.source.reading import open_source
from qlora_hal.data.source.row_formats import Conversation, Writing, example_of, shape_of
from qlora_hal.data.source.rows import Row, memory_source
from qlora_hal.errors import DataError

Prepare = Callable[..., PreparedData]
Trained = Callable[..., list[str]]

SYSTEM = {"role": "system", "content": "Answer in one word."}
ASKED = {"role": "user", "content": "Name a colour."}
ANSWER = {"role": "assistant", "content": "Red."}
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"town": "Oslo"}}}


def read(value: Mapping[str, object]) -> Conversation:
    row = Row(1, "rows.jsonl", 1, value)
    shape = shape_of(value)
    assert shape is not None
    example = example_of(row, shape)
    assert isinstance(example, Conversation)
    return example


def refused(value: Mapping[str, object], code: str = "QH-D03") -> DataError:
    row = Row(1, "rows.jsonl", 1, value)
    with pytest.raises(DataError) as caught:
        example_of(row, shape_of(value) or "messages")
    assert caught.value.code == code
    assert caught.value.where == "rows.jsonl:1"
    return caught.value


# who speaks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize(("speaker", "content"), [("role", "content"), ("from", "value"), ("role", "value")])
@pytest.mark.parametrize(
    ("words", "roles"),
    [
        (("human", "gpt"), ("user", "assistant")),
        (("user", "model"), ("user", "assistant")),
        (("prompter", "bot"), ("user", "assistant")),
        (("observation", "chatgpt"), ("tool", "assistant")),
        (("tool_response", "ai"), ("tool", "assistant")),
        (("function", "assistant"), ("function", "assistant")),
    ],
)
def test_turns_are_read_in_every_spelling(
    key: str, speaker: str, content: str, words: tuple[str, str], roles: tuple[str, str]
) -> None:
    turns = [{speaker: word, content: text} for word, text in zip(words, ("a", "b"), strict=True)]
    wanted = [{"role": role, "content": text} for role, text in zip(roles, ("a", "b"), strict=True)]
    assert read({key: turns}).messages == wanted


def test_a_list_may_mix_spellings_and_a_table_leaves_the_others_empty() -> None:
    mixed = [{"from": "human", "value": "a"}, {"role": "assistant", "content": "b"}]
    wanted = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read({"conversations": mixed}).messages == wanted
    assert "conversations[0].value holds 'b'" in refused({"conversations": [{**ASKED, "value": "b"}]}).message
    filled = [{"role": None, "content": None, **mixed[0]}, {"from": None, "value": None, **mixed[1]}]
    assert [message["role"] for message in read({"messages": None, "conversations": filled}).messages] == [
        "user",
        "assistant",
    ]
    assert read({"text": None, "messages": [ASKED, ANSWER], "conversations": None}).messages == [ASKED, ANSWER]
    both = {"messages": [ASKED, ANSWER], "conversations": [ASKED]}
    assert "The field conversations holds [{'role': 'user'" in refused(both).message
    assert read({"messages": [ASKED, ANSWER], "conversations": [ASKED, ANSWER]}).messages == [ASKED, ANSWER]


@pytest.mark.parametrize(
    ("turn", "code", "said"),
    [
        ({"from": "robot", "value": "x"}, "QH-D03", "conversations[0].from holds 'robot'; one of system, developer"),
        ({"role": "asistant", "content": "x"}, "QH-D12", "The role 'asistant' of conversations[0] is unknown"),
        ({"role": "User", "content": "x"}, "QH-D12", "The role 'User'"),
        ({"from": 3, "value": "x"}, "QH-D03", "conversations[0].from holds a number; a string"),
        ({"from": "gpt", "role": "user", "value": "x"}, "QH-D03", "conversations[0].role holds 'user'"),
        ({"from": "gpt\x1b[31m", "value": "x"}, "QH-D03", r"holds 'gpt\x1b[31m'"),
    ],
)
def test_words_outside_the_list_are_told_by_value(turn: dict[str, object], code: str, said: str) -> None:
    assert said in refused({"conversations": [turn]}, code).message


def test_columns_of_turns_are_turned_into_rows_of_turns() -> None:
    """Arrow and older versions of datasets keep a list of objects as an object of lists."""
    columns = {"from": ["human", "gpt"], "value": ["Name a colour.", "Red."], "weight": [None, 0]}
    example = read({"conversations": columns})
    assert [message["content"] for message in example.messages] == ["Name a colour.", "Red."]
    assert example.untrained == {1}
    assert "holds an object" in refused({"conversations": {"from": ["human"], "value": []}}).message


# the system message and tools ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [ASKED, ANSWER]},
        {"messages": [ASKED, ANSWER]},
        {"conversations": [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Red."}]},
        {"instruction": "Name a colour.", "output": "Red."},
        {"prompt": [ASKED], "completion": [ANSWER]},
    ],
    ids=["role in conversations", "messages", "from", "alpaca", "prompt"],
)
def test_a_system_column_stands_first_whatever_the_spelling(row: dict[str, object], name: str) -> None:
    example = read({**row, name: SYSTEM["content"]})
    assert example.messages == [SYSTEM, ASKED, ANSWER]
    assert example.first_target == (2 if "prompt" in row else 0)
    for empty in ("", None):
        assert read({**row, name: empty}).messages == [ASKED, ANSWER]


def test_a_system_column_moves_the_marks_of_the_turns_with_them() -> None:
    row = {"messages": [ASKED, {**ANSWER, "train": False}, ASKED, ANSWER], "system": "Be brief."}
    assert read(row).untrained == {2}


def test_two_different_system_messages_are_refused() -> None:
    twice = {"messages": [SYSTEM, ASKED, ANSWER], "system": SYSTEM["content"]}
    assert read(twice).messages == [SYSTEM, ASKED, ANSWER]
    error = refused({**twice, "system": "Answer at length."})
    assert "The field system holds 'Answer at length.'; the system message of the turns" in error.message
    assert "system_prompt" in refused({"messages": [ASKED, ANSWER], "system": "a", "system_prompt": "b"}).message


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWER]},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
        {"instruction": "x", "output": "y"},
        {"prompt": [ASKED], "completion": [ANSWER]},
    ],
    ids=["messages", "from", "alpaca", "prompt"],
)
def test_tools_are_handed_on_from_a_list_or_its_json_text(row: dict[str, object]) -> None:
    for form in ([TOOL], json.dumps([TOOL])):
        assert read({**row, "tools": form}).tools == [TOOL]
    no_tools: list[object] = [[], "[]", "", None, "null"]
    assert not any(read({**row, "tools": none}).tools for none in no_tools)
    assert read({**row, "functions": [TOOL["function"]]}).tools == [TOOL]
    assert "tools holds an object" in refused({**row, "tools": TOOL}).message
    assert "tools[0] holds 'rain'" in refused({**row, "tools": ["rain"]}).message
    assert (
        "The field tools holds 'rain'; a list of tools, or its JSON text" in refused({**row, "tools": "rain"}).message
    )


def test_parameters_of_a_tool_as_json_text_are_an_object() -> None:
    """A template writes a text in quotes; Arrow can hold objects of different keys in no other way."""
    row: dict[str, object] = {"messages": [ASKED, ANSWER]}
    described = {"type": "object", "properties": {"town": {"type": "string"}}}
    function = {"name": "rain", "parameters": json.dumps(described)}
    read_as = {"name": "rain", "parameters": described}
    for columns, expected in (
        ({"tools": [{"type": "function", "function": function}]}, {"type": "function", "function": read_as}),
        ({"tools": [function]}, read_as),
        ({"functions": [function]}, {"type": "function", "function": read_as}),
        ({"tools": [{**function, "parameters": ""}]}, {"name": "rain", "parameters": ""}),
    ):
        assert read({**row, **columns}).tools == [expected]
    for wrong in ("town", "[1]"):
        error = refused({**row, "tools": [{"type": "function", "function": {"name": "rain", "parameters": wrong}}]})
        assert "tools[0].function.parameters holds" in error.message


def test_what_stands_beside_a_plain_prompt_and_no_template_writes_is_refused() -> None:
    row = {"prompt": "x", "completion": "y"}
    assert isinstance(example_of(Row(1, "data", 1, row), "prompt_completion"), Writing)
    for more in ({"system": "Be brief."}, {"tools": [TOOL]}):
        error = refused({**row, **more})
        assert f"The field {next(iter(more))} holds" in error.message
        assert "lists of messages" in error.fix


# JSON text in a table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_turns_are_read_from_their_json_text(key: str) -> None:
    assert read({key: json.dumps([ASKED, ANSWER])}).messages == [ASKED, ANSWER]
    assert read({key: json.dumps([{"from": "human", "value": "Name a colour."}])}).messages == [ASKED]
    assert f"The field {key} holds \"[{{'role'" in (error := refused({key: str([ASKED, ANSWER])})).message
    assert "json.dumps" in error.fix
    assert "duplicate" in str(refused({key: '[{"role": "user", "role": "assistant", "content": "x"}]'}).__cause__)


@pytest.mark.parametrize("value", ["[" * 500 + "]" * 500, "[" + "[]," * 300_000 + "[]]"], ids=["deep", "many"])
def test_json_text_inside_a_row_is_bounded_as_rows_are(value: str) -> None:
    """What walks through a value needs Python's stack, and a text of 32 MiB could become a gigabyte of empty lists."""
    calls = f'[{{"function": {{"name": "f", "arguments": {{"a": {value}}}}}}}]'
    for row in (
        {"messages": [ASKED, ANSWER], "tools": f'[{{"a": {value}}}]'},
        {"messages": f'[{{"role": "user", "content": "x", "a": {value}}}]'},
        {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]},
        {"instruction": "x", "output": "y", "history": value},
    ):
        assert "or its JSON text" in refused(row).message or "a list of calls" in refused(row).message


def test_a_row_in_memory_is_bounded_as_rows_of_files_are() -> None:
    deep: list[object] = []
    for _ in range(500):
        deep = [deep]
    found = [row.value for row in memory_source([{"messages": [ASKED, ANSWER], "tools": [{"a": deep}]}]).rows()]
    assert isinstance(found[0], DataError)
    assert "nested more than 100 deep" in found[0].message


def test_prompt_and_completion_as_json_text_of_messages_are_messages() -> None:
    example = read({"prompt": json.dumps([ASKED]), "completion": json.dumps([ANSWER])})
    assert (example.messages, example.first_target) == ([ASKED, ANSWER], 1)
    row = Row(1, "data", 1, {"prompt": "[1, 2]", "completion": '[{"a": 1}]'})
    assert example_of(row, "prompt_completion") == Writing("[1, 2]", '[{"a": 1}]')


def test_rows_of_a_csv_with_messages_and_tools_as_json_text_are_trained(
    prepared: Prepare, chatml: ChatTokenizer, trained_text: Trained
) -> None:
    import csv
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, ["messages", "system"])
    writer.writeheader()
    writer.writerow({"messages": json.dumps([ASKED, ANSWER]), "system": "Be brief."})
    data = prepared(text.getvalue(), name="rows.csv")
    assert trained_text(data, chatml) == ["Red.<|im_end|>"]
    assert chatml.decode(data.train.row(0)[0].tolist(), False).startswith("<|im_start|>system\nBe brief.<|im_end|>")


# calls ---------------------------------------------------------------------------------------------------------------

PLAIN_CALL = {"name": "rain", "arguments": {"town": "Oslo"}}


@pytest.mark.parametrize("given", [PLAIN_CALL, [PLAIN_CALL], CALL, [CALL]])
@pytest.mark.parametrize("word", ["function_call", "tool_call"])
def test_a_call_of_a_sharegpt_row_is_a_call_of_the_assistant(given: object, word: str) -> None:
    for value in (given, json.dumps(given)):
        turns = [
            {"from": word, "value": value},
            {"from": "observation", "value": "no"},
            {"from": "gpt", "value": "No."},
        ]
        assert read({"conversations": turns}).messages == [
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "no"},
            {"role": "assistant", "content": "No."},
        ]


@pytest.mark.parametrize("value", ["rain(Oslo)", "{}", '{"name": "rain"}', "[]", '["rain"]', 3, None])
def test_a_call_that_is_none_is_told_by_value(value: object) -> None:
    error = refused({"conversations": [{"from": "function_call", "value": value}]})
    assert "conversations[0].value holds" in error.message
    assert "an object with name and arguments" in error.message


def test_calls_in_older_forms_are_brought_into_the_form_of_templates() -> None:
    older = {"role": "assistant", "content": None, "function_call": PLAIN_CALL}
    assert read({"messages": [ASKED, older]}).messages[1] == {"role": "assistant", "tool_calls": [CALL]}
    as_text = {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])}
    assert read({"messages": [ASKED, as_text]}).messages[1]["tool_calls"] == [CALL]
    assert "tool_calls holds an object" in refused({"messages": [ASKED, {**ANSWER, "tool_calls": CALL}]}).message
    both = {**older, "tool_calls": [CALL]}
    assert "messages[1].function_call holds" in refused({"messages": [ASKED, both]}).message
    nothing: dict[str, object] = {"role": "assistant", "content": None, "tool_calls": []}
    assert "messages[1].content holds null" in refused({"messages": [ASKED, nothing]}).message


def test_contents_in_parts_are_handed_on_as_parts() -> None:
    parts = ["Name ", {"type": "input_text", "text": "a colour.", "id": None}]
    example = read({"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert example.messages[0]["content"] == [{"type": "text", "text": "Name "}, {"type": "text", "text": "a colour."}]
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": "x", "text": "caption"}]}
    assert "messages[0].content[0].type holds 'image_url'; text" in refused({"messages": [picture]}).message
    thought = {"role": "user", "content": [{"type": "text", "text": 3}]}
    assert "messages[0].content[0].text holds a number" in refused({"messages": [thought]}).message


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_a_call_without_a_name_is_refused(name: object) -> None:
    for call in ({"function": {"name": name, "arguments": {}}}, {"name": name, "arguments": {}}, {"function": None}):
        asking = {"role": "assistant", "content": "", "tool_calls": [CALL, call]}
        assert "messages[1].tool_calls[1] holds {" in (error := refused({"messages": [ASKED, asking]})).message
        assert "a call with the name of a function was expected" in error.message
        older = {"role": "assistant", "content": None, "function_call": call}
        assert "messages[1].function_call holds {" in refused({"messages": [ASKED, older]}).message


# thoughts, flags and values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize(("value", "kind"), [(["a"], "a list"), ({"text": "a"}, "an object"), (True, "a boolean")])
def test_reasoning_that_is_no_text_is_refused_by_its_type(name: str, value: object, kind: str) -> None:
    error = refused({"messages": [ASKED, {**ANSWER, name: value}]})
    assert error.message == f"The field messages[1].{name} holds {kind}; a string was expected."
    calling = {"from": "function_call", "value": PLAIN_CALL, name: value}
    assert f"conversations[0].{name} holds {kind}; a string" in refused({"conversations": [calling]}).message


def test_reasoning_that_differs_under_two_names_is_refused() -> None:
    given = {**ANSWER, "reasoning_content": "a", "thinking": "", "reasoning": "a"}
    assert read({"messages": [ASKED, given]}).messages[1] == given
    error = refused({"messages": [ASKED, {**given, "reasoning": "b"}]})
    assert "messages[1].reasoning holds 'b'; what reasoning_content holds, or nothing, was expected" in error.message


FLAGS = [("train", False), ("weight", 0), ("loss_mask", 0), ("masked", True), ("mask", 1), ("train_detail", "x")]


@pytest.mark.parametrize(("name", "value"), FLAGS)
def test_a_part_of_an_answer_that_asks_for_no_loss_is_refused(name: str, value: object) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", name: value}]
    error = refused({"messages": [ASKED, {"role": "assistant", "content": parts}]})
    assert f"messages[1].content[1].{name} holds {value!r}; nothing, for a turn is trained whole" in error.message
    assert "Mark the whole turn" in error.fix


def test_flags_of_parts_that_say_what_holds_anyway_are_taken_out() -> None:
    answer = {"role": "assistant", "content": [{"type": "text", "text": "b", "train": True, "masked": 0}]}
    asked = {"role": "user", "content": [{"type": "text", "text": "a", "train": False}]}
    assert [message["content"] for message in read({"messages": [asked, answer]}).messages] == [
        [{"type": "text", "text": "a"}],
        [{"type": "text", "text": "b"}],
    ]
    pictured = {"role": "user", "content": [{"type": "text", "text": "a", "image": "p.png"}]}
    assert "messages[0].content[0].image holds 'p.png'" in refused({"messages": [pictured, ANSWER]}).message


@pytest.mark.parametrize(("name", "value"), FLAGS[:-1])
@pytest.mark.parametrize(
    "row",
    [{"prompt": "x", "completion": "y"}, {"messages": [ASKED, ANSWER]}, {"text": "z"}],
    ids=["pc", "chat", "text"],
)
def test_a_row_that_asks_for_no_loss_is_refused(name: str, value: object, row: dict[str, object]) -> None:
    assert f"The field {name} holds {value!r}; " in refused({**row, name: value}).message
    # A table of text alone holds the same words.
    assert f"The field {name} holds" in refused({**row, name: str(value)}).message
    for asked in (not value, str(not value)):
        example_of(Row(1, "data", 1, {**row, name: asked}), shape_of(row) or "text")


def test_a_column_of_such_a_name_that_holds_no_flag_is_like_any_other() -> None:
    for column in ({"loss": 2.31}, {"loss": "0.7"}, {"mask": [0, 1]}, {"train_detail": "first half"}):
        row = {"prompt": "x", "completion": "y", **column}
        example_of(Row(1, "data", 1, row), shape_of(row) or "text")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (datetime.date(2026, 1, 1), "holds date; text, a number"),
        (decimal.Decimal("1.5"), "holds Decimal; text, a number"),
        (b"ab", "holds bytes; text, a number"),
        (float("nan"), "holds nan; a finite number"),
        (float("-inf"), "holds -inf; a finite number"),
        ({1: "a"}, "holds 1; an object whose keys are strings"),
        (np.ones(2), "holds ndarray; text, a number"),
    ],
)
def test_values_that_json_has_no_form_for_are_refused_by_their_place(value: object, said: str) -> None:
    call = {"function": {"name": "rain", "arguments": {"days": [value]}}}
    turns = [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert f"messages[1].tool_calls[0].function.arguments.days[0] {said}" in refused({"messages": turns}).message
    tool = {"function": {"name": "rain", "default": value}}
    assert f"tools[0].function.default {said}" in refused({"messages": [ASKED, ANSWER], "tools": [tool]}).message
    assert f"messages[1].weight {said}" in refused({"messages": [ASKED, {**ANSWER, "weight": value}]}).message


def test_a_column_in_memory_of_a_type_that_no_file_has_is_refused(prepared: Prepare) -> None:
    with pytest.raises(DataError, match=r"QH-D03.*The field weight holds ndarray") as caught:
        prepared([{"text": "a"}, {"messages": [ASKED, ANSWER], "weight": np.ones(2)}])
    assert caught.value.where == "data:2"


@pytest.mark.parametrize("row", ['{"messages": [], "score": 1e400}', '[{"text": "a", "score": [-1e999]}]'])
def test_a_number_too_large_for_json_is_refused_where_it_stands(row: str, prepared: Prepare) -> None:
    with pytest.raises(DataError, match=r"QH-D04.*-?1e\d+ is too large for a number") as caught:
        prepared(row, name="rows.json")
    assert caught.value.where.startswith("rows.json:1:")


@pytest.mark.parametrize(
    "turn", [{"name": "a", "role": "user", "content": "b"}, {"value": "b", "x": 1, "from": "human"}]
)
def test_the_fields_of_a_message_keep_their_order(turn: dict[str, object]) -> None:
    today = {"from": "role", "value": "content"}
    assert list(read({"conversations": [turn, ANSWER]}).messages[0]) == [today.get(key, key) for key in turn]


# history -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "history",
    [
        [["Name a country.", "France."]],
        json.dumps([["Name a country.", "France."]]),
        [{"role": "user", "content": "Name a country."}, {"role": "assistant", "content": "France."}],
        [{"from": "human", "value": "Name a country."}, {"from": "gpt", "value": "France."}],
    ],
    ids=["pairs", "text", "role", "from"],
)
def test_the_history_of_an_alpaca_row_stands_before_it(
    history: object, prepared: Prepare, chatml: ChatTokenizer, trained_text: Trained
) -> None:
    row = {
        "instruction": "And its capital?",
        "input": "",
        "output": "Paris.",
        "history": history,
        "system": "Be brief.",
    }
    assert [message["content"] for message in read(row).messages] == [
        "Be brief.", "Name a country.", "France.", "And its capital?", "Paris.",
    ]  # fmt: skip
    data = prepared([row])
    assert trained_text(data, chatml) == ["France.<|im_end|>", "Paris.<|im_end|>"]
    assert data.report.train.unused_columns == []
    no_history: list[object] = [[], "[]", None, ""]
    assert {len(read({**row, "history": empty}).messages) for empty in no_history} == {3}


@pytest.mark.parametrize("history", [[["a"]], [["a", "b", "c"]], ["a", "b"], [["a", 1]], {"a": "b"}, "a: b"])
def test_a_history_of_another_form_is_told_by_value(history: object) -> None:
    assert "history" in refused({"instruction": "x", "output": "y", "history": history}).message


@pytest.mark.parametrize("instruction", ["", " \n"])
def test_an_alpaca_row_whose_question_is_its_input_begins_with_it(instruction: str) -> None:
    row = {"instruction": instruction, "input": "Which river?", "output": "The Danube."}
    assert [message["content"] for message in read(row).messages] == ["Which river?", "The Danube."]


# what is trained -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "off", "on"),
    [
        *[(name, off, on) for name in ("weight", "loss_weight", "loss_mask") for off, on in ((0, 1), (0.0, 1.0))],
        *[(name, False, True) for name in ("train", "training", "trainable", "loss", "weight")],
        ("masked", True, False),
    ],
)
@pytest.mark.parametrize("spelling", [("role", "content", "assistant"), ("from", "value", "gpt")])
def test_flags_of_a_turn_are_honoured(
    name: str, off: object, on: object, spelling: tuple[str, str, str], prepared: Prepare, chatml: ChatTokenizer,
    trained_text: Trained,
) -> None:  # fmt: skip
    speaker, content, word = spelling
    turns = [
        {speaker: "user", content: "Name a colour."}, {speaker: word, content: "Go away.", name: off},
        {speaker: "user", content: "Name a colour."}, {speaker: word, content: "Red.", name: on},
        {speaker: "user", content: "Name a colour."}, {speaker: word, content: "Blue.", name: None},
    ]  # fmt: skip
    data = prepared([{"conversations": turns}])
    assert trained_text(data, chatml) == ["Red.<|im_end|>", "Blue.<|im_end|>"]
    assert data.report.alerts == []
    told = prepared([{"conversations": turns}], train_on="all").report.alerts
    assert told == [f"message fields not used: {name} (1 rows)"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"weight": 0.5}, "messages[1].weight holds 0.5; 0 or 1"),
        ({"loss_weight": 2}, "messages[1].loss_weight holds 2; 0 or 1"),
        ({"train": "no"}, "messages[1].train holds 'no'; 0 or 1"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "messages[1].train_detail holds"),
        ({"mask": True}, "messages[1].mask holds True; train, weight"),
        ({"train": True, "weight": 0}, "messages[1] holds {'weight': 0, 'train': True}; one value"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused_by_name_and_value(flags: dict[str, object], said: str) -> None:
    assert said in refused({"messages": [ASKED, {**ANSWER, **flags}]}).message


def test_a_flag_that_asks_for_loss_on_another_role_is_told(prepared: Prepare) -> None:
    asked = prepared([{"messages": [{**ASKED, "train": True}, ANSWER]}])
    assert asked.report.alerts == ["train: not written by the template (1 rows)"]
    assert prepared([{"messages": [{**ASKED, "train": False}, ANSWER]}]).report.alerts == []


# other objectives ----------------------------------------------------------------------------------------------------

TURNS = [{"from": "human", "value": "Name a colour."}]
PREFERENCES: list[dict[str, object]] = [
    {"conversations": TURNS, "chosen": {"from": "gpt", "value": "Red."}, "rejected": {"from": "gpt", "value": "No."}},
    {"messages": [ASKED, ANSWER], "rejected_response": "No."},
    {"messages": [ASKED, ANSWER], "rejected_messages": [ASKED, ANSWER]},
    {"prompt": "x", "chosen": "y", "rejected": "z"},
    {"chosen": "y", "rejected": "z"},
    {"prompt": "x", "completion": "y", "rejected": "z"},
    {"instruction": "x", "output": "y", "chosen": "y", "rejected": "z"},
    {"prompt": "x", "completion": "y", "label": False},
    {"prompt": [ASKED], "completion": [ANSWER], "label": True},
    {"prompt": "x", "completion": "y", "label": "False"},
    {"messages": [ASKED, ANSWER], "label": True},
    {"messages": [ASKED, ANSWER], "kto_tag": False},
    {"prompt": "x", "completion": "y", "desirable": False},
    {"messages": [ASKED, ANSWER], "score_chosen": 9.0, "score_rejected": 2.0},
    {"conversation_a": [ASKED, ANSWER], "conversation_b": [ASKED, ANSWER], "winner": "model_a"},
    {"text": "x", "rejected": "y"},
    {"messages": [ASKED, {**ANSWER, "rejected": "No."}]},
]


@pytest.mark.parametrize("row", PREFERENCES, ids=lambda row: "+".join(row))
def test_rows_that_compare_answers_are_refused_until_preferences_are_trained(
    row: dict[str, object], prepared: Prepare
) -> None:
    with pytest.raises(DataError, match=r"QH-D03.*compares answers .*preference training"):
        prepared([row])
    good = {"messages": [ASKED, ANSWER]}
    assert prepared([good, row], on_bad_row="skip").report.train.bad_row_count == 1


def test_empty_columns_of_a_comparison_and_classes_of_a_text_are_no_preferences(prepared: Prepare) -> None:
    rows: list[dict[str, object]] = [
        {"messages": [ASKED, ANSWER], "chosen": None, "rejected": [], "label": None},
        {"text": "a review", "label": 1},
        {"messages": [ASKED, ANSWER], "label": "colours"},
    ]
    assert prepared(rows).report.train.rows_used == 3


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("weight", 0.0), ("sample_weight", 2), ("loss_weight", 0.5), ("images", ["a.png"]), ("video", "a.mp4"),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)  # fmt: skip
def test_columns_that_ask_for_more_than_text_are_refused_by_name(column: str, value: object) -> None:
    for row in ({"messages": [ASKED, ANSWER]}, {"prompt": "x", "completion": "y"}):
        assert f"The field {column} holds" in refused({**row, column: value}).message
        no_value: list[object] = [None, [], ""]
        for harmless in no_value:
            example_of(Row(1, "data", 1, {**row, column: harmless}), shape_of(row) or "messages")


# what is not read is told ---------------------------------------------------------------------------------------------


def test_columns_that_only_rows_of_another_shape_use_are_told(prepared: Prepare) -> None:
    rows: list[dict[str, object]] = [
        {"messages": [ASKED, ANSWER], "input": "lost?"},
        {"instruction": "x", "output": "y", "input": "z"},
        {"text": "x", "system": "lost?"},
    ]
    assert prepared(rows).report.train.unused_columns == ["input", "system"]


def test_parquet_rows_show_no_keys_that_only_other_rows_have(tmp_path: Path) -> None:
    """Arrow gives every object of a column the keys of all: one tool would show the parameters of the other."""
    import pyarrow
    from pyarrow import parquet

    def row(name: str, *parameters: str) -> dict[str, Any]:
        properties = {parameter: {"type": "string"} for parameter in parameters}
        function = {"name": name, "parameters": {"type": "object", "properties": properties}}
        arguments = dict.fromkeys(parameters, "x")
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        turns = [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"messages": turns, "tools": [{"type": "function", "function": function}]}

    rows = [row("rain", "town"), row("add", "one", "two")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = [read(value.value) for value in open_source(str(tmp_path / "rows.parquet")).rows()]  # type: ignore[arg-type]
    assert [example.tools for example in found] == [given["tools"] for given in rows]
    assert [example.messages[1]["tool_calls"] for example in found] == [
        given["messages"][1]["tool_calls"] for given in rows
    ]
    import datasets

    from qlora_hal.data.source.in_memory import rows_in_memory

    in_memory = rows_in_memory(datasets.Dataset.from_list(rows))
    assert [row["tools"] for row in in_memory] == [given["tools"] for given in rows]


def test_texts_that_a_table_calls_json_are_read(tmp_path: Path) -> None:
    """`datasets` keeps tools, arguments and whole turns so, where their objects have no keys in common."""
    import datasets

    datasets.disable_progress_bars()
    parameters: list[dict[str, object]] = [{"type": "object", "properties": {"town": {"type": "string"}}}, {"a": 1}]
    tools = [{"type": "function", "function": {"name": "rain", "parameters": held}} for held in parameters]
    called = {"type": "function", "function": {"name": "rain", "arguments": {"town": "x"}}}
    turns = [ASKED, {"role": "assistant", "content": "42", "tool_calls": [called]}]
    text = datasets.Value("string")
    tool = {"type": text, "function": {"name": text, "parameters": datasets.Json()}}
    for turn in (datasets.Json(), {"role": text, "content": text, "tool_calls": datasets.List(datasets.Json())}):
        features = datasets.Features({"messages": datasets.List(turn), "tools": datasets.List(tool)})
        made = datasets.Dataset.from_list([{"messages": turns, "tools": tools}], features=features)
        made.to_parquet(str(tmp_path / "rows.parquet"))
        example = read(next(iter(open_source(str(tmp_path / "rows.parquet")).rows())).value)  # type: ignore[arg-type]
        assert (example.messages, example.tools) == (turns, tools)


# any row at all ------------------------------------------------------------------------------------------------------

keys = st.sampled_from(
    ["messages", "conversations", "prompt", "completion", "instruction", "output", "input", "history", "system",
     "tools", "functions", "text", "chosen", "label", "weight", "role", "content", "from", "value", "tool_calls",
     "function_call", "train", "masked", "train_detail", "type"]
)  # fmt: skip
leaves = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, 0.5, "", "user", "gpt", "function_call", "a", "[{", '[{"role": "user"}]'])
)
values = st.recursive(
    leaves, lambda held: st.lists(held, max_size=3) | st.dictionaries(keys, held, max_size=4), max_leaves=12
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(row=st.dictionaries(keys, values, min_size=1, max_size=4))
def test_any_row_is_an_example_or_one_of_our_errors(row: dict[str, object]) -> None:
    shape = shape_of(row)
    if shape is None:
        return
    example = None
    with suppress(DataError):
        example = example_of(Row(1, "data", 1, row), shape)
    if isinstance(example, Conversation):
        assert all(isinstance(message["role"], str) for message in example.messages)
        assert all(number < len(example.messages) for number in example.untrained)
        assert not example.plain or all(message.keys() == {"role", "content"} for message in example.messages)


# tables of objects ---------------------------------------------------------------------------------------------------


def _arrow_turns(arguments: Any, values: list[object]) -> Any:
    """A column of conversations in which a call has arguments of one Arrow type."""
    import pyarrow as arrow

    call = arrow.struct([("function", arrow.struct([("name", arrow.string()), ("arguments", arguments)]))])
    turn = arrow.struct([("role", arrow.string()), ("content", arrow.string()), ("tool_calls", arrow.list_(call))])
    rows = [
        [ASKED, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "rain", "arguments": held}}]}]
        for held in values
    ]
    return arrow.array(rows, type=arrow.list_(turn))


def _parquet_rows(path: Path, **columns: Any) -> list[Row]:
    import pyarrow as arrow
    from pyarrow import parquet

    parquet.write_table(arrow.table(columns), path)
    return list(open_source(str(path)).rows())


def test_a_map_of_a_table_is_an_object_with_the_keys_of_its_own(tmp_path: Path) -> None:
    import pyarrow as arrow

    given: list[object] = [[("town", "Oslo"), ("zone", None)], []]
    column = _arrow_turns(arrow.map_(arrow.string(), arrow.string()), given)
    first, second = _parquet_rows(tmp_path / "rows.parquet", messages=column)
    assert isinstance(first.value, Mapping)
    assert isinstance(second.value, Mapping)
    call = {"function": {"name": "rain", "arguments": {"town": "Oslo", "zone": None}}}
    assert read(first.value).messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert second.value["messages"][1]["tool_calls"][0]["function"]["arguments"] == {}


def test_a_map_with_a_key_twice_is_a_bad_row_and_no_other_is(tmp_path: Path) -> None:
    import pyarrow as arrow

    given: list[object] = [[("town", "Oslo")], [("town", "Oslo"), ("town", "Rome")], [("town", "Rome")]]
    column = _arrow_turns(arrow.map_(arrow.string(), arrow.string()), given)
    rows = _parquet_rows(tmp_path / "rows.parquet", messages=column)
    assert [isinstance(row.value, DataError) for row in rows] == [False, True, False]
    assert isinstance(rows[1].value, DataError)
    assert (rows[1].value.code, rows[1].value.where) == ("QH-D04", "rows.parquet:2:1")


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        ("timestamp[s]", datetime.datetime(2020, 1, 1), "datetime"),
        ("binary", b"ab", "bytes"),
        ("float64", float("nan"), "nan"),
    ],
)
def test_what_a_table_alone_can_hold_is_refused_inside_a_call_and_no_matter_beside_it(
    kind: str, value: object, said: str, tmp_path: Path, prepared: Prepare
) -> None:
    import pyarrow as arrow

    typed = arrow.type_for_alias(kind)
    column = _arrow_turns(arrow.struct([("when", typed)]), [{"when": value}])
    _parquet_rows(tmp_path / "rows.parquet", messages=column)
    with pytest.raises(DataError, match=rf"QH-D03.*arguments\.when holds {said}; ") as caught:
        prepared(None, path=str(tmp_path / "rows.parquet"))
    assert caught.value.where == "rows.parquet:1"
    beside = {"text": arrow.array(["a"]), "made": arrow.array([value], type=typed)}
    _parquet_rows(tmp_path / "rows.parquet", **beside)
    assert prepared(None, path=str(tmp_path / "rows.parquet")).report.train.unused_columns == ["made"]


def test_a_flat_tool_of_a_table_has_no_keys_of_its_neighbours(tmp_path: Path) -> None:
    import pyarrow as arrow

    tools = [[{"name": "rain", "description": "tells rain"}, {"name": "time"}]]
    (row,) = _parquet_rows(tmp_path / "rows.parquet", messages=arrow.array([[ASKED, ANSWER]]), tools=arrow.array(tools))
    assert isinstance(row.value, Mapping)
    assert read(row.value).tools == tools[0]
