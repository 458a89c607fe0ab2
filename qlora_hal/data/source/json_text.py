"""JSON as rows are written in it: finite numbers, and no key twice in one object; Python would keep the last."""

from __future__ import annotations

import json
import math
import re
from typing import NoReturn

from qlora_hal.files.strict_json import MAX_DEPTH, refuse_depth, unique_keys

MAX_ROW_VALUES = 500_000
"""Values of one row, so that a text of 32 MiB does not become a gigabyte of empty lists."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:20]} is too large for a number")
    return number


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_UNIQUE_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=unique_keys)
_KEY_AND_BLANK = re.compile(r'"\s+:')


def decoded(text: str) -> object:
    """The value of a whole text. Raises ValueError (json.JSONDecodeError with a place), RecursionError."""
    value = _DECODER.decode(text)
    if _may_repeat_a_key(text, 0, len(text), value):
        _UNIQUE_DECODER.decode(text)
    return value


def decoded_cell(text: str) -> object:
    """The value of a text that stands in a field of a row, bounded as rows are. Raises as `decoded` does."""
    if sum(map(text.count, (",", "[", "{"))) > MAX_ROW_VALUES:
        raise ValueError(f"it holds more than {MAX_ROW_VALUES} values")
    value = decoded(text)
    if text.count("[") + text.count("{") > MAX_DEPTH:
        refuse_depth(value)
    return value


def decoded_from(text: str, at: int) -> tuple[object, int]:
    """The value that begins at `at`, and where it ends. Raises as `decoded` does."""
    value, end = _DECODER.raw_decode(text, at)
    if _may_repeat_a_key(text, at, end, value):
        _UNIQUE_DECODER.raw_decode(text, at)
    return value, end


def _may_repeat_a_key(text: str, at: int, end: int, value: object) -> bool:
    """Whether the text has more signs of a key than the value has keys at its two upper levels.

    A hook of `json` would be called for each object and take as long again as decoding does. Each key has a colon, so
    as many colons as keys settle it; else those behind a quotation mark are counted. Signs inside strings and keys
    further down only make the number larger, so no repeated key is missed.
    """
    keys = 0
    if type(value) is dict:
        keys = len(value)
        for held in value.values():
            if type(held) is list:
                keys += sum([len(item) for item in held if type(item) is dict])
    if text.count(":", at, end) == keys:
        return False
    return text.count('":', at, end) != keys or _KEY_AND_BLANK.search(text, at, end) is not None
