"""The fields of messages that not every template reads: those beside content, reasoning and calls, at any depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from qlora_hal.data.template.chat_template import REASONING_FIELDS

Message = Mapping[str, object]
Path = tuple[str, ...]
"""Names from the message inwards; what lies in a list is reached by the name of the list."""

CONTENT, REASONING, CALLS = "content", "reasoning", "tool_calls"
_OF_MESSAGE = frozenset({"role", CONTENT, CALLS, *REASONING_FIELDS})
_OF_PART = frozenset({"type", "text"})
_OF_CALL = frozenset({"id", "type", "function", "name", "arguments"})


def other_fields(message: Message) -> set[Path]:
    """The fields of a message beside those that every conversation has."""
    fields: set[Path] = {(name,) for name in message.keys() - _OF_MESSAGE}
    for part in _objects_in(message.get(CONTENT)):
        fields |= {(CONTENT, name) for name in part.keys() - _OF_PART}
    for call in _objects_in(message.get(CALLS)):
        fields |= {(CALLS, name) for name in call.keys() - _OF_CALL}
        for function in _objects_in([call.get("function")]):
            fields |= {(CALLS, "function", name) for name in function.keys() - _OF_CALL}
    return fields


def names_of_other_fields(messages: Sequence[Message], without: Sequence[Message] = ()) -> frozenset[str]:
    """How a report names the other fields of messages, less those that `without` has as well."""
    found, known = ({path for one in held for path in other_fields(one)} for held in (messages, without))
    return frozenset(map(name_of, found - known))


def name_of(path: Path) -> str:
    return ".".join(path)


def without_field(message: Message, path: Path) -> Message:
    """A message without the field of this path."""
    name, *inner = path
    if inner and name in message:
        return {**message, name: _without(message[name], tuple(inner))}
    return {other: held for other, held in message.items() if other != name}


def _without(value: object, path: Path) -> object:
    if isinstance(value, list | tuple):
        return [_without(one, path) for one in value]
    return without_field(value, path) if isinstance(value, Mapping) else value


def _objects_in(value: object) -> Iterator[Message]:
    for one in value if isinstance(value, list | tuple) else ():
        if isinstance(one, Mapping):
            yield one
