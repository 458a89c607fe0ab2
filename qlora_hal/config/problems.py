"""Wrong settings as one error that lists every one of them: where it stands, what came, what was expected."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from qlora_hal.config.fields import Setting, settings
from qlora_hal.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import ValidationError

_VALUE_WIDTH = 60
_KEY_WIDTH = 100
_MOST_TOLD = 50
"""Wrong settings that an error lists; the others are counted."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One wrong setting. `expected` is a clause; `hint` a question such as `did you mean lora.r?`."""

    key: str
    origin: str
    received: object
    expected: str
    hint: str = ""

    def sentence(self) -> str:
        named = "" if self.received is _NOT_SHOWN else f"{self._short_key} = {shorten(self.received)}: "
        return f"{named}{self.expected}{'; ' + self.hint if self.hint else ''}"

    @property
    def _short_key(self) -> str:
        return self.key if len(self.key) <= _KEY_WIDTH else self.key[: _KEY_WIDTH - 3] + "..."

    def as_json(self) -> dict[str, object]:
        received = "" if self.received is _NOT_SHOWN else shorten(self.received)
        return {
            "setting": self._short_key,
            "origin": self.origin,
            "received": received,
            "expected": self.expected,
            "hint": self.hint,
        }


_NOT_SHOWN = object()
_OTHER_CHOICES = {
    "int4": "4bit", "q4": "4bit", "4": "4bit", "8": "8bit", "bf16": "bfloat16", "fp16": "float16", "half": "float16",
    "fp32": "float32", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_32bit": "paged_adamw", "cosine_with_restarts": "cosine",
    "jsonl": "auto", "chatml": "messages", "openai": "messages", "chat": "messages",
    "input_output": "prompt_completion", "completion": "prompt_completion", "instruction": "alpaca",
}  # fmt: skip
"""Choices of neighboring tools, and the nearest one here."""


def shorten(value: object) -> str:
    """The value as typed, cut to one line."""
    if isinstance(value, str):
        text = f'"{value[: 4 * _VALUE_WIDTH]}"'
    else:
        text = str(value).lower() if isinstance(value, bool) else _BOUNDED.repr(value)
    text = " ".join(text.split())
    return text if len(text) <= _VALUE_WIDTH else text[: _VALUE_WIDTH - 3] + "..."


class _BoundedRepr(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write numbers of more than 4300 digits.
        if value.bit_length() > 256:
            return f"a whole number of about {int(value.bit_length() * math.log10(2)) + 1} digits"
        return repr(value)


_BOUNDED = _BoundedRepr()
_BOUNDED.maxstring = _BOUNDED.maxother = 2 * _VALUE_WIDTH


def config_error(problems: Sequence[Problem], way_on: str = "") -> ConfigError:
    """All problems as one QH-U01. `way_on` is what to do, where that is not to correct each."""
    which = "it" if len(problems) == 1 else "them"
    fix = way_on or f"Correct {which}; qlora-hal init writes every setting with its meaning."
    context: dict[str, object] = {"problems": [problem.as_json() for problem in problems[:_MOST_TOLD]]}
    if len(problems) == 1:
        only = problems[0]
        message = only.sentence() if only.hint.endswith(("?", ".")) else f"{only.sentence()}."
        return ConfigError("QH-U01", message, where=only.origin, fix=fix, context=context)
    told = [f"    {p.origin}  {p.sentence()}" for p in problems[:_MOST_TOLD]]
    more = [f"    and {len(problems) - _MOST_TOLD} more"] if len(problems) > _MOST_TOLD else []
    lines = [f"{len(problems)} settings are wrong.", *told, *more]
    return ConfigError("QH-U01", "\n".join(lines), fix=fix, context=context)


def problems_of_validation(error: ValidationError, origins: Mapping[str, str]) -> list[Problem]:
    """pydantic's findings in our words, one for each setting."""
    found: dict[str, Problem] = {}
    for item in error.errors(include_url=False):
        path = _setting_path(item["loc"])
        if path is None:
            text = str(item["msg"]).removeprefix("Value error, ")
            named = [name for name in re.findall(r"[a-z_]+\.[a-z_0-9]+", text) if name in settings()]
            origin = next((origins[name] for name in named if name in origins), "")
            found.setdefault(text, Problem(named[0] if named else "settings", origin, _NOT_SHOWN, text))
            continue
        expected = f"{_expected(settings()[path], str(item['type']), str(item['msg']))}"
        hint = _near_choice(settings()[path], item["input"])
        within = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"])[1:]
        place = within if settings()[path].kind == "groups" else path
        if place != path:
            expected = _expected_within(settings()[path], str(item["type"]), str(item["msg"]))
        found.setdefault(place, Problem(place, origins.get(path, "default"), item["input"], expected, hint))
    return list(found.values())


def _setting_path(location: Iterable[object]) -> str | None:
    """The longest dotted prefix of pydantic's location that is a setting."""
    path, longest = "", None
    for part in location:
        path = f"{path}.{part}".lstrip(".")
        if path in settings():
            longest = path
    return longest


def _near_choice(setting: Setting, value: object) -> str:
    word = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    if setting.optional and isinstance(word, str) and word.lower() in ("none", "null"):
        return "null leaves it unset"
    if not isinstance(word, str) or not setting.choices:
        return ""
    if word.lower() in ("none", "no", "off", "null") and setting.kind == "list":
        return "leave it out for none"
    close = get_close_matches(_OTHER_CHOICES.get(word.lower(), word.lower()), setting.choices, n=1)
    meant = f"[{close[0]}]" if close and setting.kind == "list" and isinstance(value, str) else "".join(close)
    return f"did you mean {meant}?" if meant else ""


def _expected_within(setting: Setting, kind: str, message: str) -> str:
    """What is expected of an entry of a list of mappings, or of one of its values."""
    if kind == "model_type":
        return f"{setting.expected.replace('a list of mappings', 'a mapping')} is expected"
    told = message.removeprefix("Value error, ")
    return told[:1].lower() + told[1:]


def _expected(setting: Setting, kind: str, message: str) -> str:
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind == "finite_number":
        return f"{setting.expected} is expected, and it must be finite"
    if setting.kind == "text" and kind == "string_type":
        return "a string is expected; put it in quotes"
    return f"{setting.expected} is expected"
