"""What to say to who types a name that is no setting: the setting that was meant, or a word on the tool that has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from qlora_hal.config.fields import known_by_name, setting_by_letters
from qlora_hal.config.habits import remark
from qlora_hal.config.other_tools.catalogue import TOOLS
from qlora_hal.config.other_tools.tables import Fate, Key, Tool

_CALLS = frozenset({"LoraConfig", "BitsAndBytesConfig", "from_pretrained", "get_peft_model"})
"""Calls of scripts whose arguments people also write as settings. Those of others, as `load_dataset.name`, are words
that mean too much."""


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
    if "." in name and (whole := _known().get(name)):
        return _foreign(*whole)
    if words := remark(name):
        return Hint(said=words, to_do=words)
    if known := known_by_name(name):
        return Hint(known)
    if foreign := _known().get(name.rpartition(".")[2]):
        return _foreign(*foreign)
    return Hint(setting_by_letters(name) or "")


def _foreign(tool: Tool, key: Key) -> Hint:
    there, name = key.there.rstrip("."), key.names[0]
    if key.here and key.fate is not Fate.NO_PLACE:
        return Hint(key.here, f"{name} of {tool.title}{f' ({there})' if there else ''} is {key.here} here")
    judged = "is not needed here" if key.fate is Fate.NOT_NEEDED else "has no place here"
    return Hint(said=f"{name} of {tool.title} {judged}: {there}", to_do="leave it out")


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
