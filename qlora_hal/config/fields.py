"""The settings of a run as a flat list, read from the pydantic tree: flags, the commented file, help and error texts.

One source for every spelling of a setting, so that the command line, the file and the messages cannot drift apart.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qlora_hal.config import habits
from qlora_hal.config.schema import FormatName, RunConfig

Kind = Literal["text", "whole number", "number", "true or false", "choice", "list", "text or list", "mapping", "groups"]

ENVIRONMENT_PREFIX = "QLORA_HAL_"
_LONGEST_NAME = 80
"""Beyond it nothing was mistyped, and the search for what is near takes time by the square of the length."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the tree. `expected` finishes the sentence "... is expected"."""

    path: str
    kind: Kind
    expected: str
    choices: tuple[str, ...]
    default: object
    optional: bool
    description: str

    @property
    def group(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def environment_name(self) -> str:
        return ENVIRONMENT_PREFIX + self.path.replace(".", "__").upper()

    @property
    def default_text(self) -> str:
        """The default as a user would write it; empty when there is none."""
        if self.default is None or self.default in ("", (), {}):
            return ""
        if isinstance(self.default, bool):
            return str(self.default).lower()
        if isinstance(self.default, float):
            return f"{self.default:g}"
        return str(self.default)


@cache
def settings() -> Mapping[str, Setting]:
    """Every setting by dotted path, in the order of the file."""
    return {setting.path: setting for setting in _walk(RunConfig, "")}


@cache
def groups() -> Mapping[str, str]:
    """Group name -> what it is about."""
    return {
        name: (field.annotation.__doc__ or "").strip()
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def known_by_name(name: str) -> str | None:
    """The setting whose last word, here or in a neighbouring tool, is that of a dotted `name` without dots or in
    another group, or None."""
    leaf = habits.leaf(name)
    return habits.SETTINGS.get(leaf) or _by_leaf().get(leaf)


def setting_by_letters(name: str) -> str | None:
    """The setting whose name is spelled most like a mistyped one, or None."""
    if len(name) > _LONGEST_NAME:
        return None
    name = name.replace("-", "_").lower()
    close = get_close_matches(name, settings(), n=1, cutoff=0.75)
    if close:
        return close[0]
    close = get_close_matches(name.rpartition(".")[2], _by_leaf(), n=1, cutoff=0.8)
    return _by_leaf()[close[0]] if close else None


@cache
def _by_leaf() -> Mapping[str, str]:
    return {path.rpartition(".")[2]: path for path in settings()}


def setting_named(name: str) -> str:
    """The setting whose last word is `name`, which one has. Raises KeyError."""
    return _by_leaf()[name]


def nearest_group(name: str) -> str | None:
    """The group a mistyped top-level key most likely means, or None."""
    if len(name) > _LONGEST_NAME:
        return None
    close = get_close_matches(name, groups(), n=1, cutoff=0.7)
    return close[0] if close else None


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, BaseModel):
            yield from _walk(group, f"{prefix}{name}.")
        else:
            yield _setting(f"{prefix}{name}", field)


def _setting(path: str, field: FieldInfo) -> Setting:
    annotation, bounds, optional = _unwrap(field.annotation, list(field.metadata))
    kind, choices = _kind(annotation)
    for named in (item for item in bounds if isinstance(item, FormatName)):
        kind, choices = "choice", named.choices()
    default = field.get_default(call_default_factory=True, validated_data={})
    expected = _expected(kind, choices, bounds)
    if kind == "groups":
        expected = f"{expected} with {', '.join(get_args(annotation)[0].model_fields)}"
    return Setting(path, kind, expected, choices, default, optional, field.description or "")


def _unwrap(annotation: Any, bounds: list[object]) -> tuple[Any, list[object], bool]:
    """Strip `| None` and Annotated, gathering the constraints they carry."""
    optional = False
    while True:
        if hasattr(annotation, "__metadata__"):
            for item in annotation.__metadata__:
                bounds.extend(item.metadata if isinstance(item, FieldInfo) else [item])
            annotation = annotation.__origin__
        elif get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation):
            rest = tuple(a for a in get_args(annotation) if a is not type(None))
            annotation, optional = rest[0] if len(rest) == 1 else Union[rest], True  # noqa: UP007
        else:
            return annotation, bounds, optional


def _kind(annotation: Any) -> tuple[Kind, tuple[str, ...]]:
    origin = get_origin(annotation)
    if origin is Literal:
        return "choice", tuple(str(a) for a in get_args(annotation))
    if origin in (Union, types.UnionType):
        return "text or list", tuple(choice for kind in get_args(annotation) for choice in _kind(kind)[1])
    if origin is tuple:
        item = get_args(annotation)[0]
        if isinstance(item, type) and issubclass(item, BaseModel):
            return "groups", ()
        return "list", tuple(str(a) for a in get_args(item)) if get_origin(item) is Literal else ()
    if origin is dict:
        return "mapping", ()
    plain: dict[Any, Kind] = {bool: "true or false", int: "whole number", float: "number"}
    return plain.get(annotation, "text"), ()


def _expected(kind: Kind, choices: tuple[str, ...], bounds: list[object]) -> str:
    if kind == "choice":
        return f"one of {', '.join(choices)}"
    if kind == "text or list" and choices:
        return f"{choices[-1]}, or a list of {', '.join(choices[:-1])}"
    if kind == "list":
        return f"a list of {', '.join(choices)}" if choices else "a list of strings"
    if kind in ("whole number", "number"):
        limits = [f"{word} {getattr(b, name):g}" for b in bounds for name, word in _BOUND_WORDS if hasattr(b, name)]
        return f"a {kind} {' and '.join(limits)}".rstrip()
    return {
        "text": "a string",
        "text or list": "a string or a list of strings",
        "mapping": "a mapping of names to values",
        "groups": "a list of mappings",
    }.get(kind, kind)


_BOUND_WORDS = (("gt", "above"), ("ge", "from"), ("lt", "below"), ("le", "up to"))
