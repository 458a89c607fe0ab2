"""Conversations in which every text is a word that occurs nowhere else, of the same form as a row's.

The form of a conversation is its roles, the fields of its messages and of what kind they are.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qlora_hal.data.source.json_text import decoded_cell
from qlora_hal.data.template.chat_template import REASONING_FIELDS
from qlora_hal.data.template.message_fields import CALLS, CONTENT, REASONING, Message

Form = tuple[object, ...]
Tools = Sequence[object] | None

TOOLS, TOOL_DESCRIPTIONS, TOOL_PARAMETERS = "tools", "tool descriptions", "tool parameters"
PARAMETER_DESCRIPTIONS = "descriptions of tool parameters"
_TOOLS_TRIED = 2
"""Of more, no template writes two and not the rest."""

_ALIKE_ARGUMENTS_TRIED = 2
_FIRST_NUMBER = 7_310_000
_WORD = re.compile(r"qorvex(?:tool)?[0-9]+q|(?=(7[0-9]{6}))")
"""Any word or number of a trial; a number may stand within other digits."""


@dataclass(slots=True)
class Words:
    """Words that occur nowhere else, and what each stands for: (message, which of its fields), or what of a tool."""

    places: dict[str, tuple[int, str]] = field(default_factory=dict)
    of_tools: dict[str, str] = field(default_factory=dict)

    def new(self, message: int, what: str) -> str:
        word = f"qorvex{len(self.places)}q"
        self.places[word] = (message, what)
        return word

    def number(self, message: int, what: str) -> int:
        number = _FIRST_NUMBER + len(self.places)
        self.places[str(number)] = (message, what)
        return number

    @staticmethod
    def first_places(text: str) -> dict[str, int]:
        """Where in a text in small letters each word first stands. One search for all of them: a row may hold as many
        messages as values."""
        places: dict[str, int] = {}
        for found in _WORD.finditer(text):
            places.setdefault(found[0] or found[1], found.start())
        return places

    def of_tool(self, what: str) -> str:
        word = f"qorvextool{len(self.of_tools)}q"
        self.of_tools[word] = what
        return word


def conversation_of_words(
    messages: Sequence[Message], tools: Tools
) -> tuple[list[dict[str, object]], list[object] | None, Words]:
    """(messages, tools) of the form of those given, and the words in them."""
    words = Words()
    tried = [_message_of_words(message, number, words) for number, message in enumerate(messages)]
    offered = [_tool_of_words(tool, words) for tool in tools[:_TOOLS_TRIED]] if tools else None
    _name_calls_in_order(tried)
    return tried, offered, words


# the form -----------------------------------------------------------------------------------------------------------
def form_of(messages: Sequence[Message], tools: Tools) -> Form:
    """The form of a conversation, to know another of the same form by."""
    offered = tuple(isinstance(tool, Mapping) and "function" in tool for tool in (tools or ())[:_TOOLS_TRIED])
    return (offered, *[tuple((key, _kind(key, value)) for key, value in message.items()) for message in messages])


def _kind(name: str, value: object) -> object:
    if name == "role":
        return value
    if isinstance(value, str):
        return bool(value.strip())
    if name == CONTENT and isinstance(value, list | tuple):
        return tuple((bool(text_of_part(part).strip()), *_keys(part)) for part in value)
    if name == CALLS and isinstance(value, list | tuple):
        return tuple(_kind_of_call(call) for call in value)
    return type(value).__name__


def _kind_of_call(call: object) -> object:
    if not isinstance(call, Mapping):
        return type(call).__name__
    inner = call.get("function", call)
    arguments = inner.get("arguments") if isinstance(inner, Mapping) else None
    of_arguments = (type(arguments).__name__, _are_empty(arguments), _kinds_of_arguments(arguments))
    return (_keys(call), _keys(inner), of_arguments)


def _keys(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, Mapping) else ()


def _are_empty(arguments: object) -> bool:
    return arguments.strip() in ("", "{}", "null") if isinstance(arguments, str) else not arguments


def _kinds_of_arguments(arguments: object) -> tuple[str, ...]:
    """Of what kinds the values are, each kind as often as a trial has it."""
    held = arguments if isinstance(arguments, Mapping) else object_in(arguments) or {}
    kinds = Counter(_kind_of_value(value) for value in held.values())
    return tuple(kind for kind in sorted(kinds) for _ in range(min(kinds[kind], _ALIKE_ARGUMENTS_TRIED)))


def _kind_of_value(value: object) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    if isinstance(value, list | tuple | Mapping) and value:
        return "object" if isinstance(value, Mapping) else "list"
    return "other"


def object_in(arguments: object) -> dict[str, object] | None:
    """The object that arguments of a call hold as JSON text."""
    if not isinstance(arguments, str):
        return None
    try:
        found = decoded_cell(arguments)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def text_of_part(part: object) -> str:
    """The text of one part of a content."""
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else ""


# words in its place -------------------------------------------------------------------------------------------------
def _message_of_words(message: Message, number: int, words: Words) -> dict[str, object]:
    tried = _named(message)
    content = message.get(CONTENT)
    if isinstance(content, str):
        tried[CONTENT] = words.new(number, CONTENT) if content.strip() else content
    elif isinstance(content, list | tuple):
        tried[CONTENT] = [_part_of_words(part, number, words) for part in content]
    reasoned = [name for name in REASONING_FIELDS if isinstance(message.get(name), str)]
    if any(str(message[name]).strip() for name in reasoned):
        tried.update(dict.fromkeys(reasoned, words.new(number, REASONING)))
    calls = message.get(CALLS)
    if isinstance(calls, list | tuple):
        tried[CALLS] = [_call_of_words(call, number, words) for call in calls]
    return {**tried, "role": message["role"]}


def _named(fields: Message) -> dict[str, object]:
    """Fields with texts that name them; ids are given later."""
    kept = ("id", "type", "tool_call_id")
    return {
        name: f"field{name}q" if isinstance(held, str) and name not in kept else held for name, held in fields.items()
    }


def _part_of_words(part: object, number: int, words: Words) -> dict[str, object]:
    text = words.new(number, CONTENT) if text_of_part(part).strip() else ""
    return {**(_named(part) if isinstance(part, Mapping) else {}), "type": "text", "text": text}


def _call_of_words(call: object, number: int, words: Words) -> object:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(inner, Mapping):
        return call
    tried = {**_named(inner), "name": words.new(number, CALLS)}
    if "arguments" in inner:
        tried["arguments"] = _arguments_of_words(inner["arguments"], number, words)
    return {**_named(call), "function": tried} if "function" in call else tried


def _arguments_of_words(arguments: object, number: int, words: Words) -> object:
    if _are_empty(arguments) or not isinstance(arguments, str | Mapping):
        return arguments
    kinds = _kinds_of_arguments(arguments) or ("text",)
    tried = {words.new(number, CALLS): _value_of_words(kind, number, words) for kind in kinds}
    return tried if isinstance(arguments, Mapping) else json.dumps(tried)


def _value_of_words(kind: str, number: int, words: Words) -> object:
    if kind == "other":
        return True
    if kind == "number":
        return words.number(number, CALLS)
    word = words.new(number, CALLS)
    return {"text": word, "list": [word], "object": {"in": word}}[kind]


def _tool_of_words(tool: object, words: Words) -> object:
    described = {"type": "string", "description": words.of_tool(PARAMETER_DESCRIPTIONS)}
    properties = {words.of_tool(TOOL_PARAMETERS): described}
    schema = {
        "name": words.of_tool(TOOLS),
        "description": words.of_tool(TOOL_DESCRIPTIONS),
        "parameters": {"type": "object", "properties": properties},
    }
    return {"type": "function", "function": schema} if isinstance(tool, Mapping) and "function" in tool else schema


def _name_calls_in_order(messages: Sequence[dict[str, object]]) -> None:
    """Give calls ids of nine letters and digits, which some templates ask for, and each result the id of its call."""
    waiting: list[str] = []
    for number, message in enumerate(messages):
        calls = message.get(CALLS)
        for place, call in enumerate(calls if isinstance(calls, list) else ()):
            if isinstance(call, dict) and "id" in call:
                call["id"] = f"c{number % 10000:04d}{place % 10000:04d}"
                waiting.append(call["id"])
        if "tool_call_id" in message and waiting:
            message["tool_call_id"] = waiting.pop(0)
