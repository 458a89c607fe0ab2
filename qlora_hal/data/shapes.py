"""From a row to what is trained on: a conversation, or a text with a part that carries loss.

A shape is recognised by the keys of each row, never from the first row alone, so a file may mix shapes and the report
counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qlora_hal.data.reading import Row
from qlora_hal.data.row_files import type_name
from qlora_hal.errors import DataError

Shape = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]
Message = Mapping[str, object]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""The roles a message may have. Others are refused: a misspelt assistant would silently carry no loss."""
_ROLES = frozenset(ROLES)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of role and content (a text, or a list of its parts). Loss falls on assistant messages from
    `first_target` on, less those `untrained`.

    `plain` says that every message is exactly a role and a string and none is untrained, which is what renders fastest.
    """

    messages: Sequence[Message]
    first_target: int = 0
    tools: Sequence[object] | None = None
    plain: bool = True
    untrained: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Writing:
    """Text that is trained as it stands; loss falls on `target`, which follows `prompt`."""

    prompt: str
    target: str


Example = Conversation | Writing

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "function",
}


def shape_of(value: Mapping[str, object]) -> Shape | None:
    """The shape that a row's keys show, or None. Where keys of several shapes are present, the richer one counts."""
    if "messages" in value:
        return "messages"
    if "conversations" in value:
        turns = value["conversations"]
        first = turns[0] if isinstance(turns, list | tuple) and turns else None
        return "messages" if isinstance(first, Mapping) and "role" in first else "sharegpt"
    if "prompt" in value and "completion" in value:
        return "prompt_completion"
    if "instruction" in value and "output" in value:
        return "alpaca"
    return "text" if "text" in value else None


EVIDENCE: Mapping[Shape, str] = {
    "messages": "key messages, a list of role and content",
    "sharegpt": "key conversations, a list of from and value",
    "alpaca": "keys instruction and output",
    "prompt_completion": "keys prompt and completion",
    "text": "key text",
}
"""What a shape is recognised by, for the report and for messages."""


def example_of(row: Row, shape: Shape, input_heading: str = "") -> Example:
    """The row read as `shape`. Raises DataError (QH-D03 field, QH-D12 role), naming file, line and field.

    `input_heading` stands between an Alpaca row's instruction and its input.
    """
    assert isinstance(row.value, Mapping)
    if shape == "alpaca":
        return _alpaca(row, row.value, input_heading)
    return _READ_AS[shape](row, row.value)


def unrecognised(row: Row, value: Mapping[str, object]) -> DataError:
    """The error for a row whose keys show no shape (QH-D03)."""
    keys = ", ".join(sorted(map(str, value))) or "none"
    held = next((key for key, rows in value.items() if isinstance(rows, list) and rows and _has_shape(rows[0])), None)
    return DataError(
        "QH-D03",
        f"The row has the keys {keys}; one of these was expected: {'; '.join(EVIDENCE.values())}.",
        where=row.where,
        fix="Rename the columns, or set data.format if the row is meant as one of these shapes."
        if held is None
        else f"Put the list under {held} at the top level of the file: it holds the rows.",
    )


def _has_shape(row: object) -> bool:
    return isinstance(row, Mapping) and shape_of(row) is not None


def field_fault(row: Row, field: str, got: object, wanted: str) -> DataError:
    """The error for a field of the wrong kind (QH-D03)."""
    got_text = "nothing (the key is missing)" if got is _MISSING else type_name(got)
    return DataError(
        "QH-D03",
        f"The field {field} holds {got_text}; {wanted} was expected.",
        where=row.where,
        fix="Correct the row, or set data.on_bad_row to skip to count such rows and go on.",
        context={"field": field, "row": row.number},
    )


class _Missing:
    pass


_MISSING = _Missing()


def _string(row: Row, value: Mapping[str, object], field: str, *, may_be_absent: bool = False) -> str:
    found = value.get(field, _MISSING)
    if isinstance(found, str):
        return found
    if may_be_absent and (found is _MISSING or found is None):
        return ""
    raise field_fault(row, field, found, "a string")


def _messages(row: Row, value: Mapping[str, object]) -> Conversation:
    key = "conversations" if "conversations" in value and "messages" not in value else "messages"
    turns = value.get(key, _MISSING)
    conversation = _conversation(row, turns, key)
    tools = value.get("tools")
    if not tools:
        return conversation
    if not isinstance(tools, list | tuple):
        raise field_fault(row, "tools", tools, "a list")
    return replace(conversation, tools=tools, plain=False)


def _conversation(row: Row, turns: object, field: str) -> Conversation:
    if not isinstance(turns, list | tuple) or not turns:
        raise field_fault(row, field, turns, "a list of at least one message")
    plain = True
    messages: list[Message] = []
    untrained: set[int] = set()
    known = _ROLES
    for index, turn in enumerate(turns):
        if type(turn) is dict and len(turn) == 2 and type(turn.get("content")) is str:
            role = turn.get("role")
            if type(role) is str and role in known:
                messages.append(turn)
                continue
        message = _message(row, turn, f"{field}[{index}]")
        if _taken_weight(row, message, f"{field}[{index}]") == 0:
            untrained.add(index)
        plain = plain and message.keys() == {"role", "content"} and isinstance(message["content"], str)
        messages.append(message)
    return Conversation(messages, plain=plain and not untrained, untrained=frozenset(untrained))


def _taken_weight(row: Row, message: dict[str, object], field: str) -> int:
    """The `weight` of an assistant turn as OpenAI has it, 0 for no loss, taken out of the message; 1 where none is set.

    Other roles carry no loss, so their 0 goes too; their 1 stays, as a field that nothing uses.
    """
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise field_fault(row, f"{field}.weight", weight, "0 or 1")
    if message["role"] == "assistant" or weight == 0:
        message.pop("weight", None)
    return int(weight == 1)


def _message(row: Row, turn: object, field: str) -> dict[str, object]:
    """One message that is not simply a role and a string: parts of text as such, empty fields left out."""
    if not isinstance(turn, Mapping):
        raise field_fault(row, field, turn, "an object with role and content")
    role = turn.get("role", _MISSING)
    if not isinstance(role, str):
        raise field_fault(row, f"{field}.role", role, "a string")
    if role not in ROLES:
        raise DataError(
            "QH-D12",
            f"The role {role!r} of {field} is unknown; one of {', '.join(ROLES)} was expected.",
            where=row.where,
            fix="Correct the role, or name the shape in data.format.",
            context={"row": row.number},
        )
    message = {str(key): kept for key, kept in turn.items() if kept is not None}
    content = message.get("content", _MISSING)
    if isinstance(content, list | tuple):
        message["content"] = _text_parts(row, content, f"{field}.content")
    elif not isinstance(content, str) and not (content is _MISSING and "tool_calls" in message):
        raise field_fault(row, f"{field}.content", turn.get("content", _MISSING), "a string")
    return message


def _text_parts(row: Row, parts: Sequence[object], field: str) -> list[Message]:
    found: list[Message] = []
    for index, part in enumerate(parts):
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise field_fault(row, f"{field}[{index}]", part, "a part of type text")
        found.append({"type": "text", "text": text})
    return found


def _sharegpt(row: Row, value: Mapping[str, object]) -> Conversation:
    turns = value.get("conversations", _MISSING)
    if not isinstance(turns, list | tuple) or not turns:
        raise field_fault(row, "conversations", turns, "a list of at least one message")
    messages: list[Message] = []
    plain, untrained = True, set[int]()
    system = value.get("system")
    if isinstance(system, str) and system:
        messages.append({"role": "system", "content": system})
    for index, turn in enumerate(turns):
        field = f"conversations[{index}]"
        if not isinstance(turn, Mapping):
            raise field_fault(row, field, turn, "an object with from and value")
        speaker = turn.get("from", _MISSING)
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise field_fault(row, f"{field}.from", speaker, f"one of {', '.join(_SHAREGPT_ROLES)}")
        content = turn.get("value", _MISSING)
        if not isinstance(content, str):
            raise field_fault(row, f"{field}.value", content, "a string")
        rest = {str(key): kept for key, kept in turn.items() if kept is not None and key not in ("from", "value")}
        message = {**rest, "role": role, "content": content}
        if _taken_weight(row, message, field) == 0:
            untrained.add(len(messages))
        plain = plain and len(message) == 2
        messages.append(message)
    return Conversation(messages, plain=plain and not untrained, untrained=frozenset(untrained))


def _alpaca(row: Row, value: Mapping[str, object], input_heading: str) -> Conversation:
    instruction, output = _string(row, value, "instruction"), _string(row, value, "output")
    extra = _string(row, value, "input", may_be_absent=True)
    question = f"{instruction}\n\n{input_heading}{extra}" if extra.strip() else instruction
    messages: list[Message] = []
    if system := _string(row, value, "system", may_be_absent=True):
        messages.append({"role": "system", "content": system})
    return Conversation(
        [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": output}],
        first_target=len(messages),
    )


def _prompt_completion(row: Row, value: Mapping[str, object]) -> Example:
    prompt, completion = value.get("prompt", _MISSING), value.get("completion", _MISSING)
    if isinstance(prompt, str) and isinstance(completion, str):
        return Writing(prompt, completion)
    if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
        before, after = _conversation(row, prompt, "prompt"), _conversation(row, completion, "completion")
        together = [*before.messages, *after.messages]
        first = len(before.messages)
        untrained = frozenset(first + number for number in after.untrained)
        return Conversation(together, first, plain=before.plain and after.plain, untrained=untrained)
    if isinstance(prompt, str):
        raise field_fault(row, "completion", completion, "a string, as prompt is")
    if isinstance(prompt, list | tuple):
        raise field_fault(row, "completion", completion, "a list of messages, as prompt is")
    raise field_fault(row, "prompt", prompt, "a string or a list of messages")


def _text(row: Row, value: Mapping[str, object]) -> Writing:
    return Writing("", _string(row, value, "text"))


_READ_AS: Mapping[Shape, Callable[[Row, Mapping[str, object]], Example]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "text": _text,
}
