"""Our header check is at least as strict as the reference reader, our writer gives what the reference reader reads."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, numpy, safe_open

from qlora_hal.errors import AdapterError, QloraHalError, UnsafeInputError
from qlora_hal.files.safetensors_file import MAX_HEADER_BYTES, file_chunks, read_arrays, read_header

ARRAYS: Mapping[str, npt.NDArray[Any]] = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(4, dtype=np.uint8),
    "half": np.ones((3,), dtype=np.float16),
    "scalar": np.array(7, dtype=np.int64),
    "none": np.zeros((0, 5), dtype=np.float32),
}


def written(path: Path, arrays: Mapping[str, npt.NDArray[Any]] = ARRAYS) -> Path:
    path.write_bytes(b"".join(bytes(chunk) for chunk in file_chunks(arrays, {"format": "pt"})))
    return path


def raw_file(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_the_reference_reader_reads_what_is_written_and_the_other_way_round(tmp_path: Path) -> None:
    found = numpy.load_file(written(tmp_path / "ours"))
    numpy.save_file(dict(ARRAYS), tmp_path / "theirs", metadata={"format": "pt"})
    ours = read_arrays(tmp_path / "theirs").arrays
    for name, array in ARRAYS.items():
        for other in (found[name], ours[name]):
            assert (other.dtype, other.shape, other.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_the_bytes_do_not_depend_on_the_order_of_the_mapping(tmp_path: Path) -> None:
    other = dict(reversed(list(ARRAYS.items())))
    assert written(tmp_path / "a").read_bytes() == written(tmp_path / "b", other).read_bytes()


def test_bfloat16_becomes_float32_exactly(tmp_path: Path) -> None:
    # 1.0, -2.5 and the largest finite bfloat16 are the upper halves of these float32 patterns.
    bits = struct.pack("<3H", 0x3F80, 0xC020, 0x7F7F)
    path = raw_file(tmp_path / "x", {"w": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}, bits)
    found = read_arrays(path).arrays["w"]
    assert found.dtype == np.float32
    assert found.tolist() == [1.0, -2.5, float(np.uint32(0x7F7F0000).view(np.float32))]


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    import hashlib

    path = written(tmp_path / "x")
    assert read_arrays(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.fault("C11")
def test_a_dtype_numpy_lacks_is_refused_by_name(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x", {"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, b"12")
    assert read_header(path).tensors["w"].byte_count == 2
    with pytest.raises(AdapterError, match="w with F8_E4M3") as refused:
        read_arrays(path)
    assert (refused.value.code, refused.value.exit_status) == ("QH-C11", 5)


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


MALFORMED: Mapping[str, tuple[object, bytes, str]] = {
    "duplicate key": (b'{"a":%b,"a":%b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), bytes(4), "duplicate"),
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), "overlaps"),
    "same place twice": ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4), "overlaps"),
    "hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12), "hole"),
    "hole at the start": ({"a": entry([1], 4, 8)}, bytes(8), "hole"),
    "bytes after the end": ({"a": entry([1], 0, 4)}, bytes(5), "after its last tensor"),
    "negative offset": ({"a": entry([1], -4, 0)}, bytes(4), "impossible offsets"),
    "backward offsets": ({"a": entry([1], 4, 0)}, bytes(4), "impossible offsets"),
    "offset as text": ({"a": entry([1], "0", 4)}, bytes(4), "impossible offsets"),
    "overflow": ({"a": entry([2**40, 2**40], 0, 4)}, bytes(4), "overflows"),
    "overflow hidden by a zero": ({"a": entry([2**62, 2**62, 0], 0, 0)}, b"", "overflows"),
    "size and shape differ": ({"a": entry([3], 0, 4)}, bytes(4), "needs 12"),
    "negative shape": ({"a": entry([-1, -1], 0, 4)}, bytes(4), "impossible shape"),
    "boolean shape": ({"a": entry([True], 0, 4)}, bytes(4), "impossible shape"),
    "fraction in shape": ({"a": entry([1.0], 0, 4)}, bytes(4), "impossible shape"),
    "unknown dtype": ({"a": entry([1], 0, 4, "F33")}, bytes(4), "unknown dtype"),
    "half a byte": ({"a": entry([1], 0, 1, "F4")}, bytes(1), "needs"),
    "missing field": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "without exactly"),
    "extra field": ({"a": {**entry([1], 0, 4), "x": 1}}, bytes(4), "without exactly"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "control characters in a name": ({"\x1b[2J": entry([1], 0, 4)}, bytes(4), "unprintable"),
    "a list": ([], b"", "begin with"),
    "nested deeply": (b'{"a":' + b"[" * 50_000, b"", "not strict JSON"),
    "not UTF-8": (b'{"\xff":1}', b"", "not strict JSON"),
}


@pytest.mark.fault("C15")
@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_with_status_10(tmp_path: Path, case: str) -> None:
    header, data, words = MALFORMED[case]
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    for read in (read_header, read_arrays):
        with pytest.raises(UnsafeInputError, match=words) as refused:
            read(path)
        assert (refused.value.code, refused.value.exit_status) == ("QH-C15", 10)
        assert "Malformed safetensors file: bad.safetensors" in refused.value.message


@pytest.mark.fault("C01")
@pytest.mark.parametrize("kept", [0, 7, 8, 20, -1])
def test_a_truncated_file_is_refused_with_sizes(tmp_path: Path, kept: int) -> None:
    path = written(tmp_path / "x")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(AdapterError, match=r"Truncated .* has \d+ bytes") as refused:
        read_header(path)
    assert (refused.value.code, refused.value.exit_status) == ("QH-C01", 5)


HEAVY = {
    "a million empty tensors": b"{" + b",".join(
        b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(400_000)
    ) + b"}",
    "ten million lists": b'{"a":[' + b"[]," * 10_000_000 + b"0]}",
    "eleven million numbers": b'{"a":[' + b"0," * 15_000_000 + b"0]}",
}  # fmt: skip


@pytest.mark.fault("C16")
@pytest.mark.parametrize("case", HEAVY)
def test_a_header_made_to_burn_memory_is_refused_within_a_second_and_200_megabytes(tmp_path: Path, case: str) -> None:
    assert len(HEAVY[case]) < MAX_HEADER_BYTES  # so that the length alone does not refuse it
    path = raw_file(tmp_path / "heavy.safetensors", HEAVY[case])
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(UnsafeInputError, match="limit") as refused:
        read_header(path)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (refused.value.code, refused.value.exit_status) == ("QH-C16", 10)
    assert seconds < 1
    assert peak < 200e6


@pytest.mark.fault("C16")
@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 100_000_000, 2**63, 2**64 - 1])
def test_a_header_length_over_the_limit_is_refused_unread(tmp_path: Path, length: int) -> None:
    with pytest.raises(UnsafeInputError, match=f"header of {length} bytes") as refused:
        read_header(raw_file(tmp_path / "x", {}, length=length))
    assert refused.value.code == "QH-C16"


def test_a_large_but_honest_file_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "x", {f"layer.{n}": np.zeros(1, dtype=np.float32) for n in range(5_000)})
    assert len(read_arrays(path).arrays) == 5_000


@pytest.mark.fault("X06")
def test_links_pipes_and_folders_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(written(tmp_path / "x"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(OSError, match=r"symbolic|regular"):
            read_header(tmp_path / name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F4", "BOOL", "nope"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 24), min_size=2, max_size=2) | JSON,
    }
)
HEADERS = st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()) | st.dictionaries(
    st.text(max_size=6) | st.just("__metadata__"), ENTRIES | JSON, max_size=3
).map(lambda value: json.dumps(value).encode())  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=HEADERS, data=st.binary(max_size=24), length=st.none() | st.integers(0, 120) | st.integers(0, 2**64 - 1))
def test_any_bytes_give_tensors_or_our_error_and_never_more_than_the_reference_reader_takes(
    tmp_path: Path, header: bytes, data: bytes, length: int | None
) -> None:
    path = raw_file(tmp_path / "fuzz", header, data, length=length)
    try:
        found = read_arrays(path)
    except QloraHalError as refused:
        code = refused.code
    else:
        assert_reference_reader_agrees(path, set(found.arrays))
        return
    assert code in ("QH-C01", "QH-C11", "QH-C15", "QH-C16")


def assert_reference_reader_agrees(path: Path, names: set[str]) -> None:
    try:
        with safe_open(path, "np") as reference:
            assert set(reference.keys()) == names
    except SafetensorError as problem:
        pytest.fail(f"the reference reader refuses what was accepted: {problem}")
