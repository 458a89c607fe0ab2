"""From a list of turns to the messages of a conversation, in any spelling that the field uses.

A turn is read by its own keys (`role` and `content`, or `from` and `value`), so a list may mix them. What says whether
a turn is trained is taken out of the message and honoured; what cannot be honoured is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_hal.data.source.json_text import decoded_cell
from qlora_hal.data.source.row_errors import MISSING, field_fault, shown, value_fault
from qlora_hal.data.source.row_values import refuse_other_values
from qlora_hal.data.template.chat_template import REASONING_FIELDS
from qlora_hal.data.tokens.objectives import PICTURES, TRAINED_IF, UNCLEAR, UNTRAINED_IF, refuse_compared_turn
from qlora_hal.errors import DataError

if TYPE_CHECKING:
    from qlora_hal.data.source.rows import Row

Message = Mapping[str, object]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""The roles a message may have. Others are refused: a misspelt assistant would silently carry no loss."""

_CALL = "function_call"

SPEAKERS: Mapping[str, str] = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("observation", "tool_response", "function_response"), "tool"),
    **dict.fromkeys((_CALL, "tool_call"), _CALL),
}
"""Words for who speaks, and the role that each means; `function_call` is an assistant turn whose content is a call."""

_KNOWN = frozenset(ROLES)
_SPELLED = ("role", "from", "content", "value")
_TEXT_PARTS = frozenset({None, "text", "input_text", "output_text"})


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of role and content (text, or a list of text parts). Loss falls on assistant messages from
    `first_target` on, less those `untrained`, which the row marked by the fields named in `flags`.

    `plain` says that every message is exactly a role and a string and none is untrained, which is what renders fastest.
    """

    messages: Sequence[Message]
    first_target: int = 0
    tools: Sequence[object] | None = None
    plain: bool = True
    untrained: frozenset[int] = frozenset()
    flags: frozenset[str] = frozenset()

    def after(self, earlier: Sequence[Message], *, first_target: int) -> Conversation:
        """The conversation with more messages in front, which leave the marks of its own where they are."""
        return replace(
            self,
            messages=[*earlier, *self.messages],
            first_target=first_target,
            untrained=frozenset(number + len(earlier) for number in self.untrained),
        )


def conversation_of(row: Row, turns: object, field: str) -> Conversation:
    """The turns under `field`. Raises DataError (QH-D03 field, QH-D12 role)."""
    if type(turns) is not list or not turns:
        turns = _listed(row, turns, field)
    plain = True
    messages: list[Message] = []
    untrained: set[int] = set()
    flags: set[str] = set()
    known = _KNOWN
    for index, turn in enumerate(turns):
        if type(turn) is dict and len(turn) == 2 and type(turn.get("content")) is str:
            role = turn.get("role")
            if type(role) is str and role in known:
                messages.append(turn)
                continue
        message = _message(row, turn, f"{field}[{index}]")
        if unset := _taken_flags(row, message, f"{field}[{index}]"):
            untrained.add(index)
            flags |= unset
        plain = plain and len(message) == 2 and type(message.get("content")) is str
        messages.append(message)
    return Conversation(messages, plain=plain and not untrained, untrained=frozenset(untrained), flags=frozenset(flags))


def _listed(row: Row, turns: object, field: str) -> Sequence[object]:
    """A list of turns: as it is, from its JSON text, or from the columns that Arrow makes of a list of structs."""
    if isinstance(turns, str):
        turns = from_json_text(row, turns, field, "a list of messages")
    if isinstance(turns, Mapping):
        columns = {key: held for key, held in turns.items() if held is not None}
        lengths = {len(held) if isinstance(held, list | tuple) else -1 for held in columns.values()}
        if len(lengths) == 1 and min(lengths) > 0:
            turns = [dict(zip(columns, held, strict=True)) for held in zip(*columns.values(), strict=True)]
    if not isinstance(turns, list | tuple) or not turns:
        raise field_fault(row, field, turns, "a list of at least one message")
    return turns


def from_json_text(row: Row, text: str, field: str, wanted: str) -> object:
    """What a field holds as JSON text, as CSV and Arrow must: a table has no cells for lists of any form."""
    try:
        return decoded_cell(text)
    except (ValueError, RecursionError) as error:
        fix = "Write the value with json.dumps." if text.lstrip()[:2] in ("[{", "{'", "['") else "Correct the row."
        raise value_fault(row, field, text, f"{wanted}, or its JSON text,", fix) from error


def _message(row: Row, turn: object, field: str) -> dict[str, object]:
    """One message that is not simply a role and a string; its role is translated, fields without a value left out."""
    if not isinstance(turn, Mapping):
        raise field_fault(row, field, turn, "an object with role and content")
    refuse_compared_turn(row, turn, field)
    by_from = "from" in turn or ("role" not in turn and ("value" in turn or field.startswith("conversations")))
    role = _role(row, turn, field, "from" if by_from else "role")
    name = "value" if turn.get("content") is None and "value" in turn else "content"
    if name == "content" and turn.get("value") not in (None, turn.get("content")):
        raise value_fault(row, f"{field}.value", turn["value"], "what content holds, or nothing,")
    refuse_other_values(row, turn, field)
    rest = {key: kept for key, kept in turn.items() if kept is not None and key not in _SPELLED}
    _refuse_unclear_reasoning(row, rest, field)
    content = turn.get(name, MISSING)
    if role == _CALL:
        calls = _calls(row, content, f"{field}.{name}")
        return {**rest, "role": "assistant", "content": "", "tool_calls": calls}
    message: dict[str, object] = _in_order(turn, {"role": role, "content": content}, rest)
    _translate_calls(row, message, field)
    if isinstance(content, list | tuple):
        message["content"] = _parts(row, content, f"{field}.{name}", role)
    elif not isinstance(content, str):
        if (content is not MISSING and content is not None) or not message.get("tool_calls"):
            raise field_fault(row, f"{field}.{'value' if by_from else 'content'}", content, "a string")
        del message["content"]
    return message


def _in_order(turn: Message, spelled: Message, rest: Message) -> dict[str, object]:
    """The fields of a message in the order in which its turn has them: some templates write a message as it is."""
    today = {"from": "role", "value": "content"}
    names = dict.fromkeys(today.get(key, key) for key in turn)
    return {name: fields[name] for name in [*names, *spelled] for fields in (spelled, rest) if name in fields}


def _refuse_unclear_reasoning(row: Row, fields: Message, field: str) -> None:
    """Raise DataError (QH-D03) for reasoning that is no text, or not one text under all its names."""
    given = {name: fields[name] for name in REASONING_FIELDS if name in fields}
    for name, reasoning in given.items():
        if not isinstance(reasoning, str):
            raise field_fault(row, f"{field}.{name}", reasoning, "a string")
    first, *others = [name for name, reasoning in given.items() if str(reasoning).strip()] or [""]
    for name in others:
        if given[name] != given[first]:
            raise value_fault(row, f"{field}.{name}", given[name], f"what {first} holds, or nothing,")


def _role(row: Row, turn: Message, field: str, name: str) -> str:
    other = "role" if name == "from" else "from"
    found = [_role_of(row, turn[key], f"{field}.{key}", key) for key in (name, other) if turn.get(key) is not None]
    if not found:
        raise field_fault(row, f"{field}.{name}", turn.get(name, MISSING), "a string")
    if len(set(found)) > 1:
        raise value_fault(row, f"{field}.{other}", turn[other], f"the speaker of {field}.{name} ({found[0]})")
    return found[0]


def _role_of(row: Row, word: object, field: str, name: str) -> str:
    if not isinstance(word, str):
        raise field_fault(row, field, word, "a string")
    role = SPEAKERS.get(word)
    if role is not None:
        return role
    if name == "from":
        raise value_fault(row, field, word, f"one of {', '.join(SPEAKERS)}")
    raise DataError(
        "QH-D12",
        f"The role {shown(word)} of {field.removesuffix('.role')} is unknown; "
        f"one of {', '.join(ROLES)}, or of {', '.join(word for word in SPEAKERS if word not in _KNOWN)} was expected.",
        where=row.where,
        fix="Correct the role.",
        context={"row": row.number},
    )


# what a turn calls ---------------------------------------------------------------------------------------------------


def _translate_calls(row: Row, message: dict[str, object], field: str) -> None:
    """Bring the calls of a message into the form that templates read: a list under `tool_calls`."""
    calls = message.get("tool_calls", [])
    if isinstance(calls, str):
        calls = message["tool_calls"] = from_json_text(row, calls, f"{field}.tool_calls", "a list of calls")
    if not isinstance(calls, list | tuple):
        raise field_fault(row, f"{field}.tool_calls", calls, "a list of calls")
    for index, call in enumerate(calls):
        if not _name_of(call):
            raise value_fault(row, f"{field}.tool_calls[{index}]", call, "a call with the name of a function")
    if _CALL in message:
        if calls:
            raise value_fault(row, f"{field}.{_CALL}", message[_CALL], "nothing, as there are tool_calls,")
        message["tool_calls"] = _calls(row, message.pop(_CALL), f"{field}.{_CALL}")


def _calls(row: Row, given: object, field: str) -> list[object]:
    """Calls as OpenAI writes them, from `{"name": ..., "arguments": ...}`, a list of these, or their JSON text."""
    wanted = "a call, an object with name and arguments,"
    value = from_json_text(row, given, field, wanted) if isinstance(given, str) else given
    calls: list[object] = []
    for call in value if isinstance(value, list | tuple) else [value]:
        function = _function_of(call)
        if not _name_of(call) or "arguments" not in function:
            raise value_fault(row, field, given, wanted)
        calls.append({"type": "function", "function": dict(function)} if function is call else call)
    if not calls:
        raise value_fault(row, field, given, wanted)
    return calls


def _function_of(call: object) -> Message:
    """What a call calls: an object of name and arguments, inside the call or the call itself."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return function if isinstance(function, Mapping) else {}


def _name_of(call: object) -> str:
    name = _function_of(call).get("name")
    return name.strip() if isinstance(name, str) else ""


# contents ------------------------------------------------------------------------------------------------------------


def _parts(row: Row, parts: Sequence[object], field: str, role: str) -> list[Message]:
    """Text parts, each `{"type": "text", "text": ...}`. Pictures and the like are refused: no backend reads them. So
    are parts that ask for no loss: a turn is trained whole."""
    found: list[Message] = []
    for index, part in enumerate(parts):
        place = f"{field}[{index}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise field_fault(row, place, part, "a part of type text")
        kind = part.get("type")
        if not (kind is None or isinstance(kind, str)) or kind not in _TEXT_PARTS:
            raise value_fault(row, f"{place}.type", kind, "text")
        if not isinstance(part.get("text"), str):
            raise field_fault(row, f"{place}.text", part.get("text", MISSING), "a string")
        for name in sorted({*PICTURES, "image_url"} & part.keys()):
            if part[name] is not None:
                raise value_fault(row, f"{place}.{name}", part[name], "a part of text alone")
        kept = _without_flags(row, part, place, role)
        found.append({**{key: held for key, held in kept.items() if held is not None}, "type": "text"})
    return found


def _without_flags(row: Row, part: Message, field: str, role: str) -> Message:
    """A part without the fields that say what holds of it in any case, as those of a turn are taken out of it."""
    asks = _asked(row, part, field)
    if role != "assistant":
        return {key: held for key, held in part.items() if asks.get(key, True)}
    unclear = [name for name in UNCLEAR if part.get(name)]
    for name in (*unclear, *[name for name, trained in asks.items() if not trained]):
        wanted = "nothing, for a turn is trained whole or not at all,"
        raise value_fault(row, f"{field}.{name}", part[name], wanted, "Mark the whole turn, or remove the field.")
    return {key: held for key, held in part.items() if key not in asks}


def joined(content: object) -> object:
    """Text parts as one text; anything else as it is."""
    if isinstance(content, list):
        return "".join(str(part["text"]) for part in content)
    return content


# what is trained -----------------------------------------------------------------------------------------------------


def _taken_flags(row: Row, message: dict[str, object], field: str) -> set[str]:
    """The fields by which a turn asks for no loss, taken out of the message with those that ask for loss.

    Roles other than assistant carry no loss in any case; there a field that asks for it stays, and is told as unused.
    """
    asks = _asked(row, message, field)
    assistant = message["role"] == "assistant"
    for name in UNCLEAR if assistant else ():
        if message.get(name):
            raise value_fault(row, f"{field}.{name}", message[name], "train, weight or another field with one meaning")
    if len(set(asks.values())) > 1:
        raise value_fault(row, field, {name: message[name] for name in asks}, "one value for whether it is trained")
    for name, trained in asks.items():
        if assistant or not trained:
            del message[name]
    return {name for name, trained in asks.items() if not trained}


def _asked(row: Row, flagged: Message, field: str) -> dict[str, bool]:
    """Whether each field that says so asks for loss."""
    asks: dict[str, bool] = {}
    for name in (*TRAINED_IF, *UNTRAINED_IF):
        value = flagged.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            raise value_fault(row, f"{field}.{name}", value, "0 or 1")
        asks[name] = (value == 1) != (name in UNTRAINED_IF)
    return asks
