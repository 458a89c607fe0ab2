"""Every kind of source gives the same rows; the store is one safetensors file that is found again."""

from __future__ import annotations

import base64
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_hal.config.schema import DataConfig
from qlora_hal.data import ChatTokenizer, PreparedData, prepare, show_batch
from qlora_hal.data.source.reading import open_source, refuse_absent
from qlora_hal.data.tokens.batching import batch_of
from qlora_hal.data.tokens.store import NotAStore, TokenWriter, open_store
from qlora_hal.data.tokens.truncation import FittingCounts
from qlora_hal.errors import DataError
from qlora_hal.run.directory import RunDirectory

Prepare = Callable[..., PreparedData]
Conversation = Callable[..., dict[str, Any]]

ROWS = [{"text": "one, two"}, {"text": 'three "four"\nfive'}, {"text": "é 🙂"}]


def values(path: Path) -> list[object]:
    return [row.value for row in open_source(str(path)).rows()]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import csv

    import datasets
    import pyarrow as arrow
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    (tmp_path / "c.json").write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, ["text"])
        writer.writeheader()
        writer.writerows(ROWS)
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "e.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert values(file) == ROWS, file.name
    numbers = [(row.number, row.where) for row in open_source(str(tmp_path)).rows()]
    assert [number for number, _ in numbers] == list(range(1, 16))
    assert numbers[3][1] == "b.json:2"
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert values(tmp_path / "saved") == ROWS
    first = open_source(str(tmp_path / "saved")).digest()
    datasets.Dataset.from_list(ROWS[:2]).save_to_disk(str(tmp_path / "fewer"))
    assert open_source(str(tmp_path / "fewer")).digest() != first


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=8) | st.integers(), max_size=3), max_size=6))
def test_array_and_lines_give_what_json_gives(
    rows: list[dict[str, object]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("json")
    (folder / "a.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert values(folder / "a.json") == rows
    assert values(folder / "b.jsonl") == rows


def test_array_larger_than_the_buffer_keeps_its_lines(tmp_path: Path) -> None:
    rows = [{"text": "x" * 300_000, "n": number} for number in range(12)]  # 3.6 MB, the buffer holds 1 MiB
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
    found = list(open_source(str(tmp_path / "a.json")).rows())
    assert [row.value for row in found] == rows
    assert [row.line for row in found] == [2 + 4 * number for number in range(12)]


def test_array_is_read_about_as_fast_as_lines(tmp_path: Path) -> None:
    import time

    rows = [{"text": f"row {number}", "n": number} for number in range(30_000)]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def seconds(name: str) -> float:
        start = time.thread_time()
        assert values(tmp_path / name) == rows
        return time.thread_time() - start

    # About 1.5 times as long; with a copy of the buffer for each element it was 7 times.
    assert min(seconds("a.json") for _ in range(3)) < 4 * min(seconds("a.jsonl") for _ in range(3))


def test_digest_of_selected_rows_holds_few_of_them(tmp_path: Path) -> None:
    import tracemalloc

    import datasets

    from qlora_hal.data.source.hub_rows import dataset_source

    datasets.disable_progress_bars()
    datasets.Dataset.from_list([{"text": "x" * 1000}] * 8000).save_to_disk(str(tmp_path / "saved"))
    source = dataset_source("half", datasets.load_from_disk(str(tmp_path / "saved")).select(range(0, 8000, 2)), "train")
    tracemalloc.start()
    source.digest()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**20  # the rows are 4 MB


def test_rows_that_a_split_cuts_out_have_a_digest_of_their_own(tmp_path: Path) -> None:
    import datasets

    from qlora_hal.data.source.hub_rows import dataset_source

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    cuts = [dataset_source("cut", saved.select(range(stop)), f"train[:{stop}]").digest() for stop in (1, 2)]
    assert cuts[0] != cuts[1]


@pytest.mark.parametrize(
    ("name", "contents", "code"),
    [
        ("a.md", b"x", "QH-D51"),
        ("a.parquet", b"PAR1 no", "QH-D04"),
        ("a.csv", b"text,b\none\n", "QH-D04"),
        ("a.csv", b'text\n"one\n', "QH-D04"),
        ("a.csv", b"text\n\xff\n", "QH-D04"),
    ],
)
def test_file_that_cannot_be_read_is_a_data_error(name: str, contents: bytes, code: str, prepared: Prepare) -> None:
    with pytest.raises(DataError) as caught:
        prepared(contents, name=name)
    assert caught.value.code == code
    assert name in caught.value.where


def test_folder_without_data_and_missing_library_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"QH-D50.*holds no data file"):
        open_source(str(tmp_path))
    import sys

    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in (str(tmp_path / "a.parquet"), "owner/name"):
        with pytest.raises(DataError, match=r"QH-D51.*is not installed") as caught:
            list(open_source(path).rows())
        assert "[data]" in caught.value.fix


def test_what_a_run_writes_below_its_data_is_no_data(tmp_path: Path) -> None:
    """`--data . --output_dir out` is a usual layout; run.json is there before the rows are read."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    alone = open_source(str(tmp_path)).digest()
    out = tmp_path / "out"
    RunDirectory.open_new(out, config={}).close()
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    assert (out / "run.json").is_file()
    source = open_source(str(tmp_path))
    assert [row.file for row in source.rows()] == ["rows.jsonl"]
    assert source.digest() == alone
    with pytest.raises(DataError, match=r"QH-D50.*is the output folder of a run") as caught:
        open_source(str(out))
    assert "output_dir" in caught.value.fix


@pytest.mark.parametrize("kind", ["dangling link", "pipe"])
def test_a_data_file_that_is_there_and_cannot_be_read_is_told(tmp_path: Path, kind: str) -> None:
    """Not left out of its folder, where half of the rows would be trained on, and not looked for on the hub."""
    (tmp_path / "rows-1.jsonl").write_text('{"text": "a"}\n')
    second = tmp_path / "rows-2.jsonl"
    second.symlink_to(tmp_path / "gone") if kind == "dangling link" else os.mkfifo(second)
    for named in (tmp_path, second):
        with pytest.raises(DataError, match=r"QH-D50.*rows-2.jsonl") as caught:
            open_source(str(named))
        assert "dataset id" not in str(caught.value)
        assert kind.split()[-1] in str(caught.value)
    with pytest.raises(DataError, match="QH-D50"):
        refuse_absent(str(second))


def test_a_folder_that_cannot_be_searched_is_told_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some entries of / and /proc vanish, or may not be read, while they are searched."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "gone").mkdir()
    scandir = os.scandir

    def vanishing(path: str) -> Any:
        if path.endswith("gone"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    with pytest.raises(DataError, match=r"QH-D50.*cannot be searched \(No such file") as caught:
        open_source(str(tmp_path))
    assert caught.value.where.endswith("gone")


def test_store_is_a_safetensors_file_that_others_read(
    prepared: Prepare, conversation: Conversation, tmp_path: Path
) -> None:
    from safetensors import safe_open

    data = prepared([conversation("a", f"b {n}") for n in range(5)])
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    with safe_open(str(path), "numpy") as file:
        assert set(file.keys()) == {"tokens", "trained", "offsets", "row_numbers", "counted", "digests"}
        assert file.get_tensor("tokens").tolist() == data.train.tokens.tolist()
        assert file.get_tensor("counted").tolist() == [int(data.train.row(n)[1].sum()) for n in range(5)]
        assert json.loads(file.metadata()["report"])["rows_used"] == 5
    assert isinstance(data.train.tokens, np.memmap)
    assert not list((tmp_path / "cache").glob(".staging*"))


def test_prepared_rows_are_found_again_and_damage_is_not_used(
    prepared: Prepare, conversation: Conversation, tmp_path: Path
) -> None:
    rows = [conversation("a", f"b {n}") for n in range(5)]
    first = prepared(rows)
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    written = path.stat().st_mtime_ns
    again = prepared(rows)
    assert path.stat().st_mtime_ns == written
    assert again.report == first.report
    whole, expected = path.read_bytes(), first.train.tokens.tolist()
    for damaged in (whole[:-1], whole[:4], b"", whole.replace(b"qlora_hal tokens 1", b"qlora_hal tokens 0")):
        path.unlink()
        path.write_bytes(damaged)
        assert prepared(rows).train.tokens.tolist() == expected
        assert path.read_bytes() == whole


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=200), length=st.integers(0, 300))
def test_any_bytes_as_a_store_are_refused(data: bytes, length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + data)
    with pytest.raises(NotAStore):
        open_store(path)


def test_leftovers_of_a_dead_process_are_swept_and_of_a_live_one_kept(tmp_path: Path) -> None:
    import os

    dead, alive = tmp_path / ".staging-999999999-ab", tmp_path / f".staging-{os.getpid()}-cd"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "tokens").write_bytes(b"x")
    TokenWriter(tmp_path / "a.safetensors").close()
    assert not dead.exists()
    assert alive.exists()


def test_failed_preparation_leaves_nothing(prepared: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        prepared([{"text": "a"}, {"text": 1}])
    assert list((tmp_path / "cache").iterdir()) == []


def test_chunks_do_not_show_in_the_result(
    prepared: Prepare, conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_hal.data.tokens import tokenizing

    rows = [
        conversation("q <|im_end|>" if n % 7 == 0 else "q", f"a {n}", *(["more", "x"] if n % 3 else []))
        for n in range(60)
    ] + [{"prompt": "p ", "completion": f"c {n}"} for n in range(30)]
    whole = prepared(rows).train
    monkeypatch.setattr(tokenizing, "CHUNK_ROWS", 7)
    cut = prepared(rows, on_bad_row="skip").train  # another fingerprint, so that nothing is reused
    assert cut.tokens.tolist() == whole.tokens.tolist()
    assert cut.trained.tolist() == whole.trained.tolist()
    assert cut.row_numbers.tolist() == list(range(1, 91))


def test_train_on_all_counts_every_token_but_the_first(prepared: Prepare, conversation: Conversation) -> None:
    data = prepared([conversation("a b", "c")], train_on="all")
    ids, mask = data.train.row(0)
    assert mask.tolist() == [0] + [1] * (len(ids) - 1)


def test_prompt_carries_no_loss_and_completion_does(
    prepared: Prepare, chatml: ChatTokenizer, trained_text: Callable[..., list[str]]
) -> None:
    data = prepared([{"prompt": "Question: two", "completion": " three"}])
    assert trained_text(data, chatml) == [" three<|im_end|>"]
    messages = {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "not this"},
            {"role": "user", "content": "b"},
        ],
        "completion": [{"role": "assistant", "content": "this"}],
    }
    assert trained_text(prepared([messages]), chatml) == ["this<|im_end|>"]


def test_alpaca_rows_have_their_own_text_without_a_template(folders: Mapping[str, Path], prepared: Prepare) -> None:
    bare = ChatTokenizer.from_folder(folders["bare"])
    data = prepared([{"instruction": "Add.", "input": "1 2", "output": "3"}], tokenizer=bare)
    text = bare.decode(data.train.row(0)[0].tolist(), skip_special_tokens=False)
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3<|endoftext|>" in text
    assert any("built-in template alpaca" in note for note in data.report.train.notes)


def test_shown_batch_brackets_what_is_trained(
    prepared: Prepare, conversation: Conversation, chatml: ChatTokenizer
) -> None:
    data = prepared([conversation("ask \x1b[31m", "answer é 🙂")])
    batch = batch_of(data.train, [[0]], pad_id=chatml.pad_id, pad_to_multiple=8)
    plain = show_batch(batch, chatml, color=False)
    assert "⟦answer é 🙂<|im_end|>⟧" in plain
    assert "\x1b" not in plain
    assert "\x1b[32manswer é 🙂<|im_end|>\x1b[0m" in show_batch(batch, chatml, color=True)


def test_report_survives_json(prepared: Prepare, conversation: Conversation) -> None:
    report = prepared([conversation("a", "b")], validation_fraction=0.0).report
    assert json.loads(json.dumps(report.as_json()))["train"]["rows_used"] == 1
    assert FittingCounts().length_counts.sum() == 0


def test_memory_of_a_long_source_stays_bounded(tmp_path: Path, chatml: ChatTokenizer) -> None:
    """Twice the rows take hardly more memory at the peak, though their tokens take twice the disk."""
    import tracemalloc

    peaks = []
    for count in (4_000, 8_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps({"text": f"row {n} " + "one two three " * 20}) + "\n" for n in range(count)))
        tracemalloc.start()
        prepare(DataConfig(path=str(path)), chatml, cache_dir=tmp_path / "cache", seed=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # What grows is a few int64 figures a row (under 100 bytes in all, while sorting); everything else is a few chunks.
    assert peaks[1] - peaks[0] < 4_000 * 100 + 2**20


def test_data_room_loads_no_tensor_library_and_no_reader_before_it_is_used() -> None:
    import subprocess
    import sys

    heavy = "torch mlx transformers peft datasets pyarrow"
    code = f"import sys, qlora_hal.data; print([name for name in '{heavy}'.split() if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_sentencepiece_folder_without_a_rust_tokenizer_is_converted(tmp_path: Path) -> None:
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("\n".join(["the quick brown fox jumps over the lazy dog", "one two three four five"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=320, model_type="bpe", byte_fallback=True,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    tokenizer = ChatTokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("the quick fox 🙂")
    assert tokenizer.decode(ids) == "the quick fox 🙂"
    assert tokenizer.eos_id == 2


DAMAGED_STATISTICS = base64.b64decode(
    "UEFSMRUEFQoVDkwVAhUAEgAABRABAAAAYRUAFRIVFiwVChUQFQYVBhw2ACgBYRgBYRERAAAACSACAAAACgEBCgAVBBUKFQ5MFQIVABIAAAUQ"
    "AQAAAGIVABUSFRYsFQoVEBUGFQYcNgAoAWIYAWIREQAAAAkgAgAAAAoBAQoAFQQZPDUAGAZzY2hlbWEVBAAVDCUCGAZwcm9tcHQlAEwcAAAA"
    "FQwlAhgKY29tcGxldGlvbiUATBwAAAAWChkcGSwmABwVDBk1AAYQGRgGcHJvbXB0FQIWChZyFnomMiYIHDYAKAFhGAFhEREAGSwVBBUAFQIA"
    "FQAVEBUCADwWChkGGSYACgAAACYAHBUMGTUABhAZGApjb21wbGV0aW9uFQIWChZyFnomrAEmggEcNgAoAWIYAWIREQAZLBUEFQAVAgAVABUQ"
    "FQIAPBYKGUYZJgAKAAAAFuQBFgomCBb0AQAZHBgMQVJST1c6c2NoZW1hGOABLy8vLy82QUFBQUFRQUFBQUFBQUtBQXdBQmdBRkFBZ0FDZ0FB"
    "QUFBQkJBQU1BQUFBQ0FBSUFBQUFCQUFJQUFBQUJBQUFBQUlBQUFCRUFBQUFCQUFBQU5ULy8vOEFBQUVGRUFBQUFCd0FBQUFFQUFBQUFBQUFB"
    "QW9BQUFCamIyMXdiR1YwYVc5dUFBREkvLy8vRUFBVUFBZ0FCZ0FIQUF3QUFBQVFBQkFBQUFBQUFBRUZFQUFBQUJ3QUFBQUVBQUFBQUFBQUFB"
    "WUFBQUJ3Y205dGNIUUFBQVFBQkFBRUFBQUEAGCBwYXJxdWV0LWNwcC1hcnJvdyB2ZXJzaW9uIDI2LjAuMRksHAAAHAAAAP8BAABQQVIx"
)
"""A Parquet file of two columns whose statistics hold a histogram of the wrong length."""


def test_a_file_whose_statistics_end_the_process_of_the_library_is_refused(tmp_path: Path) -> None:
    """pyarrow 26 aborts where they are asked for: read in a process of its own, which must live to tell."""
    (tmp_path / "rows.parquet").write_bytes(DAMAGED_STATISTICS)
    code = (
        "import sys\nfrom pathlib import Path\nfrom qlora_hal.data.source.reading import open_source, refuse_absent\n"
        "from qlora_hal.errors import DataError\n"
        "try:\n    list(open_source(sys.argv[1]).rows())\nexcept DataError as error:\n    print(error.code)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "rows.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "QH-D04"), done.stderr


def test_a_column_whose_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    parquet.write_table(arrow.table({"a": [{"bcdef": 1}]}), tmp_path / "rows.parquet")
    raw = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(raw.replace(b"bcdef", b"b\xffdef"))
    with pytest.raises(DataError, match="QH-D04"):
        list(open_source(str(tmp_path / "rows.parquet")).rows())
