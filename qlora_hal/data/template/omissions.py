"""What a conversation holds and its rendered text does not: told, and never trained around.

A template may leave out messages, parts of them, reasoning, calls, tools. Whether it writes such a thing at all is
known from a trial of the conversation's form (trial.py); whether a content stands whole in the text is looked up in
each row, white space aside, for templates move and strip it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qlora_hal.data.template.chat_template import REASONING_FIELDS
from qlora_hal.data.template.message_fields import CALLS, CONTENT, REASONING, name_of, other_fields
from qlora_hal.data.template.trial_words import (
    PARAMETER_DESCRIPTIONS,
    TOOL_DESCRIPTIONS,
    TOOL_PARAMETERS,
    TOOLS,
    text_of_part,
)

if TYPE_CHECKING:
    from qlora_hal.data.template.chat_template import ChatTemplate
    from qlora_hal.data.template.message_fields import Message
    from qlora_hal.data.template.trial import Trial
    from qlora_hal.data.template.turn_marks import Rendering

_TAG, _WORD = re.compile(r"<[^<>]*>|\[[^\[\]]*\]"), re.compile(r"\w+")
_BEGINNING = 8
"""Characters: scripts without spaces have no words to go by."""


@dataclass(frozen=True, slots=True)
class Omissions:
    """Numbers of messages whose content is missing, or a part of it; of those that lack reasoning or calls. `tools` is
    what is missing of the tools; `fields` are other fields that change nothing. `lost` are assistant turns that would
    be trained without what they say."""

    messages: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()
    reasoning: tuple[int, ...] = ()
    calls: tuple[int, ...] = ()
    tools: frozenset[str] = frozenset()
    fields: frozenset[str] = frozenset()
    lost: frozenset[int] = frozenset()


def omissions_of(
    messages: Sequence[Message],
    tools: Sequence[object] | None,
    rendering: Rendering,
    trial: Trial | None,
    template: ChatTemplate,
) -> Omissions:
    """What of these messages and tools the text does not hold."""
    search = _Search(rendering)
    missing: dict[str, list[int]] = {CONTENT: [], "part": [], REASONING: [], CALLS: []}
    lost: set[int] = set()
    for number, message in enumerate(messages):
        says = {what: _said(message, what) for what in (CONTENT, REASONING, CALLS)}
        held = {what: _held(what, text, number, trial, search) for what, text in says.items() if text.strip()}
        for what, share in held.items():
            if share < 1:
                missing["part" if what == CONTENT and any(held.values()) else what].append(number)
        if message["role"] == "assistant" and held and (held.get(CALLS, 1) < 1 or not any(held.values())):
            lost.add(number)
    return Omissions(
        tuple(missing[CONTENT]),
        tuple(missing["part"]),
        tuple(missing[REASONING]),
        tuple(missing[CALLS]),
        _missing_of_tools(tools, messages, rendering, trial, template),
        trial.fields if trial is not None else _fields_not_mentioned(messages, template),
        frozenset(lost),
    )


def _said(message: Message, what: str) -> str:
    """What a message says in one of its fields, as text."""
    if what == REASONING:
        given = [text for name in REASONING_FIELDS if isinstance(text := message.get(name), str)]
        return next(filter(str.strip, given), "")
    value = message.get(what)
    if what == CALLS:
        return "\n".join(_name_of(call) for call in value) if isinstance(value, list | tuple) else ""
    return "\n".join(map(text_of_part, value if isinstance(value, list | tuple) else [value]))


def _name_of(call: object) -> str:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    return str(inner.get("name", "")) if isinstance(inner, Mapping) else ""


def _held(what: str, text: str, number: int, trial: Trial | None, search: _Search) -> float:
    """0 where nothing of it stands in the text, 1 for the whole, between for a part."""
    is_unwritten = trial is not None and (number, what) in trial.unwritten
    if what == CALLS:
        names_held = trial is not None or all(search.is_whole(name, number) for name in text.split("\n"))
        return float(names_held and not is_unwritten)
    if search.is_whole(text, number):
        return 1
    if is_unwritten:
        return 0
    return 1 if search.is_whole(text) else 0.5 if search.holds_part(text, number) else 0


class _Search:
    """Looks texts up in a rendering: in what was written for their message, or anywhere."""

    def __init__(self, rendering: Rendering) -> None:
        self._rendering = rendering
        self._whole: str | None = None

    def is_whole(self, text: str, number: int | None = None) -> bool:
        """Whether the text stands there, as it is or inside JSON; anywhere, if no message is named."""
        places = self._places(number)
        forms = (json.dumps(text, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True))
        return _is_in(places, text) or any(_is_in(places, form) for form in forms)

    def holds_part(self, text: str, number: int) -> bool:
        """Whether some word of the text stands there, tags aside, or its first characters."""
        spans = self._rendering.turns.get(number) or [(0, len(self._rendering.text))]
        written = {word for start, stop in spans for word in _words_of(self._rendering.text[start:stop])}
        beginning = squeezed(_TAG.sub("", text))[:_BEGINNING]
        return any(word in written for word in _words_of(text)) or any(
            beginning in place for place in self._places(number) or self._places(None) if beginning
        )

    def _places(self, number: int | None) -> list[str]:
        if number is not None:
            return [squeezed(self._rendering.text[start:stop]) for start, stop in self._rendering.turns.get(number, ())]
        if self._whole is None:
            self._whole = squeezed(self._rendering.text)
        return [self._whole]


def _words_of(text: str) -> list[str]:
    return _WORD.findall(_TAG.sub(" ", text).lower())


def _is_in(places: Sequence[str], text: str) -> bool:
    form = squeezed(text)
    return any(form in place for place in places)


def squeezed(text: str) -> str:
    """The text without white space and case."""
    return "".join(text.split()).lower()


def _missing_of_tools(
    tools: Sequence[object] | None,
    messages: Sequence[Message],
    rendering: Rendering,
    trial: Trial | None,
    template: ChatTemplate,
) -> frozenset[str]:
    if not tools:
        return frozenset()
    if not all(_name_of(tool) in rendering.text for tool in tools):
        return frozenset({TOOLS})
    if trial is None:
        return frozenset({TOOLS} if template.render(messages) == rendering.text else ())
    return trial.of_tools & {TOOLS, *(what for tool in tools for what in _told_of(tool))}


def _told_of(tool: object) -> Iterator[str]:
    """What a tool has beside its name."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if isinstance(inner, Mapping):
        parameters = inner.get("parameters")
        if inner.get("description"):
            yield TOOL_DESCRIPTIONS
        if isinstance(parameters, Mapping) and parameters.get("properties"):
            yield TOOL_PARAMETERS
            properties = parameters["properties"]
            described = properties.values() if isinstance(properties, Mapping) else ()
            if any(isinstance(one, Mapping) and one.get("description") for one in described):
                yield PARAMETER_DESCRIPTIONS


def _fields_not_mentioned(messages: Sequence[Message], template: ChatTemplate) -> frozenset[str]:
    fields = {path for message in messages for path in other_fields(message)}
    return frozenset(name_of(path) for path in fields if not template.mentions(path[-1]))


@dataclass(slots=True)
class OmissionCounts:
    """Omissions of all rows: messages by role, and rows by what is missing."""

    messages: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    lost_turns: int = 0

    def add(self, omissions: Omissions, messages: Sequence[Message], lost_turns: int) -> None:
        self.lost_turns += lost_turns
        self.messages.update(str(messages[number]["role"]) for number in omissions.messages)
        self.parts.update(str(messages[number]["role"]) for number in omissions.parts)
        found = {REASONING: omissions.reasoning, CALLS: omissions.calls}
        self.rows.update(what for what, missing in found.items() if missing)
        self.rows.update(omissions.fields | omissions.tools)

    def lines(self) -> list[str]:
        """The omissions as the report tells them."""
        lines = []
        if total := self.messages.total():
            subject = f"{total} messages are" if total > 1 else "1 message is"
            lines.append(f"{subject} not written by the template: {_listed(self.messages)}")
        if total := self.parts.total():
            subject = f"parts of {total} message{'s' if total > 1 else ''} are"
            lines.append(f"{subject} not written by the template: {_listed(self.parts)}")
        lines += [f"{what}: not written by the template ({count} rows)" for what, count in sorted(self.rows.items())]
        if self.lost_turns:
            lines.append(
                "assistant turns that carry no loss, because the template omits what they say or call: "
                f"{self.lost_turns}"
            )
        return lines


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{role} {count}" for role, count in counts.most_common())
