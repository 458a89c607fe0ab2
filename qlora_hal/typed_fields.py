"""Whether what another's code made is of the types that its annotations promise: Python itself asks nobody."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def wrong_fields(record: object, name: str = "") -> list[str]:
    """One phrase for each field of a dataclass, or of one inside it, that is not of its type: `priority is a str
    ('high'), int is expected`. A number of another library is no float, a list is no frozenset."""
    return list(_wrong(record, f"{name}." if name else ""))


def _wrong(record: Any, prefix: str) -> Iterator[str]:
    made: Any = type(record)
    for field, kind in _kinds(made).items():
        value = getattr(record, field)
        if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, kind):
            yield from _wrong(value, f"{prefix}{field}.")
        elif not _fits(value, kind):
            expected = next(f.type for f in fields(record) if f.name == field)
            yield f"{prefix}{field} is a {type(value).__name__} ({reprlib.repr(value)}), {expected} is expected"


@cache
def _kinds(record: type) -> Mapping[str, Any]:
    hints = get_type_hints(record)
    return {field.name: hints[field.name] for field in fields(record)}


def _fits(value: object, kind: Any) -> bool:
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if outer in (Union, UnionType):
        return any(_fits(value, choice) for choice in inner)
    if outer is Callable:
        return callable(value)
    if outer in (int, float):
        return isinstance(value, int if outer is int else (int, float)) and not isinstance(value, bool)
    if not isinstance(value, outer):
        return False
    if isinstance(value, Mapping):
        return all(_fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items())
    if isinstance(value, (tuple, frozenset)):
        return all(_fits(item, inner[0]) for item in value)
    return not is_dataclass(outer) or not wrong_fields(value)
