"""What to say to who types a key of another tool where a setting of this project is expected."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from qlora_hal.config.other_tools.catalogue import TOOLS
from qlora_hal.config.other_tools.tables import Fate, Key, Tool


def foreign_key_hint(key: str) -> str | None:
    """A clause on a key of another tool: which setting it is here, or why there is none; None for an unknown key.

    Dashes and a group before the last dot do not matter: `--training.micro-batch-size` is `micro_batch_size`.
    """
    name = key.lstrip("-").replace("-", "_")
    known = _known()
    tool_and_key = known.get(name) or known.get(name.rpartition(".")[2])
    return None if tool_and_key is None else _clause(*tool_and_key)


def _clause(tool: Tool, key: Key) -> str:
    there = key.there.rstrip(".")
    if key.fate is Fate.NO_PLACE or not key.here:
        return f"{tool.title} has {key.names[0]}, which has no place here: {there}"
    meaning = f" ({there})" if there else ""
    return f"{key.names[0]} of {tool.title}{meaning} is {key.here} here"


@cache
def _known() -> Mapping[str, tuple[Tool, Key]]:
    found: dict[str, tuple[Tool, Key]] = {}
    for tool in TOOLS:
        for name, key in tool.by_name().items():
            found.setdefault(name, (tool, key))
    return found
