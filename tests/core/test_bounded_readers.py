"""Files of strangers are bounded before they are built: bytes, values, depth, digits; each bound is a typed error."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_hal.adapter import read_adapter, read_mlx_adapter
from qlora_hal.checkpoint.manifest import BrokenCheckpoint, read_manifest
from qlora_hal.config.files import read_settings_file
from qlora_hal.data.source.reading import open_source
from qlora_hal.data.template.chat_template import read_template
from qlora_hal.data.tokens.guarded_tokenizer import read_tokenizer
from qlora_hal.errors import AdapterError, ConfigError, DataError, ModelError, QloraHalError, UnsafeInputError
from qlora_hal.files import strict_json, strict_toml
from qlora_hal.files.strict_json import JsonProblem, decode, decode_foreign
from qlora_hal.model.weight_files import read_headers, read_json, read_weight_map
from qlora_hal.report.metrics import MetricsFile, read_metrics
from qlora_hal.report.run_file import read_run_file
from qlora_hal_conformance.certificate import read_certificate

BOMBS = {
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 2_000 + "1" + "}" * 2_000,
    "objects a little too deep": '{"a":' * 150 + "1" + "}" * 150,
    "many lists": '{"a":[' + "[]," * 1_500_000 + "[]]}",
    "many objects": '{"a":[' + "{}," * 1_500_000 + "{}]}",
    "many numbers": '{"a":[' + "1," * 2_000_000 + "1]}",
    "a long number": '{"a": ' + "9" * 5_000 + "}",
    "a number of some length": '{"a": ' + "9" * 200 + "}",
}


@contextmanager
def bounded(seconds: float = 2.0, byte_count: int = 300 * 10**6) -> Iterator[None]:
    started, peak = time.process_time(), _peak()
    yield
    assert time.process_time() - started < seconds
    assert _peak() - peak < byte_count


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("text", BOMBS.values(), ids=list(BOMBS))
def test_a_bomb_is_no_json(text: str) -> None:
    for read in (decode, decode_foreign):
        with bounded(), pytest.raises(JsonProblem):
            read(text.encode())


def test_the_largest_of_what_is_needed_is_read() -> None:
    modules = [f"model.layers.{number}.self_attn.q_proj" for number in range(100_000)]
    assert decode(json.dumps({"target_modules": modules}).encode()) == {"target_modules": modules}
    value: object = 1
    for _ in range(strict_json.MAX_DEPTH):
        value = [value]
    assert decode(json.dumps(value).encode()) == value
    assert decode(json.dumps([2**63, -(2**63), 0.1]).encode()) == [2**63, -(2**63), 0.1]
    assert decode_foreign(b'{"model_max_length": 1000000000000000019884624838656}') == {
        "model_max_length": 1000000000000000019884624838656
    }


@pytest.mark.parametrize("text", ["1e999", "-1e999", "NaN", "Infinity", '{"a": 1, "a": 2}', "1" * 20])
def test_what_others_may_write_is_still_refused_in_own_files(text: str) -> None:
    with pytest.raises(JsonProblem):
        decode(text.encode())
    decode_foreign(text.encode())


def test_numbers_of_others_are_read_as_their_libraries_read_them() -> None:
    assert decode_foreign(b'{"a": 1, "a": Infinity}') == {"a": math.inf}


def _config(folder: Path) -> object:
    return read_json(folder / "config.json")


def _index(folder: Path) -> object:
    return read_weight_map(folder / "model.safetensors.index.json")


READERS: dict[str, tuple[str, Callable[[Path], object], type[Exception]]] = {
    "a model's configuration": ("config.json", _config, ModelError),
    "an index of weights": ("model.safetensors.index.json", _index, QloraHalError),
    "an adapter": ("adapter_config.json", read_adapter, AdapterError),
    "an adapter of mlx-lm": ("adapter_config.json", read_mlx_adapter, AdapterError),
    "a record of a run": ("run.json", read_run_file, ConfigError),
    "a manifest": ("MANIFEST.json", read_manifest, BrokenCheckpoint),
    "a certificate": ("c.json", lambda folder: read_certificate(folder / "c.json"), ConfigError),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=list(READERS))
@pytest.mark.parametrize("bomb", ["deep objects", "many lists", "a long number"])
def test_every_reader_of_json_refuses_a_bomb(
    tmp_path: Path, reader: tuple[str, Callable[[Path], object], type[Exception]], bomb: str
) -> None:
    name, read, error = reader
    (tmp_path / name).write_text(BOMBS[bomb])
    with bounded(), pytest.raises(error):
        read(tmp_path)


def _settings(folder: Path) -> object:
    return read_settings_file(folder / "run.yaml")


FILES_OF_OTHERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a model's configuration": ("config.json", _config),
    "a record of a run": ("run.json", read_run_file),
    "settings": ("run.yaml", _settings),
    "weights": ("model.safetensors", read_headers),
    "an index of weights": ("model.safetensors.index.json", _index),
    "a tokenizer": ("tokenizer.json", lambda folder: read_tokenizer(folder / "tokenizer.json")),
    "a chat template": ("x.jinja", lambda folder: read_template(folder / "x.jinja")),
}


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/full", "itself", "a pipe", "a folder"])
@pytest.mark.parametrize("file", FILES_OF_OTHERS.values(), ids=list(FILES_OF_OTHERS))
def test_nothing_but_an_ordinary_file_is_read(
    tmp_path: Path, file: tuple[str, Callable[[Path], object]], target: str
) -> None:
    name, read = file
    if target == "a pipe":
        os.mkfifo(tmp_path / "pipe")
    elif target == "a folder":
        (tmp_path / "folder").mkdir()
    inside = {"itself": name, "a pipe": "pipe", "a folder": "folder"}
    (tmp_path / name).symlink_to(tmp_path / inside[target] if target in inside else target)
    with bounded(), pytest.raises((QloraHalError, OSError)) as caught:
        read(tmp_path)
    assert isinstance(caught.value, QloraHalError) or name == "x.jinja"  # its callers say what it is for


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
@pytest.mark.parametrize("reader", [READERS["a model's configuration"], READERS["a record of a run"]])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(
    tmp_path: Path, reader: tuple[str, Callable[[Path], object], type[Exception]]
) -> None:
    name, read, error = reader
    os.mkfifo(tmp_path / name)
    with pytest.raises(error):
        read(tmp_path)


def test_a_link_into_a_cache_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"model_type": "llama"}')
    (tmp_path / "config.json").symlink_to(tmp_path / "blob")
    assert read_json(tmp_path / "config.json") == {"model_type": "llama"}


@pytest.mark.fault("C15")
@pytest.mark.parametrize("name", ["a" * 256, "é" * 200, "\ud800" * 100])
def test_a_shard_of_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UnsafeInputError, match=r"QH-C15"):
        _index(tmp_path)


def test_a_log_with_hostile_lines_is_read_without_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    hostile = [
        "[" * 50_000,
        '{"step":' * 20_000,
        '{"step": ' + "9" * 5_000 + "}",
        '{"step": 2, "x": "' + "a" * 600_000 + '"}',
    ]
    path.write_text("\n".join(['{"step": 1, "loss": 2.0}', *hostile, '{"step": 3, "loss": 1.0}', ""]))
    with bounded():
        assert [record["step"] for record in read_metrics(path)] == [1, 3]
        with MetricsFile(path) as log:
            log.truncate_after(1)
    assert [record["step"] for record in read_metrics(path)] == [1]


def refusals(path: Path) -> list[DataError]:
    """The rows that are errors, and the error that ends the file."""
    found: list[DataError] = []
    try:
        found += [row.value for row in open_source(str(path)).rows() if isinstance(row.value, DataError)]
    except DataError as error:
        found.append(error)
    return found


ROWS = {
    "jsonl, deep": ("a.jsonl", '{"text":' + "[" * 300 + "]" * 300 + "}\n"),
    "jsonl, far too deep": ("a.jsonl", '{"text":' + "[" * 100_000 + "\n"),
    "jsonl, many values": ("a.jsonl", '{"text": [' + "[]," * 5_000_000 + "1]}\n"),
    "jsonl, a long number": ("a.jsonl", '{"text": ' + "9" * 5_000 + "}\n"),
    "json, deep": ("a.json", '[{"text":' + "[" * 300 + "]" * 300 + "}]"),
    "json, many values": ("a.json", '[{"text": [' + "[]," * 5_000_000 + "1]}]"),
    "csv, a line without end": ("a.csv", "text,b\n" + "a" * 40_000_000 + "\n"),
    "csv, many fields": ("a.csv", "text,b\n" + "," * 20_000_000 + "\n"),
    "csv, many columns": ("a.csv", ",".join(f"c{n}" for n in range(20_000)) + "\n" + "," * 19_999 + "\n"),
    "tsv, many fields": ("a.tsv", "text\tb\n" + "\t" * 20_000_000 + "\n"),
}


@pytest.mark.fault("D07")
@pytest.mark.parametrize(("name", "text"), ROWS.values(), ids=list(ROWS))
def test_a_row_that_is_a_burden_is_an_error_before_it_fills_the_memory(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    del text
    with bounded():
        found = refusals(path)
    assert [error.code in ("QH-D04", "QH-D07") for error in found] == [True]


@pytest.mark.fault("D07")
def test_a_parquet_value_that_is_stored_once_and_stands_in_every_row_is_read_a_few_rows_at_a_time(
    tmp_path: Path,
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    # A dictionary page and its places: some kilobytes of file for 2 GB of text.
    values = arrow.DictionaryArray.from_arrays(arrow.array([0] * 400, arrow.int32()), arrow.array(["a" * 5_000_000]))
    parquet.write_table(
        arrow.table({"text": values}), tmp_path / "a.parquet", compression="zstd", dictionary_pagesize_limit=10**8
    )
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    with bounded(seconds=20.0):
        rows = open_source(str(tmp_path / "a.parquet")).rows()
        assert [len(next(rows).value["text"]) for _ in range(3)] == [5_000_000] * 3  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "is_bomb"),
    [
        ("a." * 50_000 + "a = 1", True),
        ("a = " + "[" * 4_000, True),
        ("a = [" + "1," * 9_000 + "]", True),
        ("a = " + "9" * 5_000, False),
        ("a = ", False),
        ("a = 1979-99-99", False),
    ],
)
def test_toml_is_bounded_before_it_is_built(text: str, is_bomb: bool) -> None:
    with bounded(), pytest.raises(strict_toml.TomlProblem) as caught:
        strict_toml.decode(text)
    assert caught.value.is_bomb is is_bomb


def test_signs_in_strings_and_comments_of_toml_are_no_structure() -> None:
    many = "[{=,." * 9_000
    for text in (f'a = "{many}"', f"a = '{many}'", f'a = """{many}\n"""', f"a = '''{many}\n'''", f'a = "{many}\\""'):
        assert many in strict_toml.decode(f"# {many}\n{text}")["a"]
    assert strict_toml.decode("a.b.c = 1.5 # x.y") == {"a": {"b": {"c": 1.5}}}
