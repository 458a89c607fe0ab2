"""What a table says of one key of another tool, and what a value of that key becomes here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

Value = object


class Fate(StrEnum):
    """What becomes of a key. NOT_NEEDED: the result is the same without it. NO_PLACE: it is not."""

    TAKEN = "taken"
    TRANSLATED = "translated"
    NOT_NEEDED = "not needed"
    NO_PLACE = "no place here"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one value becomes: settings by dotted path, and a sentence for who brought the file."""

    fate: Fate
    settings: Mapping[str, Value] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True)
class Computed:
    """A value that a script computes. Scripts are read and never run, so only its text is known."""

    text: str


@dataclass(frozen=True, slots=True)
class Given:
    """All values of a file by the first spelling of their keys, what the tool takes for those that are absent, and the
    base's config.json where it is on this disk."""

    values: Mapping[str, Value]
    defaults: Mapping[str, Value] = field(default_factory=dict)
    model: Mapping[str, Value] = field(default_factory=dict)

    def get(self, name: str, default: Value = None) -> Value:
        """The value; where it is absent, null, or computed by a script, the tool's own, else `default`."""
        value = self.values.get(name)
        if value is None or isinstance(value, Computed):
            value = self.defaults.get(name)
        return default if value is None else value

    def number(self, name: str, default: float) -> float:
        """As `get`, for what is multiplied; text such as `1e-4`, which YAML 1.1 makes of it, counts as its number."""
        value = self.get(name, default)
        return as_number(value) or default


Rule = Callable[[Value, Given], Outcome]


@dataclass(frozen=True, slots=True)
class Key:
    """One key. `here` is the setting it becomes, empty for none; `there` is what it means in its tool, or why it has no
    place; `names` are its spellings, the common one first."""

    names: tuple[str, ...]
    here: str
    there: str
    rule: Rule
    fate: Fate


@dataclass(frozen=True, slots=True)
class Default:
    """What a tool takes for a key that is not given, where this project's default is another. It stands back when a key
    of the file makes one of these settings."""

    value: Value
    unless: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool: its keys, what it does unasked, and how its files are recognized.

    `marks` are keys that no other tool has. `habits` are settings that no key there governs, with the reason. `about`
    holds for every file. `objective` names a kind of training that is not offered here, from the values, or nothing.
    """

    name: str
    title: str
    read: str
    keys: tuple[Key, ...]
    marks: frozenset[str]
    defaults: Callable[[Given], Mapping[str, Default]]
    habits: Mapping[str, tuple[Value, str]]
    about: tuple[str, ...]
    groups: frozenset[str] = frozenset()
    objective: Callable[[Given], str] = lambda given: ""

    def by_name(self) -> dict[str, Key]:
        """Every spelling with its key."""
        return {name: key for key in self.keys for name in key.names}


# Kinds of rows in a table ------------------------------------------------------------------------------------------


def same(names: str, here: str, there: str = "") -> Key:
    """The same value under another name."""
    return Key(_spellings(names), here, there, lambda value, given: Outcome(Fate.TAKEN, {here: value}), Fate.TAKEN)


def translated(names: str, here: str, there: str, rule: Rule) -> Key:
    """Another value here, by `rule`."""
    return Key(_spellings(names), here, there, rule, Fate.TRANSLATED)


def not_needed(names: str, why: str) -> tuple[Key, ...]:
    """Keys that change speed, logs or files, and not what is computed. `names` are keys of their own."""
    return tuple(
        Key((name,), "", why, lambda value, given: Outcome(Fate.NOT_NEEDED, note=why), Fate.NOT_NEEDED)
        for name in names.split()
    )


def no_place(names: str, why: str, *, off: tuple[Value, ...] = ()) -> tuple[Key, ...]:
    """Keys that change the result and have no counterpart. A value of `off` (or false, 0) turns them off."""

    def rule(value: Value, given: Given) -> Outcome:
        if is_off(value) or value in off:
            return Outcome(Fate.NOT_NEEDED, note="off there, as here")
        return Outcome(Fate.NO_PLACE, note=why)

    return tuple(Key((name,), "", why, rule, Fate.NO_PLACE) for name in names.split())


def table(*rows: Key | Iterable[Key]) -> tuple[Key, ...]:
    """Rows and groups of rows as one table."""
    return tuple(key for row in rows for key in ((row,) if isinstance(row, Key) else row))


def _spellings(names: str) -> tuple[str, ...]:
    return tuple(names.split())


# Outcomes ----------------------------------------------------------------------------------------------------------


def taken(here: str, value: Value) -> Outcome:
    return Outcome(Fate.TAKEN, {here: value})


def becomes(settings: Mapping[str, Value], note: str) -> Outcome:
    return Outcome(Fate.TRANSLATED, settings, note)


def unneeded(note: str) -> Outcome:
    return Outcome(Fate.NOT_NEEDED, note=note)


def left(note: str) -> Outcome:
    return Outcome(Fate.NO_PLACE, note=note)


# Values ------------------------------------------------------------------------------------------------------------


def is_off(value: Value) -> bool:
    """Null, false, 0 and what is empty; also `no` and `off`, which are false by the rules of YAML 1.1."""
    return not value or str(value).lower() in ("false", "no", "off", "none", "null")


def is_on(value: Value) -> bool:
    return str(value).lower() in ("true", "yes", "on", "1")


def as_number(value: Value) -> float | None:
    """A finite number, or a text that is one."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_names(value: Value) -> list[str]:
    """A list of names, or the names of a text with commas."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    return [str(item).strip() for item in items]
