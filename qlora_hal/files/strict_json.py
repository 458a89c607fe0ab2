"""JSON with one meaning: sorted keys, no NaN, no duplicate keys, bounded size. For every JSON file that the core owns.

Python's own reader accepts duplicate keys (the last wins) and the non-standard words NaN and Infinity; two readers of
one file could then see two different states. The files of others are read as their libraries read them
(`decode_foreign`), within the same bounds: a text of a few megabytes can become gigabytes of objects.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from qlora_hal.files.opening import open_regular, read_stored

MAX_JSON_BYTES = 16 * 1024 * 1024
"""Above anything written here: an adapter of 100 000 modules lists its targets in about 6 MB."""

MAX_VALUES = 1_000_000
"""Above what a file of 100 000 modules needs. A value takes up to 200 bytes of memory."""
MAX_OWN_DIGITS, MAX_FOREIGN_DIGITS = 19, 60
"""Digits of whole numbers: those that are written here have 64 bits; others write 10**30 for "no limit"."""
MAX_DEPTH = 100
"""Lists and objects within one another; what walks through a value needs Python's stack."""


class JsonProblem(ValueError):
    """Why a text is not strict JSON, or a value cannot be written as it; callers turn it into their own error."""


def encode(value: object) -> bytes:
    """Canonical bytes, equal for equal values: sorted keys, two spaces, a final newline. NumPy scalars become numbers.

    Raises JsonProblem for NaN, infinities and values that JSON has no form for.
    """
    try:
        text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
        return (text + "\n").encode("utf-8")
    except (TypeError, ValueError, RecursionError) as problem:
        raise JsonProblem(f"{_culprit(value) or 'the value'}: {problem}") from problem


def decode(raw: bytes) -> object:
    """The value of a strict JSON text. Raises JsonProblem, and nothing else, for anything that is not one."""
    hooks: dict[str, Any] = {"object_pairs_hook": unique_keys, "parse_constant": _no_constant, "parse_float": _finite}
    return _decoded(raw, MAX_JSON_BYTES, MAX_VALUES, MAX_OWN_DIGITS, **hooks)


def decode_foreign(raw: bytes, *, most_bytes: int = MAX_JSON_BYTES, most_values: int = MAX_VALUES) -> object:
    """The value of a JSON text of others: the last of equal keys counts, NaN and Infinity are numbers.

    Raises JsonProblem, and nothing else: for what is no JSON, and beyond the limits of bytes, values and depth.
    """
    return _decoded(raw, most_bytes, most_values, MAX_FOREIGN_DIGITS)


def read_foreign_object(path: Path, *, most_bytes: int = MAX_JSON_BYTES) -> dict[str, object]:
    """The object in a file of others, which may be a link (hub snapshots are), but no pipe. Raises JsonProblem, and
    OSError where the file cannot be read."""
    return _object(decode_foreign(read_stored(path, most_bytes), most_bytes=most_bytes))


def refuse_depth(value: object) -> None:
    """Raise JsonProblem where lists and objects lie deeper within one another than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise JsonProblem(f"its values are nested more than {MAX_DEPTH} deep")


def _decoded(raw: bytes, most_bytes: int, most_values: int, most_digits: int, **hooks: Any) -> object:
    if len(raw) > most_bytes:
        raise JsonProblem(f"{len(raw)} bytes, at most {most_bytes} are read")
    # Counted first, so that a bomb never becomes objects.
    opened = raw.count(b"[") + raw.count(b"{")
    if opened + raw.count(b",") > most_values:
        raise JsonProblem(f"more than {most_values} values")
    # Python's reader is slower with a hook for numbers, which few files need.
    if re.search(rb"\d{%d}" % (most_digits + 1), raw):
        hooks["parse_int"] = functools.partial(_whole_number, most_digits)
    if "parse_float" in hooks and not re.search(rb"[eE]\+?\d{3}|\d{300}", raw):
        del hooks["parse_float"]
    try:
        value = json.loads(raw.decode("utf-8"), **hooks)
    except JsonProblem:
        raise
    except (ValueError, RecursionError) as problem:
        raise JsonProblem(str(problem).partition("; use sys.")[0]) from problem
    if opened > MAX_DEPTH:
        refuse_depth(value)
    return value


def decode_object(raw: bytes) -> dict[str, object]:
    """Like `decode`, for a text that must hold an object."""
    return _object(decode(raw))


def read_object(path: Path) -> dict[str, object]:
    """The object in a small file. Raises JsonProblem, and OSError where the file cannot be read."""
    with open_regular(path) as stream:
        return decode_object(stream.read(MAX_JSON_BYTES + 1))


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise JsonProblem(f"an object is expected, a {type(value).__name__} was found")
    return value


def _plain(value: object) -> object:
    # Only who has imported NumPy can have made one; a broken installation of it is then told of by the command line.
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} has no JSON form")


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Hook for `json.loads` that refuses an object with a repeated key (JsonProblem)."""
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise JsonProblem(f"duplicate key {', '.join(ascii(name[:80]) for name in twice[:3])}")
    return result


def _whole_number(most_digits: int, text: str) -> int:
    if len(text.lstrip("-")) > most_digits:
        raise JsonProblem(f"a whole number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise JsonProblem(f"{text[:20]} is too large for a number")
    return number


def _no_constant(word: str) -> NoReturn:
    raise JsonProblem(f"{word} is not JSON")


def _culprit(value: object, path: str = "") -> str:
    """The dotted path of the first value that cannot be written, for the message."""
    if isinstance(value, dict):
        inner = ((f"{path}.{key}" if path else str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        inner = ((f"{path}[{index}]", item) for index, item in enumerate(value))
    else:
        try:
            json.dumps(value, allow_nan=False, default=_plain)
        except (TypeError, ValueError):
            return path
        return ""
    return next((found for name, item in inner if (found := _culprit(item, name))), "")
