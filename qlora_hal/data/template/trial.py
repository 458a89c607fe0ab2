"""What a template writes of conversations of one form, seen on one in which every text is a word of its own.

The form of a conversation is its roles, the fields of its messages and of what kind they are. A trial has the same form
as a row, and words in place of the row's texts: the words that come out tell what the template writes, and where. It is
made once for each form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qlora_hal.data.source.json_text import decoded
from qlora_hal.data.template.chat_template import REASONING_FIELDS, TemplateFault
from qlora_hal.errors import UnsafeInputError

if TYPE_CHECKING:
    from qlora_hal.data.template.chat_template import ChatTemplate
    from qlora_hal.data.template.turn_marks import Rendering

Message = Mapping[str, object]
Form = tuple[object, ...]

CONTENT, REASONING, CALLS = "content", "reasoning", "tool_calls"
_KNOWN_FIELDS = frozenset({"role", CONTENT, CALLS, *REASONING_FIELDS})
_DUMPED_PART = re.compile(r"""["']type["']\s*:\s*["']text["']""")
_PIECE = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+")
_FORMS_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Trial:
    """What a template does with one form of conversation.

    `unwritten` are (message, what: content, reasoning or tool_calls) of which a word is missing in the text; `fields`
    are other fields of messages that change nothing; `openings` is the text in an assistant's turn before its own
    first word; `holding_others` are assistant turns in whose text words of other messages stand.
    """

    unwritten: frozenset[tuple[int, str]]
    tools_unwritten: bool
    fields: frozenset[str]
    openings: Mapping[int, str]
    holding_others: frozenset[int]

    @property
    def contents_unwritten(self) -> int:
        return sum(what == CONTENT for _, what in self.unwritten)


class Trials:
    """The trials of one template, each made when its form is first met."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._known: dict[Form, Trial | None] = {}
        self._headers: dict[Form, str] = {}

    def of(self, messages: Sequence[Message], tools: Sequence[object] | None) -> Trial | None:
        """What the template does with conversations of this form; None where it refuses the trial's words."""
        form = form_of(messages, tools)
        if form not in self._known:
            trial = self._tried(messages, tools)
            if len(self._known) >= _FORMS_KEPT:
                return trial
            self._known[form] = trial
        return self._known[form]

    def is_written(self, sign: str, messages: Sequence[Message], tools: Sequence[object] | None) -> bool:
        """Whether the template writes this sign into these messages; no where it refuses them."""
        try:
            return sign in self._template.trace(messages, tools=tools).text
        except (TemplateFault, UnsafeInputError):
            return False

    def header_of(self, messages: Sequence[Message], turn: int, tools: Sequence[object] | None) -> str:
        """What the template writes at the beginning of an assistant's turn whatever the turn holds: its role, and
        nothing by which a thought or a call begins. Empty where a turn of plain content is not to be found."""
        form = (turn, *form_of(messages, tools))
        if form not in self._headers:
            header = self._header(messages, turn, tools)
            if len(self._headers) >= _FORMS_KEPT:
                return header
            self._headers[form] = header
        return self._headers[form]

    def _header(self, messages: Sequence[Message], turn: int, tools: Sequence[object] | None) -> str:
        in_parts = any(isinstance(message.get(CONTENT), list | tuple) for message in messages)
        plain, *others = [
            self._opening([*messages[:turn], instead], turn, tools) for instead in _turns_of_each_kind(in_parts)
        ]
        if plain is None:
            return ""
        trial = self.of(messages, tools)
        here = trial.openings.get(turn) if trial is not None else None
        openings = [plain, *[opening for opening in (here, *others) if opening is not None]]
        # A thinking part that stands in every turn is no part of the role: the model has to open it.
        return _shared_beginning(openings).partition("<think>")[0]

    def _opening(self, messages: Sequence[Message], turn: int, tools: Sequence[object] | None) -> str | None:
        trial = self.of(messages, tools)
        return trial.openings.get(turn) if trial is not None else None

    def _tried(self, messages: Sequence[Message], tools: Sequence[object] | None) -> Trial | None:
        words = _Words()
        tried = [_message_of_words(message, number, words) for number, message in enumerate(messages)]
        offered = [_tool_of_words(tools[0], words)] if tools else None
        _name_calls_in_order(tried)
        try:
            rendering = self._template.trace(tried, tools=offered)
        except (TemplateFault, UnsafeInputError):
            return None
        text = rendering.text.lower()
        unwritten = {place for word, place in words.places.items() if word not in text}
        if _DUMPED_PART.search(rendering.text):
            unwritten |= {(n, CONTENT) for n, message in enumerate(tried) if isinstance(message.get(CONTENT), list)}
        return Trial(
            frozenset(unwritten),
            words.tool not in text if tools else False,
            frozenset(name for name in _other_fields(tried) if self._is_unused(name, tried, offered, rendering)),
            *_in_turns(tried, rendering, words),
        )

    def _is_unused(
        self, name: str, tried: Sequence[Message], tools: Sequence[object] | None, rendering: Rendering
    ) -> bool:
        without = [{key: value for key, value in message.items() if key != name} for message in tried]
        try:
            return self._template.trace(without, tools=tools).text == rendering.text
        except (TemplateFault, UnsafeInputError):
            return False


def form_of(messages: Sequence[Message], tools: Sequence[object] | None) -> Form:
    """The form of a conversation, to know another of the same form by."""
    offered = isinstance(tools[0], Mapping) and "function" in tools[0] if tools else None
    return (offered, *[tuple((key, _kind(key, value)) for key, value in message.items()) for message in messages])


def _kind(name: str, value: object) -> object:
    if name == "role":
        return value
    if isinstance(value, str):
        return bool(value.strip())
    if name == CONTENT and isinstance(value, list | tuple):
        return tuple(bool(text_of_part(part).strip()) for part in value)
    if name == CALLS and isinstance(value, list | tuple):
        return tuple(_kind_of_call(call) for call in value)
    return type(value).__name__


def _kind_of_call(call: object) -> object:
    if not isinstance(call, Mapping):
        return type(call).__name__
    inner = call.get("function", call)
    arguments = inner.get("arguments") if isinstance(inner, Mapping) else None
    return (*call, type(arguments).__name__, _are_empty(arguments))


def _are_empty(arguments: object) -> bool:
    return arguments.strip() in ("", "{}", "null") if isinstance(arguments, str) else not arguments


def object_in(arguments: object) -> dict[str, object] | None:
    """The object that arguments of a call hold as JSON text."""
    if not isinstance(arguments, str):
        return None
    try:
        found = decoded(arguments)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def text_of_part(part: object) -> str:
    """The text of one part of a content."""
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else ""


@dataclass(slots=True)
class _Words:
    """Words that occur nowhere else, and what each stands for."""

    places: dict[str, tuple[int, str]] = field(default_factory=dict)
    tool: str = ""

    def new(self, message: int, what: str) -> str:
        word = f"qorvex{len(self.places)}q"
        self.places[word] = (message, what)
        return word


def _message_of_words(message: Message, number: int, words: _Words) -> dict[str, object]:
    tried = dict(message)
    content = message.get(CONTENT)
    if isinstance(content, str) and content.strip():
        tried[CONTENT] = words.new(number, CONTENT)
    elif isinstance(content, list | tuple):
        texts = [words.new(number, CONTENT) if text_of_part(part).strip() else "" for part in content]
        tried[CONTENT] = [{"type": "text", "text": text} for text in texts]
    reasoned = [name for name in REASONING_FIELDS if isinstance(message.get(name), str)]
    if any(str(message[name]).strip() for name in reasoned):
        tried.update(dict.fromkeys(reasoned, words.new(number, REASONING)))
    calls = message.get(CALLS)
    if isinstance(calls, list | tuple):
        tried[CALLS] = [_call_of_words(call, number, words) for call in calls]
    for name in _other_fields([message]):
        if isinstance(message[name], str) and name != "tool_call_id":
            tried[name] = f"field{name}q"
    return tried


def _call_of_words(call: object, number: int, words: _Words) -> object:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(inner, Mapping):
        return call
    tried = {**inner, "name": words.new(number, CALLS)}
    arguments = inner.get("arguments")
    if isinstance(arguments, Mapping) and not _are_empty(arguments):
        tried["arguments"] = {"key": words.new(number, CALLS)}
    elif isinstance(arguments, str) and not _are_empty(arguments):
        tried["arguments"] = json.dumps({"key": words.new(number, CALLS)})
    return {**call, "function": tried} if "function" in call else tried


def _tool_of_words(tool: object, words: _Words) -> object:
    words.tool = "qorvextoolq"
    schema = {"name": words.tool, "description": "text", "parameters": {"type": "object", "properties": {}}}
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


def _other_fields(messages: Sequence[Message]) -> list[str]:
    return sorted({name for message in messages for name in message} - _KNOWN_FIELDS)


def _shared_beginning(texts: Sequence[str]) -> str:
    """What all the texts begin with, to the last place that is inside no tag or word of any."""
    columns = zip(*texts, strict=False)
    end = next((at for at, signs in enumerate(columns) if len(set(signs)) > 1), min(map(len, texts)))
    inside = [piece.start() for text in texts for piece in _PIECE.finditer(text) if piece.start() < end < piece.end()]
    return texts[0][: min(inside, default=end)]


def _turns_of_each_kind(in_parts: bool) -> Iterator[Message]:
    """An assistant's turn of plain content, one with a thought, one with a call."""
    content = [{"type": "text", "text": "text"}] if in_parts else "text"
    yield {"role": "assistant", CONTENT: content}
    yield {"role": "assistant", REASONING_FIELDS[0]: "text", CONTENT: content}
    call = {"id": "c", "type": "function", "function": {"name": "name", "arguments": {"key": "text"}}}
    yield {"role": "assistant", CONTENT: [] if in_parts else "", CALLS: [call]}


def _in_turns(
    messages: Sequence[Message], rendering: Rendering, words: _Words
) -> tuple[dict[int, str], frozenset[int]]:
    """(openings, holding_others) of the assistant's turns."""
    openings: dict[int, str] = {}
    holding: set[int] = set()
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or len(rendering.turns.get(number, ())) != 1:
            continue
        start, stop = rendering.turns[number][0]
        turn = rendering.text[start:stop]
        own = [place for place, owner in _met(turn, words) if owner == number]
        if own:
            openings[number] = turn[: min(own)]
        if any(owner != number for _, owner in _met(turn, words)):
            holding.add(number)
    return openings, frozenset(holding)


def _met(turn: str, words: _Words) -> Iterator[tuple[int, int]]:
    """(where each word first stands in a turn, the message it belongs to)."""
    lowered = turn.lower()
    for word, (owner, _) in words.places.items():
        place = lowered.find(word)
        if place >= 0:
            yield place, owner
