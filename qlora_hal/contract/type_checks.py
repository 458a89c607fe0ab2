"""Whether what another's code made is of the types that its annotations promise: Python itself asks nobody."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints


def wrong_fields(record: object, name: str = "") -> list[str]:
    """One phrase for each field of a dataclass, or of one inside it, that is not of its type: `priority is a str
    ('high'), int is expected`. A number of another library is no float, a list is no frozenset. An annotation that
    Python cannot be asked about (Any, a protocol, a name that only a type checker sees) promises nothing here."""
    return list(_wrong(record, f"{name}." if name else ""))


def _wrong(record: Any, prefix: str) -> Iterator[str]:
    made: Any = type(record)
    for field, kind in _kinds(made).items():
        value = getattr(record, field)
        if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, kind):
            yield from _wrong(value, f"{prefix}{field}.")
        elif not _fits(value, kind):
            written = next(f.type for f in fields(record) if f.name == field)
            expected = written.__name__ if isinstance(written, type) else written
            yield f"{prefix}{field} is a {type(value).__name__} ({reprlib.repr(value)}), {expected} is expected"


@cache
def _kinds(record: type) -> Mapping[str, Any]:
    """The type of each field. What a backend's own subclass writes may name what only a type checker sees: the classes
    below it keep their promises."""
    hints: dict[str, Any] = {}
    for owner in reversed(record.__mro__):
        with suppress(Exception):
            hints |= get_type_hints(owner)
    return {field.name: hints.get(field.name, Any) for field in fields(record)}


def _fits(value: object, kind: Any) -> bool:
    kind = _named(kind)
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if outer in (Union, UnionType):
        return any(_fits(value, choice) for choice in inner)
    if outer is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if outer is Callable:
        return callable(value)
    if outer in (int, float):
        return isinstance(value, int if outer is int else (int, float)) and not isinstance(value, bool)
    try:
        if not isinstance(value, outer):
            return False
    except TypeError:
        return True
    if is_dataclass(outer):
        return not wrong_fields(value)
    return not inner or _items_fit(value, inner)


def _items_fit(value: object, inner: tuple[Any, ...]) -> bool:
    if isinstance(value, Mapping):
        return all(_fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items())
    if isinstance(value, tuple) and inner[-1] is not ...:
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(_fits(item, inner[0]) for item in value)
    return True


def _named(kind: Any) -> Any:
    """The type behind a name: what `type X = ...` names (NumPy's NDArray, from 2.5 on Python 3.12; before, it is the
    array type itself), a NewType, an annotated or final type."""
    while True:
        outer = get_origin(kind) or kind
        if outer in (Annotated, Final) and get_args(kind):
            kind = get_args(kind)[0]
        elif hasattr(outer, "__supertype__"):
            kind = outer.__supertype__
        elif hasattr(outer, "__type_params__") and hasattr(outer, "__value__"):
            kind = _value(outer, get_args(kind))
        else:
            return kind


def _value(alias: Any, given: tuple[Any, ...]) -> Any:
    """What an alias stands for, its parameters filled in by name: their order in the value may be another."""
    value, chosen = alias.__value__, dict(zip(alias.__type_params__, given, strict=False))
    if not all(isinstance(parameter, TypeVar) for parameter in alias.__type_params__):
        return get_origin(value) or value
    wanted = getattr(value, "__parameters__", ())
    return value[tuple(chosen[name] for name in wanted)] if wanted and chosen.keys() >= set(wanted) else value
