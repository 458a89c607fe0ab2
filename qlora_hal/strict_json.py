"""JSON with one meaning: sorted keys, no NaN, no duplicate keys, bounded size. For every JSON file that the core owns.

Python's own reader accepts duplicate keys (the last wins) and the non-standard words NaN and Infinity; two readers of
one file could then see two different states.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NoReturn

import numpy as np

MAX_JSON_BYTES = 16 * 1024 * 1024
"""Above anything written here: an adapter of 100 000 modules lists its targets in about 6 MB."""


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
    if len(raw) > MAX_JSON_BYTES:
        raise JsonProblem(f"{len(raw)} bytes, at most {MAX_JSON_BYTES} are read")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_no_constant)
    except JsonProblem:
        raise
    except (ValueError, RecursionError) as problem:
        raise JsonProblem(str(problem)) from problem


def decode_object(raw: bytes) -> dict[str, object]:
    """Like `decode`, for a text that must hold an object."""
    value = decode(raw)
    if not isinstance(value, dict):
        raise JsonProblem(f"an object is expected, a {type(value).__name__} was found")
    return value


def read_object(path: Path) -> dict[str, object]:
    """The object in a small file. Raises JsonProblem, and OSError where the file cannot be read."""
    from qlora_hal.durable_files import open_regular

    with open_regular(path) as stream:
        return decode_object(stream.read(MAX_JSON_BYTES + 1))


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} has no JSON form")


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Hook for `json.loads` that refuses an object with a repeated key (JsonProblem)."""
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise JsonProblem(f"duplicate key {', '.join(ascii(name[:80]) for name in twice[:3])}")
    return result


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
