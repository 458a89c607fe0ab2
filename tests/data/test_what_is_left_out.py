"""Rows, turns, fields and files that carry no loss: none is trained by mistake, and none left out in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.data import ChatTokenizer, PreparedData
from qlora_hal.data.source.reading import has_splits, open_source
from qlora_hal.errors import DataError

Prepare = Callable[..., PreparedData]
Conversation = Callable[..., dict[str, Any]]
Trained = Callable[..., list[str]]

CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}


def written(path: Path, *rows: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(path: str, split: str = "train") -> list[object]:
    return [row.value["text"] for row in open_source(path, split).rows() if not isinstance(row.value, DataError)]


# splits ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def splits(tmp_path: Path) -> str:
    """A saved dataset: five rows to train on, two for validation, one for the test."""
    import datasets

    datasets.disable_progress_bars()
    rows = {"train": 5, "validation": 2, "test": 1}
    made = {name: datasets.Dataset.from_list([{"text": f"{name} {n}"} for n in range(k)]) for name, k in rows.items()}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "dd"))
    return str(tmp_path / "dd")


def test_a_dataset_with_splits_validates_on_its_validation_rows(splits: str, prepared: Prepare) -> None:
    report = prepared(None, path=splits, validation_path=splits).report
    assert (report.train_sequences, report.validation_sequences, report.leaked_rows) == (5, 2, 0)
    assert report.alerts == []
    assert prepared(None, path=splits, validation_path=splits, validation_split="test").report.validation_sequences == 1


def test_a_split_that_is_not_there_is_refused_with_those_that_are(
    splits: str, prepared: Prepare, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"QH-D50.*no split 'dev'; it has train, validation, test") as caught:
        prepared(None, path=splits, validation_path=splits, validation_split="dev")
    assert caught.value.where == "data.validation_split"
    assert "data.validation_split" in caught.value.fix
    rows = written(tmp_path / "rows.jsonl", {"text": "a"})
    with pytest.raises(DataError, match="has no splits, but the split 'test' was given"):
        prepared(None, path=splits, validation_path=rows, validation_split="test")


def test_validating_on_the_training_rows_is_refused(splits: str, prepared: Prepare, tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "b"})
    with pytest.raises(DataError, match=r"QH-D65.*rows\.jsonl.*are the training rows"):
        prepared(None, path=rows, validation_path=rows)
    with pytest.raises(DataError, match="QH-D65"):
        prepared(None, path=splits, validation_path=splits, validation_split="train")


def test_validation_rows_that_are_also_trained_on_are_told(prepared: Prepare, tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "b"})
    held = written(tmp_path / "held.jsonl", {"text": "b"}, {"text": "c"})
    assert any(
        "1 validation rows are also trained on" in text
        for text in prepared(None, path=rows, validation_path=held).report.alerts
    )


@pytest.mark.parametrize(
    ("train", "held", "test"),
    [
        ("train.jsonl", "validation.jsonl", "test.jsonl"),
        ("train-00000-of-00001.jsonl", "val-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"),
        ("train/0.jsonl", "dev/0.jsonl", "test/0.jsonl"),
        ("my_rows.jsonl", "my_rows_valid.jsonl", "my_rows_test.jsonl"),
    ],
)
def test_a_folder_trains_on_the_files_of_its_split(
    train: str, held: str, test: str, tmp_path: Path, prepared: Prepare
) -> None:
    for file, text in ((train, "a"), (held, "b"), (test, "c")):
        written(tmp_path / "rows" / file, {"text": text})
    folder = str(tmp_path / "rows")
    assert has_splits(folder)
    assert (texts(folder), texts(folder, "validation"), texts(folder, "test")) == (["a"], ["b"], ["c"])
    report = prepared(None, path=folder, validation_path=folder).report
    assert (report.train_sequences, report.validation_sequences) == (1, 1)
    assert f"{folder}: of split train are {train}; not read: " in report.alerts[0]
    assert f"files: {train}" in report.lines()
    with pytest.raises(DataError, match=r"QH-D50.*no file of split 'other'.*test.*validation"):
        texts(folder, "other")


def test_a_folder_of_files_of_one_kind_is_read_whole(tmp_path: Path, prepared: Prepare) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl"):
        written(tmp_path / "rows" / name, {"text": name})
    folder = str(tmp_path / "rows")
    assert not has_splits(folder)
    report = prepared(None, path=folder).report
    assert (report.train_sequences, report.alerts) == (2, [])
    assert "files: train-0.jsonl, train-1.jsonl" in report.lines()


# turns and fields --------------------------------------------------------------------------------------------------


def test_fields_of_messages_that_the_template_does_not_write_are_told(
    prepared: Prepare, chatml: ChatTokenizer, trained_text: Trained
) -> None:
    turns = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    data = prepared([{"messages": turns}] * 8)
    assert data.report.alerts == [
        "tool_call_id: not written by the template (8 rows)",
        "tool_calls: not written by the template (8 rows)",
        "assistant turns that carry no loss, because the template omits what they say or call: 8",
    ]
    assert trained_text(data, chatml) == ["It is sunny.<|im_end|>"]


def test_fields_beside_from_and_value_are_told(prepared: Prepare) -> None:
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y", "thought": "z"}]
    assert prepared([{"conversations": turns}]).report.alerts == ["thought: not written by the template (1 rows)"]


def test_a_turn_that_the_template_writes_from_another_field_is_trained(
    prepared: Prepare, folders: dict[str, Path], tmp_path: Path, trained_text: Trained
) -> None:
    template = tmp_path / "calls.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = ChatTokenizer.from_folder(folders["chatml"], chat_template=str(template))
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    data = prepared([{"messages": turns}], tokenizer=tokenizer)
    assert trained_text(data, tokenizer) == ["weather<|im_end|>"]
    assert data.report.alerts == []


def test_turns_of_weight_0_carry_no_loss(prepared: Prepare, chatml: ChatTokenizer, trained_text: Trained) -> None:
    def row(*weights: object) -> dict[str, Any]:
        turns = [{"role": "assistant", "content": f"answer {n}", "weight": w} for n, w in enumerate(weights)]
        return {"messages": [part for turn in turns for part in ({"role": "user", "content": "x"}, turn)]}

    data = prepared([row(0, 1)])
    assert trained_text(data, chatml) == ["answer 1<|im_end|>"]
    assert data.report.alerts == []
    assert trained_text(prepared([row(1, 1)]), chatml) == ["answer 0<|im_end|>", "answer 1<|im_end|>"]
    assert prepared([row(0), row(1)]).report.train.dropped_untrained == 1
    with pytest.raises(DataError, match=r"QH-D03.*messages\[1\]\.weight holds 0\.5; 0 or 1 was expected"):
        prepared([row(0.5)])
    told = prepared([row(0, 1)], train_on="all").report.alerts
    assert told == ["message fields not used: weight (1 rows)"]


def test_weight_0_is_kept_out_where_the_template_marks_what_is_generated(
    prepared: Prepare, folders: dict[str, Path], trained_text: Trained
) -> None:
    tokenizer = ChatTokenizer.from_folder(folders["generation"])
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a", "weight": 0}]
    turns += [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}]
    assert trained_text(prepared([{"messages": turns}], tokenizer=tokenizer), tokenizer) == ["b<|im_end|>"]


def test_an_answer_without_content_is_not_trained_as_an_end(
    prepared: Prepare, conversation: Conversation, chatml: ChatTokenizer, trained_text: Trained
) -> None:
    data = prepared([conversation("hi", ""), conversation("hi", "ho"), conversation("a", " \n", "b", "c")])
    report = data.report.train
    assert (report.rows_used, report.dropped_untrained, report.empty_turns) == (2, 1, 2)
    assert [trained_text(data, chatml, row) for row in (0, 1)] == [["ho<|im_end|>"], ["c<|im_end|>"]]


def test_a_conversation_without_an_assistant_turn_is_not_trained(prepared: Prepare) -> None:
    silent = {"messages": [{"role": "user", "content": "x", "name": "anna"}]}
    with pytest.raises(DataError, match="QH-D05"):
        prepared([silent])


def test_empty_texts_and_completions_are_dropped_with_a_count(prepared: Prepare) -> None:
    rows = [{"text": ""}, {"text": "kept"}, {"prompt": "x", "completion": ""}, {"text": " \n"}]
    report = prepared(rows).report.train
    assert (report.rows_read, report.rows_used, report.empty_rows) == (4, 1, 3)
    assert "rows: 1 of 4 used; dropped: 3 empty" in report.lines()
    with pytest.raises(DataError, match=r"QH-D01.*0 of 1 rows usable: 1 empty"):
        prepared([{"text": ""}])
