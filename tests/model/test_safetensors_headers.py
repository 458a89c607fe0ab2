"""Weight files are hostile until checked: malformed, truncated and oversized headers are refused with the model
room's errors and the file's own name, also behind the links of a hub cache."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from qlora_hal.errors import ModelError, UnsafeInputError
from qlora_hal.files.safetensors_file import MAX_HEADER_BYTES
from qlora_hal.model.safetensors_headers import read_header, read_tensor_bytes


def write_raw(path: Path, header: object, data: bytes = b"", *, claimed: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if claimed is None else claimed).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str = "F32", shape: object = (1,), begin: int = 0, end: int = 4) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}  # type: ignore[call-overload]


def test_a_file_of_the_library_is_read_with_names_shapes_and_offsets(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.int8), "empty": np.ones((0, 4))}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    header = read_header(tmp_path / "x.safetensors")
    assert dict(header.metadata) == {"format": "np"}
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {k: v.shape for k, v in arrays.items()}
    assert read_tensor_bytes(header, "a") == arrays["a"].tobytes()


MALFORMED: dict[str, tuple[object, bytes]] = {
    "no JSON": (b"{nonsense", b""),
    "not an object": (b"[1, 2]", b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "nested beyond reason": (b'{"a":' + b"[" * 100_000, b""),
    "duplicated name": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "entry is a list": ({"a": []}, b""),
    "extra key": ({"a": {**entry(), "code": "x"}}, b"1234"),
    "unknown dtype": ({"a": entry("PICKLE")}, b"1234"),
    "negative offset": ({"a": entry(begin=-4, end=0)}, b"1234"),
    "negative side": ({"a": entry(shape=(-1,))}, b"1234"),
    "fractional side": ({"a": entry(shape=(1.0,))}, b"1234"),
    "overflowing shape": ({"a": entry(shape=(2**40, 2**40))}, b"1234"),
    "bytes do not fit shape": ({"a": entry(shape=(2,))}, b"1234"),
    "overlap": ({"a": entry(), "b": entry(begin=2, end=6)}, b"123456"),
    "hole": ({"a": entry(), "b": entry(begin=8, end=12)}, b"123456789012"),
    "hole at the start": ({"a": entry(begin=4, end=8)}, b"12345678"),
    "bytes after the end": ({"a": entry()}, b"1234more"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry()}, b"1234"),
}  # fmt: skip


@pytest.mark.fault("C15")
@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_header_is_refused_and_named(tmp_path: Path, case: str) -> None:
    header, data = MALFORMED[case]
    with pytest.raises(UnsafeInputError, match="Malformed") as caught:
        read_header(write_raw(tmp_path / "bad.safetensors", header, data))
    assert (caught.value.code, caught.value.exit_status) == ("QH-C15", 10)
    assert "bad.safetensors" in caught.value.message


@pytest.mark.fault("C01")
@pytest.mark.parametrize(
    "keep", ["all but one byte", "half", "header only", "half the header", "four bytes", "nothing"]
)
def test_a_truncated_file_is_told_with_expected_and_real_size(tmp_path: Path, keep: str) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"a": np.ones((16, 16), np.float32)}, path)
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    kept = {"all but one byte": len(whole) - 1, "half": len(whole) // 2, "header only": header_end,
            "half the header": header_end // 2, "four bytes": 4, "nothing": 0}[keep]  # fmt: skip
    path.write_bytes(whole[:kept])
    with pytest.raises(ModelError, match="Truncated") as caught:
        read_header(path)
    assert (caught.value.code, caught.value.exit_status) == ("QH-C01", 5)
    assert f"cut.safetensors has {kept} bytes" in caught.value.message


@pytest.mark.fault("C01")
def test_a_link_into_a_cache_is_followed_and_errors_name_the_link(tmp_path: Path) -> None:
    blob, link = tmp_path / "0a1b2c", tmp_path / "model.safetensors"
    save_file({"a": np.ones(4, np.float32)}, blob)
    link.symlink_to(blob)
    assert list(read_header(link).tensors) == ["a"]
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors has") as caught:
        read_header(link)
    assert caught.value.where == str(link)


@pytest.mark.fault("C16")
def test_a_header_that_claims_too_much_is_refused_at_once(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "huge.safetensors", {"a": entry()}, b"1234", claimed=MAX_HEADER_BYTES + 1)
    with pytest.raises(UnsafeInputError) as caught:
        read_header(path)
    assert (caught.value.code, caught.value.exit_status) == ("QH-C16", 10)


@pytest.mark.fault("C16")
def test_a_million_empty_tensors_cost_less_than_a_second_and_200_megabytes(tmp_path: Path) -> None:
    body = ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(1_000_000))
    path = write_raw(tmp_path / "many.safetensors", f"{{{body}}}".encode())
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(UnsafeInputError) as caught:
        read_header(path)
    seconds = time.perf_counter() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.code == "QH-C16"
    assert seconds < 1.0
    assert peak < 200e6


@given(st.binary(max_size=400) | st.binary(max_size=400).map(lambda raw: len(raw).to_bytes(8, "little") + b"{" + raw))
@settings(max_examples=200, deadline=None)
def test_random_bytes_give_a_header_that_fills_the_file_or_our_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(data)
    try:
        header = read_header(path)
    except (ModelError, UnsafeInputError):
        return
    assert 8 + len(header.raw) + sum(tensor.byte_count for tensor in header.tensors.values()) == len(data)
