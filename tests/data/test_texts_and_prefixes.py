"""Text files, and the beginning of a data set that is too large to be read whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_hal.data import ChatTokenizer, PreparedData
from qlora_hal.data.source import hub_rows
from qlora_hal.data.source.reading import open_source
from qlora_hal.errors import DataError

Prepare = Callable[..., PreparedData]
Trained = Callable[..., list[str]]

PROSE = "Once upon a time.\n\nThere was a second paragraph.\n"


def test_a_text_file_is_one_text_with_its_end_token(
    prepared: Prepare, chatml: ChatTokenizer, trained_text: Trained
) -> None:
    data = prepared(PROSE, name="story.txt")
    assert data.report.train.kind == "text file"
    ((text,),) = [trained_text(data, chatml, 0)]
    assert PROSE.endswith(text.removesuffix("<|im_end|>"))
    assert text.endswith("paragraph.\n<|im_end|>")


def test_settings_of_conversations_are_told_as_idle_where_there_are_none(prepared: Prepare) -> None:
    asked = {"chat_template": "chatml", "train_on": "last"}
    told = " ".join(prepared(PROSE, name="story.txt", **asked).report.alerts)
    assert "data.chat_template is not used" in told
    assert "data.train_on last leaves nothing out" in told
    rows = '{"text": "a"}\n{"instruction": "a", "output": "b"}\n'
    assert "no row is a conversation" not in " ".join(prepared(rows, name="rows.jsonl", **asked).report.alerts)
    assert "no row is a conversation" not in " ".join(prepared(PROSE, name="story.txt").report.alerts)


def test_a_folder_of_text_files_is_as_many_texts(prepared: Prepare, tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text(f"\ufeff{name} {PROSE}")
    assert prepared(None, path=str(tmp_path / "texts")).report.train.rows_used == 2
    rows = open_source(str(tmp_path / "texts")).rows()
    assert [(row.where, row.value) for row in rows] == [
        (f"{name}:1", {"text": f"{name} {PROSE}"}) for name in ("a.txt", "b.txt")
    ]


def test_a_text_file_beside_rows_is_a_readme(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "README.txt").write_text("About the rows.")
    assert [row.file for row in open_source(str(tmp_path)).rows()] == ["rows.jsonl"]


@pytest.mark.fault("D67")
def test_a_text_file_of_which_only_the_beginning_would_be_trained_is_refused(prepared: Prepare) -> None:
    with pytest.raises(DataError, match=r"QH-D67.*story\.txt is one text of \d+ tokens.*first 8 of them") as caught:
        prepared(PROSE, name="story.txt", max_seq_length=8)
    assert caught.value.where == "data.truncation"
    whole = prepared(PROSE, name="story.txt", max_seq_length=8, truncation="split")
    assert whole.report.train.trained_tokens > 16
    assert len(prepared(PROSE, name="story.txt", max_seq_length=8, truncation="left").train) == 1


@pytest.mark.fault("D07")
def test_a_text_file_above_the_largest_row_is_refused(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("qlora_hal.data.source.row_files.MAX_ROW_BYTES", 8)
    with pytest.raises(DataError, match="QH-D07") as caught:
        prepared(PROSE, name="story.txt")
    assert "several files of one folder" in caught.value.fix


def test_no_row_behind_the_beginning_is_read(prepared: Prepare) -> None:
    lines = "".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(3))
    data = prepared(lines + "no JSON\n", max_rows=3)
    assert (data.report.train.rows_read, data.report.train.rows_used) == (3, 3)
    assert any("no more than the first 3 rows are read (data.max_rows)" in line for line in data.report.lines())
    with pytest.raises(DataError, match="QH-D04"):
        prepared(lines + "no JSON\n", max_rows=4)
    assert data.fingerprint != prepared(lines + "no JSON\n", max_rows=2).fingerprint


def test_validation_rows_are_read_whole(prepared: Prepare, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": f"held {n}"}) + "\n" for n in range(3)))
    data = prepared([{"text": "a"}, {"text": "b"}], max_rows=1, validation_path=str(tmp_path / "held.jsonl"))
    assert (len(data.train), len(data.validation or ())) == (1, 3)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of shards, which `datasets` opens as it opens a dataset of the hub."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(6):
        rows = ({"messages": [{"role": "user", "content": f"{shard} {n}"}], "n": n} for n in range(4))
        (folder / f"part-{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_of_a_hub_dataset_only_the_beginning_is_fetched(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (shards / "part-5.jsonl").write_text("never read, or this would be an error\n")
    source = hub_rows.hub_source(str(shards), "train", 5)
    rows = list(source.rows())
    assert [row.value["n"] for row in rows if not isinstance(row.value, DataError)] == [0, 1, 2, 3, 0]
    assert source.digest() == hub_rows.hub_source(str(shards), "train", 5).digest()
    assert source.digest() != hub_rows.hub_source(str(shards), "train", 4).digest()
    assert not list(tmp_path.glob("cache/**/*.arrow"))


@pytest.mark.fault("D50")
def test_a_part_of_a_split_has_no_beginning_that_could_be_fetched(shards: Path) -> None:
    with pytest.raises(DataError, match=r"QH-D50.*data\.max_rows fetches only 2"):
        hub_rows.hub_source(str(shards), "train[:50%]", 2)
