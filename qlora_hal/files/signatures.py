"""What the first bytes of a file show it to be, where its name says something else.

A clone without Git LFS holds pointers in place of the large files; a download without a login, a web page; a file that
was only renamed keeps its format. Each would be read as broken JSON or as a damaged tensor file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
"""The specification of Git LFS: a pointer is shorter than this."""

_MARKS: Mapping[bytes, str] = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_FORMATS: Mapping[bytes, tuple[str, frozenset[str]]] = {
    b"\x1f\x8b": ("a gzip archive", frozenset({".gz"})),
    b"\x28\xb5\x2f\xfd": ("a zstandard archive", frozenset({".zst"})),
    b"PK\x03\x04": ("a zip archive (as .xlsx is one)", frozenset({".zip", ".pt", ".pth", ".bin", ".npz"})),
    b"PAR1": ("a Parquet file", frozenset({".parquet"})),
    b"ARROW1": ("an Arrow file", frozenset({".arrow"})),
    b"GGUF": ("a GGUF file", frozenset({".gguf"})),
}


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the few lines that Git LFS keeps in its place. Raises OSError."""
    with path.open("rb") as stream:
        return stream.read(len(_LFS)) == _LFS


def lfs_fix(folder: Path) -> str:
    """How to get the files that pointers stand for."""
    return f"Run git lfs pull in {folder}, or download the files again."


def other_encoding(beginning: bytes) -> str:
    """The encoding that a text begins in, where it is not UTF-8 (or one of single bytes); empty for those."""
    for mark, encoding in _MARKS.items():
        if beginning.startswith(mark):
            return encoding
    # Rows begin with signs of ASCII, whose other bytes are zero; a mark is not always written.
    zeros = [index for index in range(min(8, len(beginning))) if beginning[index] == 0]
    if zeros in ([1, 3, 5, 7], [0, 2, 4, 6]):
        return "UTF-16"
    return "UTF-32" if zeros in ([1, 2, 3, 5, 6, 7], [0, 1, 2, 4, 5, 6]) else ""


def what_it_is_instead(path: Path, beginning: bytes) -> tuple[str, str] | None:
    """(what a file is, what to do) where that is not what its name says."""
    if beginning.startswith(_LFS):
        return "a Git LFS pointer, not the file itself", lfs_fix(path.parent)
    if beginning.lstrip(b"\xef\xbb\xbf \t\r\n")[:9].lower() in (b"<!doctype", b"<html lan", b"<html><he"):
        return (
            "a web page",
            "Download the file itself; a web page is returned where a login or another address is needed.",
        )
    for sign, (what, endings) in _FORMATS.items():
        if beginning.startswith(sign) and path.suffix.lower() not in endings:
            return what, "Unpack or convert it, and name the file by what it holds."
    return None
