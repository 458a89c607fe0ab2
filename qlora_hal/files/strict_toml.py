"""TOML that is bounded before it is built: Python's reader takes memory by the square of a dotted key's length."""

from __future__ import annotations

import re
import tomllib
from typing import Any

MAX_VALUES = 5_000
MAX_DEPTH = 32

_TEXTS = re.compile(
    r"""\"{3}(?:[^\\]|\\.)*?\"{3}|'{3}.*?'{3}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|\#[^\n]*""",
    re.DOTALL,
)
"""Strings and comments, in which no sign means anything."""


class TomlProblem(ValueError):
    """Why a text is not read. `line` counts from 1, where the reader tells one; `is_bomb` says that it may be TOML, and
    is larger or deeper than any file should be."""

    def __init__(self, reason: str, line: int | None = None, *, is_bomb: bool = False) -> None:
        super().__init__(reason)
        self.line, self.is_bomb = line, is_bomb


def decode(text: str) -> dict[str, Any]:
    """The tables of a TOML text. Raises TomlProblem, and nothing else."""
    _refuse_bomb(text)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+)", str(error))
        raise TomlProblem(str(error).partition(" (at ")[0], int(found[1]) if found else None) from error
    except RecursionError as error:
        raise TomlProblem("its values are nested too deeply", is_bomb=True) from error
    except ValueError as error:  # a whole number of more digits than Python reads
        raise TomlProblem(str(error).partition("; use sys.")[0]) from error


def _refuse_bomb(text: str) -> None:
    bare = _TEXTS.sub("_", text)
    if sum(map(bare.count, "=,[{")) > MAX_VALUES:
        raise TomlProblem(f"it holds more than {MAX_VALUES} values", is_bomb=True)
    deepest = max((key.count(".") for key in re.findall(r"[\w\-. \t]+", bare)), default=0)
    depth = 0
    for sign in re.findall(r"[\[\]{}]", bare):
        depth += 1 if sign in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise TomlProblem(f"its values are nested more than {MAX_DEPTH} deep", is_bomb=True)
