"""Tokens on disk are those that were prepared: any changed byte has them prepared again, and it is said."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_hal.data import PreparedData
from qlora_hal.data.tokens import store
from qlora_hal.data.tokens.store import NotAStore, TokenWriter, open_store
from qlora_hal.errors import UnsafeInputError

Prepare = Callable[..., PreparedData]
Conversation = Callable[..., dict[str, Any]]
TENSORS = ("digests", "offsets", "row_numbers", "tokens", "counted", "trained")


@pytest.fixture
def rows(conversation: Conversation) -> list[dict[str, Any]]:
    return [conversation("a", f"b {number}") for number in range(5)]


def store_in(folder: Path) -> Path:
    (path,) = (folder / "cache").glob("*.safetensors")
    return path


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and the header's entries."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return 8 + length, json.loads(raw[8 : 8 + length])


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.unlink()  # the file of before may still be mapped
    path.write_bytes(raw)


def said(data: PreparedData) -> str:
    return " ".join(data.report.alerts)


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_flipped_bit_in_any_tensor_has_the_rows_prepared_again(
    tensor: str, prepared: Prepare, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    first = prepared(rows)
    path = store_in(tmp_path)
    whole, expected = path.read_bytes(), first.train.tokens.tolist()
    start, entries = header_of(path)
    flip(path, start + entries[tensor]["data_offsets"][0])
    again = prepared(rows)
    assert f"prepared again: {path.name} cannot be used, its tensors do not match their hash" in said(again)
    assert path.read_bytes() == whole
    assert again.train.tokens.tolist() == expected
    assert again.hashes == first.hashes
    assert "prepared again" not in said(prepared(rows))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw, start: raw[: -len(raw) // 8] + bytes(len(raw) // 8), "its tensors do not match their hash"),
        (lambda raw, start: raw[:start] + bytes(len(raw) - start), "its tensors do not match their hash"),
        (lambda raw, start: raw + b"\0", "its tensors do not match their hash"),
        (lambda raw, start: raw[:-1], "its tensors do not match their hash"),
        (lambda raw, start: bytes(len(raw)), "its header"),
        (lambda raw, start: raw.replace(b"rows_used", b"rows_uses", 1), "its header does not match its hash"),
        (lambda raw, start: raw.replace(b'": 5', b'": 6', 1), "its header does not match its hash"),
        (lambda raw, start: raw.replace(b'"sha256"', b'"sha25x"'), "without a hash"),
    ],
    ids=["zero tail", "zeros", "longer", "shorter", "all zeros", "report", "count", "hash gone"],
)
def test_zeros_cuts_and_an_edited_header_have_the_rows_prepared_again(
    damage: Callable[[bytes, int], bytes], words: str, prepared: Prepare, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    expected = prepared(rows).train.tokens.tolist()
    path = store_in(tmp_path)
    whole = path.read_bytes()
    damaged = damage(whole, header_of(path)[0])
    assert damaged != whole
    path.unlink()
    path.write_bytes(damaged)
    again = prepared(rows)
    assert words in said(again)
    assert again.train.tokens.tolist() == expected
    assert path.read_bytes() == whole


def test_the_store_of_other_rows_under_this_name_is_not_taken(
    prepared: Prepare, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    first = prepared(rows)
    mine = store_in(tmp_path)
    expected = first.train.tokens.tolist()
    prepared(rows[:3])
    (other,) = set((tmp_path / "cache").glob("*.safetensors")) - {mine}
    os.replace(other, mine)
    again = prepared(rows)
    assert "it belongs to other rows or settings" in said(again)
    assert again.train.tokens.tolist() == expected


@pytest.mark.fault("X06")
def test_a_link_in_place_of_a_store_is_replaced_and_its_target_left_alone(
    prepared: Prepare, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    prepared(rows)
    path = store_in(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    before = elsewhere.read_bytes()
    path.symlink_to(elsewhere)
    assert "it cannot be read" in said(prepared(rows))
    assert not path.is_symlink()
    assert elsewhere.read_bytes() == path.read_bytes() == before


@pytest.mark.fault("X06")
def test_a_link_in_place_of_the_folder_is_refused_and_nothing_is_written_there(
    prepared: Prepare, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "cache").symlink_to(outside)
    with pytest.raises(UnsafeInputError, match="symbolic link") as refused:
        prepared(rows)
    assert (refused.value.code, refused.value.exit_status) == ("QH-X06", 10)
    with pytest.raises(UnsafeInputError):
        TokenWriter(tmp_path / "cache" / "a.safetensors")
    assert list(outside.iterdir()) == []


def test_a_pipe_in_place_of_a_store_does_not_hang(
    prepared: Prepare, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    prepared(rows)
    path = store_in(tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in said(prepared(rows))


def test_the_map_is_of_the_file_that_was_verified(
    prepared: Prepare, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    expected = prepared(rows).train.tokens.tolist()
    path = store_in(tmp_path)
    store, _ = open_store(path)
    start, entries = header_of(path)
    flip(path, start + entries["tokens"]["data_offsets"][0])  # another file under the name
    assert store.tokens.tolist() == expected
    with pytest.raises(NotAStore, match="hash"):
        open_store(path)


def test_the_folder_is_flushed_after_the_file_has_its_name(
    prepared: Prepare, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    flush, replace = store.flush_folder, os.replace
    monkeypatch.setattr(store, "flush_folder", lambda folder: (order.append(folder.name), flush(folder)))
    monkeypatch.setattr(os, "replace", lambda source, target: (order.append("rename"), replace(source, target)))
    prepared(rows)
    assert order == ["rename", "cache", tmp_path.name]


def test_the_hash_does_not_depend_on_how_the_rows_were_cut_into_chunks(
    prepared: Prepare, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_hal.data.tokens import tokenizing

    whole = prepared(rows)
    monkeypatch.setattr(tokenizing, "CHUNK_ROWS", 2)
    cut = prepared(rows, on_bad_row="skip")  # another fingerprint, so that nothing is reused
    assert cut.hashes == whole.hashes
    assert len(np.unique(list(whole.hashes.values()))) == 1


@pytest.mark.fault("X11")
def test_the_header_of_stored_tokens_holds_no_secret(
    prepared: Prepare, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_KEY", "canary-0123456789")
    named = [{**row, "hf_abcdefghijklmnopqrstuvwx": 1, "canary-0123456789": 2} for row in rows]
    prepared(named)
    _, entries = header_of(store_in(tmp_path))
    assert "[removed]" in entries["__metadata__"]["report"]
    assert "canary" not in json.dumps(entries)
    assert "hf_abc" not in json.dumps(entries)


def test_names_of_unused_columns_are_short_and_not_without_end(
    prepared: Prepare, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = [{**row, f"{number}" + "x" * 100_000: 1} for number, row in enumerate(rows)]
    assert prepared(named).report.train.unused_columns == [f"{number}{'x' * 76}..." for number in range(5)]
    monkeypatch.setattr("qlora_hal.data.rendering._MOST_NAMES", 3)
    assert len(prepared([*named, *named]).report.train.unused_columns) == 3
