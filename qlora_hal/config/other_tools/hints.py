"""What to say to who types a name that is no setting: the setting that was meant, or a word on the tool that has it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from qlora_hal.config.fields import known_by_name, setting_by_letters, settings
from qlora_hal.config.habits import remark
from qlora_hal.config.other_tools.catalogue import TOOLS
from qlora_hal.config.other_tools.tables import Fate, Key, Tool

_CALLS = frozenset({"LoraConfig", "BitsAndBytesConfig", "from_pretrained", "get_peft_model"})
"""Calls of scripts whose arguments people also write as settings. Those of others, as `load_dataset.name`, are words
that mean too much."""


_FEWEST_MARKS = 2
_DOTTED = re.compile(r"\b\w+\.\w+\b")


@dataclass(frozen=True, slots=True)
class Hint:
    """`meant` is the setting, by its dotted path, or empty; `said` a clause in the place of a mere "did you mean", or
    empty; `to_do` what to do about it, where `said` does not name a setting."""

    meant: str = ""
    said: str = ""
    to_do: str = ""

    def __bool__(self) -> bool:
        return bool(self.meant or self.said)


def hint_for(name: str) -> Hint:
    """The hint for a name, dotted or not, in dashes or underscores; an empty one for a name that nothing is known of.

    A name that some tool has comes before one that is spelled alike: `train_on_eos` is not `data.train_on`.
    """
    name = name.lstrip("-").replace("-", "_")
    if group := _groups().get(name):
        return Hint(said=group, to_do="write those settings")
    if "." in name and (whole := _known().get(name)):
        return _foreign(name, *whole)
    if words := remark(name):
        return Hint(said=words, to_do=words)
    if known := known_by_name(name):
        return Hint(known)
    last = name.rpartition(".")[2]
    if foreign := _known().get(last):
        return _foreign(last, *foreign)
    return Hint(setting_by_letters(name) or "")


def tool_of(values: Mapping[str, object]) -> Tool | None:
    """The tool whose configuration this is, told by at least two keys that no other tool has; None for one of ours."""
    within = {f"{group}.{key}" for group, below in values.items() if isinstance(below, Mapping) for key in below}
    marks = {tool.name: len(tool.marks & (values.keys() | within) - settings().keys()) for tool in TOOLS}
    most = max(TOOLS, key=lambda tool: marks[tool.name])
    return most if marks[most.name] >= _FEWEST_MARKS else None


def _foreign(name: str, tool: Tool, key: Key) -> Hint:
    if key.here and key.fate is not Fate.NO_PLACE:
        return Hint(key.here, f"{_is_here(f'{name} of {tool.title}', key)} here")
    judged = "is not needed here" if key.fate is Fate.NOT_NEEDED else "has no place here"
    instead = next((word for word in _DOTTED.findall(key.there) if word in settings()), None)
    to_do = f"use --{instead}, or leave it out" if instead else "leave it out"
    return Hint(said=f"{name} of {tool.title} {judged}: {key.there.rstrip('.')}", to_do=to_do)


def _is_here(name: str, key: Key) -> str:
    """What a key is called here, with what its value means there: it may be counted otherwise."""
    there = key.there.rstrip(".")
    return f"{name}{f' ({there})' if there else ''} is {key.here}"


@cache
def _groups() -> Mapping[str, str]:
    """Group of settings of a tool -> what its settings are here."""
    return {group: f"of {tool.title}, {_listed(tool, group)} here" for tool in TOOLS for group in sorted(tool.groups)}


def _listed(tool: Tool, group: str) -> str:
    inside = [(name.partition(".")[2], key) for name, key in tool.by_name().items() if name.startswith(f"{group}.")]
    return ", ".join(_is_here(name, key) for name, key in inside if key.here)


@cache
def _known() -> Mapping[str, tuple[Tool, Key]]:
    found: dict[str, tuple[Tool, Key]] = {}
    for tool in TOOLS:
        for name, key in tool.by_name().items():
            found.setdefault(name, (tool, key))
    for name, row in list(found.items()):
        call, dot, argument = name.partition(".")
        if dot and call in _CALLS:
            found.setdefault(argument, row)
    return found
