"""The data rows of the fault catalogue: what a user sees, and what must not happen."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_hal.config.schema import DataConfig
from qlora_hal.data import ChatTokenizer, PreparedData, WindowSampler, prepare
from qlora_hal.data.source import reading, row_files
from qlora_hal.errors import ConfigError, DataError, HubError, QloraHalError, StorageError

Prepare = Callable[..., PreparedData]
Conversation = Callable[..., dict[str, Any]]
Trained = Callable[..., list[str]]


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.fault("D01")
def test_source_without_rows_is_refused_with_counts(prepared: Prepare, conversation: Conversation) -> None:
    for text in ("", "\n\n"):
        with pytest.raises(DataError, match=r"QH-D01.*0 of 0 rows usable: the source is empty") as caught:
            prepared(text)
        assert caught.value.exit_status == 4
    rows = [conversation("a " * 60, "b")] * 3
    with pytest.raises(DataError, match=r"QH-D01.*0 of 3 rows usable: 3 over max length 16"):
        prepared(rows, max_seq_length=16, truncation="drop")


@pytest.mark.fault("D02")
def test_fewer_rows_than_a_batch_run_with_a_note(
    prepared: Prepare, conversation: Conversation, chatml: ChatTokenizer
) -> None:
    data = prepared([conversation("a", f"b {n}") for n in range(3)])
    sampler = WindowSampler(
        data.train, batch_size=8, accumulation=2, seed=0, shuffle=True, group_by_length=True, packing=False,
        max_seq_length=64, pad_id=chatml.pad_id,
    )  # fmt: skip
    assert sampler.steps_per_epoch == 1
    window = sampler.window(0)
    assert [batch.input_ids.shape[0] for batch in window] == [3]
    assert "3 sequences are fewer than the 16 of one step" in sampler.notes[0]


@pytest.mark.fault("D03")
@pytest.mark.parametrize(
    ("row", "field", "got", "wanted"),
    [
        ({"messages": None}, "messages", "null", "a list of at least one message"),
        ({"messages": []}, "messages", "an empty list", "a list of at least one message"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "null", "a string"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "nothing (the key is missing)", "a string"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "nothing (the key is missing)", "a string"),
        ({"messages": [{"role": [], "content": "x"}]}, "messages[0].role", "an empty list", "a string"),
        ({"messages": ["x"]}, "messages[0]", "a string", "an object with role and content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "a number", "a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0].type",
            "'image'",
            "text was",
        ),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "conversations[0].from", "'robot'", "one of system"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "conversations[0].value", "null", "a string"),
        ({"instruction": "x", "output": 1.5}, "output", "a number", "a string"),
        ({"prompt": "x", "completion": []}, "completion", "an empty list", "a string, as prompt is,"),
        ({"prompt": [], "completion": []}, "prompt", "an empty list", "a list of at least one message"),
        ({"text": True}, "text", "a boolean", "a string"),
    ],
)
def test_wrong_field_names_file_line_field_got_and_wanted(
    row: object, field: str, got: str, wanted: str, prepared: Prepare, conversation: Conversation
) -> None:
    text = lines(conversation("a", "b"), row, conversation("c", "d"))
    with pytest.raises(DataError) as caught:
        prepared(text)
    error = caught.value
    assert error.code == "QH-D03"
    assert error.where == "rows.jsonl:2"
    assert f"The field {field} holds {got}; {wanted}" in error.message
    report = prepared(text, on_bad_row="skip").report.train
    assert (report.rows_read, report.rows_used, report.bad_row_count) == (3, 2, 1)
    assert report.bad_rows[0].startswith("rows.jsonl:2: The field")


@pytest.mark.fault("D03")
def test_row_without_known_keys_lists_the_shapes(prepared: Prepare) -> None:
    with pytest.raises(DataError, match=r"QH-D03.*keys reply, title.*keys prompt and completion"):
        prepared([{"title": "a", "reply": "b"}])
    with pytest.raises(DataError, match=r"QH-D03.*A row is a list"):
        prepared("[1]\n")


@pytest.mark.fault("D04")
@pytest.mark.parametrize(
    ("line", "column", "reason"),
    [
        (b'{"text": "a",}', 14, "a comma precedes the end"),
        (b'{"text": NaN}', 10, "NaN is not JSON"),
        (b'{"text": "a"', 13, "delimiter"),
        (b"{'text': 'a'}", 2, "single quotes"),
        (b'{"text": "\xff"}', 11, "byte 0xff is not UTF-8 text"),
        (b'{"text": "a"} x', 15, "extra data"),
        (b"[" * 100_000, 1, "nested too deeply"),
    ],
)
def test_malformed_line_names_file_line_and_column(line: bytes, column: int, reason: str, prepared: Prepare) -> None:
    good = b'{"text": "good"}\n'
    with pytest.raises(DataError, match="QH-D04") as caught:
        prepared(good + line + b"\n" + good)
    assert caught.value.where == f"rows.jsonl:2:{column}"
    assert reason in caught.value.message
    report = prepared(good + line + b"\n" + good, on_bad_row="skip").report.train
    assert (report.rows_used, report.bad_row_count) == (2, 1)


@pytest.mark.fault("D04")
@pytest.mark.parametrize("indent", [0, 2])
@pytest.mark.parametrize(
    "rows", [{"text": "a", "more": [1, 2]}, [{"text": "a"}, {"text": "b"}]], ids=["object", "list"]
)
def test_json_over_several_lines_is_told_that_a_jsonl_holds_one_object_a_line(
    rows: object, indent: int, prepared: Prepare
) -> None:
    with pytest.raises(
        DataError, match=r"goes on in the next line.*\(\.jsonl\) hold one object on each line"
    ) as caught:
        prepared(json.dumps(rows, indent=indent))
    assert (caught.value.code, caught.value.where) == ("QH-D04", "rows.jsonl:1:2")
    assert "on a line of its own" in caught.value.fix


@pytest.mark.fault("D04")
def test_a_line_that_ends_behind_a_comma_goes_on_in_the_next(prepared: Prepare) -> None:
    with pytest.raises(DataError, match="goes on in the next line"):
        prepared('{"text": "a",\n"more": 1}\n')


def test_a_column_without_a_name_is_shown_as_such(prepared: Prepare) -> None:
    """pandas writes its index so."""
    assert "columns not used: ''" in prepared(",text\n0,a b\n1,c d\n", name="rows.csv").report.lines()


@pytest.mark.fault("D04")
def test_byte_order_mark_and_crlf_change_nothing(prepared: Prepare) -> None:
    plain = prepared(b'{"text": "a b"}\n{"text": "c d"}\n')
    odd = prepared(b'\xef\xbb\xbf{"text": "a b"}\r\n\r\n{"text": "c d"}\r\n')
    assert odd.train.tokens.tolist() == plain.train.tokens.tolist()
    with pytest.raises(DataError, match=r"QH-D04.*UTF-16"):
        prepared('{"text": "a"}\n'.encode("utf-16"))


@pytest.mark.fault("D04")
@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        ('[{"text": "a"},\n {"text": "b"},\n]', "3:1", "a comma precedes the end of the list"),
        ('[{"text": "a"}\n {"text": "b"}]', "2:2", "was expected"),
        ('[{"text": "a"},\n {"text": b}]', "2:11", "expecting value"),
        ('[{"text": "a"}] x', "1:17", "something follows"),
        ('[{"text": "a"}, {"text": "b"},\n {"text": "c"}, {"text": d}]', "2:26", "expecting value"),
        ('[{"text": "a"}, {"text": "b"},\n {"text": NaN}]', "2:2", "NaN is not JSON"),
        ('[{"text": "a"}', "1:15", "was expected"),
    ],
)
def test_malformed_array_names_line_and_column(text: str, where: str, reason: str, prepared: Prepare) -> None:
    with pytest.raises(DataError, match="QH-D04") as caught:
        prepared(text, name="rows.json")
    assert caught.value.where == f"rows.json:{where}"
    assert reason in caught.value.message


@pytest.mark.fault("D05")
def test_row_without_trained_token_is_dropped_counted_and_listed(prepared: Prepare, conversation: Conversation) -> None:
    rows = [conversation("short", "answer"), conversation("long " * 40, "answer"), conversation("no answer at all")]
    report = prepared(rows, max_seq_length=32).report.train
    assert (report.rows_used, report.dropped_untrained, report.untrained_rows) == (1, 2, [2, 3])
    assert "no trained token: 2 rows; first rows: 2, 3" in prepared(rows, max_seq_length=32).report.lines()
    with pytest.raises(DataError, match=r"QH-D05.*0 of 2 rows usable: 2 without a trained token") as caught:
        prepared(rows[1:], max_seq_length=32)
    assert caught.value.exit_status == 4
    assert "prompts alone fill max_seq_length" in caught.value.cause
    assert "data.max_seq_length" in caught.value.fix
    with pytest.raises(DataError) as caught:
        prepared(rows[2:], max_seq_length=32)
    assert caught.value.fix == "Correct the rows."


@pytest.mark.fault("D06")
@pytest.mark.parametrize("policy", ["right", "left", "drop", "split"])
def test_long_rows_follow_the_policy_and_are_counted(
    policy: str, prepared: Prepare, conversation: Conversation
) -> None:
    rows = [conversation("a", "one two three four five six seven eight nine ten " * 4), conversation("b", "short")]
    whole = prepared(rows, max_seq_length=512).train.row(0)[0].tolist()
    data = prepared(rows, max_seq_length=32, truncation=policy)
    report, store = data.report.train, data.train
    assert int(store.lengths.max()) <= 32
    assert (report.too_long, report.too_long_rows) == (1, [1])
    first = store.row(0)[0].tolist()
    if policy == "right":
        assert first == whole[:32]
        assert (report.answers_cut, report.eos_trained) == (1, "partly")
    if policy == "left":
        assert first == whole[-32:]
        assert report.answers_cut == 1
    if policy == "drop":
        assert (len(store), report.dropped_too_long) == (1, 1)
    if policy == "split":
        assert report.split_into == -(-len(whole) // 32)
        assert [n for row in range(len(store) - 1) for n in store.row(row)[0].tolist()] == whole
    assert sum(count for _, count in report.histogram) == 2
    assert any(line.startswith("over 32 tokens: 1 rows") for line in report.lines())


@pytest.mark.fault("D06")
def test_left_truncation_keeps_the_bos(
    folders: Mapping[str, Path], prepared: Prepare, conversation: Conversation
) -> None:
    tokenizer = ChatTokenizer.from_folder(folders["llama3"])
    data = prepared(
        [conversation("long " * 40, "the answer")], tokenizer=tokenizer, max_seq_length=24, truncation="left"
    )
    ids = data.train.row(0)[0].tolist()
    assert ids[0] == tokenizer.bos_id
    assert len(ids) == 24
    assert data.report.train.answers_cut == 0


@pytest.mark.fault("D07")
def test_huge_line_is_an_error_and_never_in_memory_whole(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 1 << 20)
    huge = b'{"text": "' + b"a" * (3 << 20) + b'"}\n'
    good = b'{"text": "good"}\n'
    with pytest.raises(DataError, match=r"QH-D07.*more than 1 MiB") as caught:
        prepared(good + huge + good)
    assert caught.value.where == "rows.jsonl:2"
    report = prepared(good + huge + good, on_bad_row="skip").report.train
    assert (report.rows_used, report.bad_row_count) == (2, 1)
    with pytest.raises(DataError, match="QH-D07"):
        prepared(b"[" + huge + b"]", name="rows.json")


@pytest.mark.fault("D08")
@pytest.mark.parametrize(
    "text", ["🙂👨‍👩‍👧", "שלום עולם", "e\u0301 é", "a\u0000b", "\ufdd0\ufdd3\ufdd9\uffff", "\u2028\x85"]
)
def test_unicode_survives_the_round_trip(
    text: str, prepared: Prepare, chatml: ChatTokenizer, trained_text: Trained
) -> None:
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]}]
    assert trained_text(prepared(lines(*rows)), chatml) == [text + "<|im_end|>"]


@pytest.mark.fault("D08")
def test_lone_surrogate_is_a_row_error(prepared: Prepare, conversation: Conversation) -> None:
    rows = [conversation("a", "b"), conversation("a", "\ud83d")]
    with pytest.raises(DataError, match=r"QH-D08.*lone surrogate U\+D83D") as caught:
        prepared(lines(*rows))
    assert caught.value.where == "rows.jsonl:2"
    assert prepared(lines(*rows), on_bad_row="skip").report.train.rows_used == 1


@pytest.mark.fault("D10")
def test_missing_end_token_is_added_trained_and_reported(
    folders: Mapping[str, Path], prepared: Prepare, conversation: Conversation, trained_text: Trained, tmp_path: Path
) -> None:
    template = tmp_path / "open.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}")
    tokenizer = ChatTokenizer.from_folder(folders["bare"], chat_template=str(template))
    data = prepared([conversation("a", "one", "b", "two")], tokenizer=tokenizer)
    # The space before an answer belongs to the token of its first word, so that token is trained with it.
    # Nothing is put into the text: the end token stands behind it, for the row to end with.
    assert [part.lstrip() for part in trained_text(data, tokenizer)] == ["one", "two\n<|endoftext|>"]
    ids = data.train.row(0)[0].tolist()
    whole = "user: a\nassistant: one\nuser: b\nassistant: two\n<|endoftext|>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == whole
    report = data.report.train
    assert (report.eos_trained, report.eos_added_rows) == ("yes", 1)
    assert "the template ends the last answer of 1 rows without an end token; one was appended" in report.notes
    assert any(line.startswith("eos trained: yes (1 of 1") for line in report.lines())
    for row in ({"text": "one two"}, {"prompt": "one ", "completion": "two"}):
        data = prepared([row], tokenizer=tokenizer)
        assert data.train.row(0)[0].tolist()[-1] == tokenizer.eos_id
        assert data.train.row(0)[1].tolist()[-1] == 1


@pytest.mark.fault("D11")
def test_double_bos_is_removed_and_reported(
    folders: Mapping[str, Path], prepared: Prepare, conversation: Conversation, tmp_path: Path
) -> None:
    template = tmp_path / "twice.jinja"
    source = "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['content'] + '<|eot_id|>' }}{% endfor %}"
    template.write_text(source)
    twice = ChatTokenizer.from_folder(folders["llama3"], chat_template=str(template))
    data = prepared([conversation("a", "b")], tokenizer=twice)
    assert data.train.row(0)[0].tolist()[:3].count(twice.bos_id) == 1
    assert data.report.train.double_bos_rows == 1
    assert any("bos appeared twice" in line for line in data.report.lines())
    assert data.report.train.trained_tokens == 2  # b and its end token
    llama = ChatTokenizer.from_folder(folders["llama3"])
    for text in ("one", "<|begin|>one"):
        ids = prepared([{"text": text}], tokenizer=llama).train.row(0)[0].tolist()
        assert ids.count(llama.bos_id) == 1


@pytest.mark.fault("D13")
def test_token_beyond_the_models_vocabulary_names_row_and_token(prepared: Prepare, conversation: Conversation) -> None:
    rows = [conversation("a", "b"), conversation("the", "quick brown fox")]
    limit = int(prepared(rows[:1]).train.tokens.max()) + 1
    with pytest.raises(DataError, match=r"QH-D13.*Row 2 holds token \d+ .*the model has \d+ tokens") as caught:
        prepared(rows, model_vocabulary_size=limit)
    assert caught.value.context["row"] == 2


@pytest.mark.fault("D14")
def test_duplicates_and_leaks_are_counted(prepared: Prepare, conversation: Conversation, tmp_path: Path) -> None:
    rows = [conversation("a", "b"), conversation("c", "d"), conversation("a", "b"), conversation("a", "b")]
    held = tmp_path / "held.jsonl"
    held.write_text(lines(conversation("c", "d"), conversation("new", "row")))
    report = prepared(rows, validation_path=str(held)).report
    assert (report.train.duplicate_rows, report.leaked_rows) == (2, 1)
    assert "duplicate rows: 2" in report.lines()
    assert prepared(rows, validation_path=str(held)).report.train.duplicate_rows == 2  # from the cache


@pytest.mark.fault("D14")
def test_held_out_rows_share_no_text_with_training(prepared: Prepare, conversation: Conversation) -> None:
    rows = [conversation("a", f"b {n % 20}") for n in range(60)]
    data = prepared(rows, validation_fraction=0.25, seed=3)
    assert data.validation is not None
    assert len(data.train) + len(data.validation) == 60
    assert 15 <= len(data.validation) <= 17  # 25 % of 60, up to whole groups of three equal rows
    assert data.report.leaked_rows == 0
    again = prepared(rows, validation_fraction=0.25, seed=3)
    assert again.train.row_numbers.tolist() == data.train.row_numbers.tolist()
    other = prepared(rows, validation_fraction=0.25, seed=4)
    assert other.train.row_numbers.tolist() != data.train.row_numbers.tolist()
    assert other.fingerprint != data.fingerprint
    with pytest.raises(DataError, match=r"QH-D01.*the same text"):
        prepared([conversation("a", "b")] * 4, validation_fraction=0.5)


@pytest.mark.fault("D15")
def test_mixed_shapes_are_counted_not_guessed_from_the_first_row(prepared: Prepare, conversation: Conversation) -> None:
    rows = [
        conversation("a", "b"),
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "", "output": "b", "source": "web"},
        {"prompt": "a ", "completion": "b"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"text": "a b"},
    ]
    data = prepared(rows)
    report = data.report.train
    assert report.shapes == {"prompt_completion": 2, "messages": 1, "sharegpt": 1, "alpaca": 1, "text": 1}
    assert any("the rows have 5 formats" in note for note in report.notes)
    assert report.unused_columns == ["source"]
    same = [data.train.row(row)[0].tolist() for row in (0, 1, 2, 4)]
    assert all(ids == same[0] for ids in same)
    with pytest.raises(DataError, match=r"QH-D03.*field messages holds nothing"):
        prepared(rows[2:], format="messages")


@pytest.mark.fault("D16")
def test_fingerprint_changes_with_a_byte_the_tokenizer_and_the_settings(
    prepared: Prepare, folders: Mapping[str, Path], conversation: Conversation
) -> None:
    text = lines(conversation("a", "b"))
    first = prepared(text).fingerprint
    assert prepared(text).fingerprint == first
    assert prepared(text.replace('"b"', '"c"')).fingerprint != first
    assert prepared(text, max_seq_length=512).fingerprint != first
    assert prepared(text, train_on="all").fingerprint != first
    other = ChatTokenizer.from_folder(folders["chatml"], chat_template="plain")
    assert prepared(text, tokenizer=other).fingerprint != first


@pytest.mark.fault("D64")
def test_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, chatml: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    digest = reading.digest_of_files

    def slow(files: Any) -> str:
        found = digest(files)
        path.write_text('{"text": "a"}\n{"text": "b"}\n')
        return found

    monkeypatch.setattr(reading, "digest_of_files", slow)
    with pytest.raises(DataError, match=r"QH-D64.*changed while it was being read"):
        prepare(DataConfig(path=str(path)), chatml, cache_dir=tmp_path / "cache", seed=0)
    assert not list((tmp_path / "cache").glob("*.safetensors"))


@pytest.mark.fault("E11")
def test_dataset_that_cannot_be_reached_is_a_hub_error(prepared: Prepare) -> None:
    with pytest.raises(HubError, match=r"QH-E11.*not in the cache") as caught:
        prepared(None, path="someone/no-such-dataset")
    assert caught.value.exit_status == 11
    with pytest.raises(DataError, match=r"QH-D50.*no file, folder or dataset"):
        prepared(None, path="./no/such/file.jsonl")


@pytest.mark.parametrize("kind", ["json", "csv", "text", "parquet", "arrow", "pandas"])
def test_a_kind_of_file_is_no_dataset(
    kind: str, prepared: Prepare, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`datasets` would take every file of the working directory for one of that kind."""
    (tmp_path / "other.jsonl").write_text('{"text": "what nobody asked to train on"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"QH-D50.*no file or folder.*the name of a kind of file") as caught:
        prepared(None, path=kind)
    assert caught.value.exit_status == 4


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_a_saved_dataset_with_another_json_in_place_is_refused(name: str, prepared: Prepare, tmp_path: Path) -> None:
    saved = saved_dataset(tmp_path / "saved")
    (saved / name).write_text("[1]")
    with pytest.raises(DataError, match=r"QH-D50.*cannot be opened"):
        prepared(None, path=str(saved))


def test_a_saved_dataset_with_bytes_that_are_no_text_is_refused(prepared: Prepare, tmp_path: Path) -> None:
    saved = saved_dataset(tmp_path / "saved")
    arrow = next(saved.glob("*.arrow"))
    damaged = arrow.read_bytes().replace(b"row 3", b"row \xff")
    arrow.unlink()  # the file may be mapped
    arrow.write_bytes(damaged)
    with pytest.raises(DataError, match=r"QH-D04.*Row \d+ of the dataset cannot be read"):
        prepared(None, path=str(saved))


def saved_dataset(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([{"text": f"row {number}"} for number in range(5)]).save_to_disk(str(folder))
    return folder


def test_sequence_longer_than_the_model_allows_is_refused(prepared: Prepare) -> None:
    with pytest.raises(ConfigError, match=r"QH-D54.*2048.*positions up to 1024") as caught:
        prepared([{"text": "a"}], max_seq_length=2048, model_max_length=1024)
    assert caught.value.exit_status == 2


def test_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path, chatml: ChatTokenizer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="QH-S11") as caught:
        prepare(DataConfig(), chatml, cache_dir=tmp_path / "file" / "cache", seed=0, rows=[{"text": "a"}])
    assert caught.value.exit_status == 8


@pytest.mark.fault("S12")
@pytest.mark.skipif(sys.platform == "win32", reason="a folder has no such mode there")
def test_refused_permission_is_not_called_a_full_disk(tmp_path: Path, chatml: ChatTokenizer) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    user = os.geteuid()
    os.seteuid(user or 65534)  # no mode refuses root
    try:
        with pytest.raises(StorageError, match=r"QH-S12.*No permission to write the token store") as caught:
            prepare(DataConfig(), chatml, cache_dir=tmp_path / "closed" / "cache", seed=0, rows=[{"text": "a"}])
    finally:
        os.seteuid(user)
    assert "Free space" not in caught.value.fix


@pytest.mark.fault("D03", "D04", "D08")
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=st.binary(max_size=60) | st.text(max_size=30).map(lambda text: json.dumps({"text": text}).encode()))
def test_any_bytes_in_a_line_give_rows_or_our_errors(line: bytes, prepared: Prepare) -> None:
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        for on_bad_row in ("fail", "skip"):
            used, code = outcome(lambda: prepared(b'{"text": "good"}\n' + line, name=name, on_bad_row=on_bad_row))  # noqa: B023
            assert used >= 1 or code.startswith("QH-D")


def outcome(action: Callable[[], PreparedData]) -> tuple[int, str]:
    """(rows used, ""), or (0, code) for one of our errors; any other exception goes through."""
    try:
        return action().report.train.rows_used, ""
    except QloraHalError as error:
        return 0, error.code if error.fix else "no remedy"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
keys = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "text",
    "tools",
    "system",
]


@pytest.mark.fault("D03")
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.dictionaries(st.sampled_from(keys), json_values, max_size=4))
def test_any_json_row_gives_tokens_or_our_errors(row: dict[str, object], prepared: Prepare) -> None:
    used, code = outcome(lambda: prepared([row]))
    assert used == 1 or code in {"QH-D01", "QH-D03", "QH-D05", "QH-D08", "QH-D12"}


@pytest.mark.fault("D04")
@pytest.mark.parametrize("separator", [";", "\t"])
def test_fields_that_are_separated_otherwise_are_read_with_a_note(separator: str, prepared: Prepare) -> None:
    text = f"prompt{separator}completion\none, two{separator}three\nfour{separator}five\n"
    report = prepared(text, name="rows.csv").report.train
    assert report.rows_used == 2
    named = "tabs" if separator == "\t" else "';'"
    assert f"rows.csv: fields are separated by {named}" in report.lines()


def test_a_comma_in_the_header_is_the_separator_whatever_the_rows_hold(prepared: Prepare) -> None:
    report = prepared("prompt,completion\na; b; c,d; e\n", name="rows.csv").report.train
    assert report.rows_used == 1
    assert not [line for line in report.lines() if "separated" in line]


@pytest.mark.fault("D04")
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('prompt,completion\n"a "b",c\n', "expected after"),
        ('prompt,completion\na,"b\n', "unexpected end of data"),
    ],
)
def test_broken_csv_is_not_called_json(text: str | bytes, reason: str, prepared: Prepare) -> None:
    with pytest.raises(DataError, match=r"QH-D04.*This is not CSV") as caught:
        prepared(text, name="rows.csv")
    assert reason in caught.value.message
    assert caught.value.where.startswith("rows.csv:")


@pytest.mark.fault("D04")
def test_a_byte_of_a_csv_that_is_not_utf8_is_named_with_its_line(prepared: Prepare) -> None:
    lines_before = b"".join(b"a,%d\n" % number for number in range(3))
    with pytest.raises(DataError, match=r"QH-D04.*Byte 0xe9 is not UTF-8 text") as caught:
        prepared(b"prompt,completion\n" + lines_before + b"a,caf\xe9\n" + lines_before, name="rows.csv")
    assert caught.value.where == "rows.csv:5:6"
    assert caught.value.fix == "Save the file as UTF-8."


@pytest.mark.fault("D05")
def test_rows_that_exclude_all_their_answers_are_told_by_the_fields_that_say_so(prepared: Prepare) -> None:
    asked = {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": "b"}
    weighed = {"messages": [asked, {**answer, "weight": 0}]}
    last = {"messages": [asked, answer, asked, {**answer, "train": False}]}
    with pytest.raises(DataError, match="QH-D05") as caught:
        prepared([weighed, weighed])
    assert caught.value.cause == "The rows exclude answers from the loss by weight (2 rows)."
    with pytest.raises(DataError, match="QH-D05") as caught:
        prepared([weighed, last], train_on="last")
    assert "by train (1 rows), weight (1 rows); data.train_on is last" in caught.value.cause


@pytest.mark.fault("D05")
def test_a_template_whose_marks_leave_all_answers_out_is_told(
    prepared: Prepare, folders: Mapping[str, Path], conversation: Conversation, tmp_path: Path
) -> None:
    template = tmp_path / "marks.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}")
    marked = ChatTokenizer.from_folder(folders["chatml"], chat_template=str(template))
    with pytest.raises(DataError, match="QH-D05") as caught:
        prepared([conversation("a", "b")], tokenizer=marked)
    assert "marks no part of 1 turns of the assistant" in caught.value.cause


@pytest.mark.fault("D05")
def test_a_row_in_many_pieces_is_listed_once(prepared: Prepare, conversation: Conversation) -> None:
    rows = [
        conversation("short", "answer"),
        conversation("long " * 200, "answer"),
        conversation("more " * 99, "answer"),
    ]
    report = prepared(rows, max_seq_length=32, truncation="split").report.train
    assert report.untrained_rows == [2, 3]
    assert report.dropped_untrained > 4
    assert any("pieces of rows; first rows: 2, 3" in line for line in report.lines())


@pytest.mark.fault("D03")
def test_rows_below_a_key_of_one_object_are_asked_for_at_the_top(prepared: Prepare, conversation: Conversation) -> None:
    wrapped = {"data": [conversation("a", "b")]}
    with pytest.raises(DataError, match="QH-D03") as caught:
        prepared(json.dumps(wrapped), name="rows.json")
    assert caught.value.fix.startswith("Put the list under data at the top level")
    with pytest.raises(DataError, match=r"QH-D04.*one object over several lines") as caught:
        prepared(json.dumps(wrapped, indent=1), name="rows.json")
    assert "top level" in caught.value.fix


@pytest.mark.fault("D12")
def test_markers_of_a_built_in_template_that_are_no_tokens_are_told(folders: Mapping[str, Path]) -> None:
    bare = ChatTokenizer.from_folder(folders["bare"], chat_template="chatml")
    assert any("<|im_start|>, <|im_end|> of the template chatml are not tokens here" in note for note in bare.notes)
    whole = ChatTokenizer.from_folder(folders["chatml"], chat_template="chatml")
    assert not any("not tokens" in note for note in whole.notes)


def test_rows_below_the_name_of_a_split_are_told_to_be_put_at_the_top(prepared: Prepare) -> None:
    with pytest.raises(DataError, match="QH-D03") as caught:
        prepared([{"train": [{"instruction": "a", "output": "b"}]}])
    assert caught.value.fix.startswith("Put the list under train at the top level")
    with pytest.raises(DataError, match="the weight that every row has"):
        prepared([{"instruction": "a", "output": "b", "train": [0, 1]}])
