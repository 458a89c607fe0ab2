"""What a template writes of conversations of one form, seen on one in which every text is a word of its own.

A trial has the same form as a row, and words in place of the row's texts (trial_words.py): the words that come out tell
what the template writes, and where. It is made once for each form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_hal.data.template.chat_template import REASONING_FIELDS, TemplateFault
from qlora_hal.data.template.message_fields import CALLS, CONTENT, Path, name_of, other_fields, without_field
from qlora_hal.data.template.trial_words import TOOLS, Form, Words, conversation_of_words, form_of
from qlora_hal.errors import UnsafeInputError

if TYPE_CHECKING:
    from qlora_hal.data.template.chat_template import ChatTemplate
    from qlora_hal.data.template.message_fields import Message
    from qlora_hal.data.template.turn_marks import Rendering

_DUMPED_PART = re.compile(r"""["']type["']\s*:\s*["']text["']""")
_PIECE = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+")
_FORMS_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Trial:
    """What a template does with one form of conversation.

    `unwritten` are (message, what: content, reasoning or tool_calls) of which a word is missing in the text, and
    `of_tools` is what is missing of tools; `fields` are other fields of messages that change nothing; `openings` is the
    text in an assistant's turn before its own first word; `holding_others` are assistant turns in whose text words of
    other messages stand.
    """

    unwritten: frozenset[tuple[int, str]]
    of_tools: frozenset[str]
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
        tried, offered, words = conversation_of_words(messages, tools)
        try:
            rendering = self._template.trace(tried, tools=offered)
        except (TemplateFault, UnsafeInputError):
            return None
        written = words.first_places(rendering.text.lower())
        unwritten = {place for word, place in words.places.items() if word not in written}
        if _DUMPED_PART.search(rendering.text):
            unwritten |= {(n, CONTENT) for n, message in enumerate(tried) if isinstance(message.get(CONTENT), list)}
        of_tools = {what for word, what in words.of_tools.items() if word not in written}
        return Trial(
            frozenset(unwritten),
            frozenset({TOOLS} if TOOLS in of_tools else of_tools),
            self._unused_fields(tried, offered, rendering),
            *_in_turns(tried, rendering, words),
        )

    def _unused_fields(
        self, tried: Sequence[Message], tools: Sequence[object] | None, rendering: Rendering
    ) -> frozenset[str]:
        """The fields that change nothing, with the role where those of other roles do."""
        roles: dict[Path, set[str]] = {}
        for message in tried:
            for path in other_fields(message):
                roles.setdefault(path, set()).add(str(message["role"]))
        unused: set[str] = set()
        for path, having in roles.items():
            without = {role for role in having if self._is_unused(path, role, tried, tools, rendering)}
            name = name_of(path)
            unused |= {name} if without == having else {f"{name} of {role} messages" for role in without}
        return frozenset(unused)

    def _is_unused(
        self, path: Path, role: str, tried: Sequence[Message], tools: Sequence[object] | None, rendering: Rendering
    ) -> bool:
        without = [without_field(message, path) if message["role"] == role else message for message in tried]
        try:
            return self._template.trace(without, tools=tools).text == rendering.text
        except (TemplateFault, UnsafeInputError):
            return False


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


def _in_turns(messages: Sequence[Message], rendering: Rendering, words: Words) -> tuple[dict[int, str], frozenset[int]]:
    """(openings, holding_others) of the assistant's turns."""
    openings: dict[int, str] = {}
    holding: set[int] = set()
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or len(rendering.turns.get(number, ())) != 1:
            continue
        start, stop = rendering.turns[number][0]
        turn = rendering.text[start:stop]
        met = list(_met(turn, words))
        own = [place for place, owner in met if owner == number]
        if own:
            openings[number] = turn[: min(own)]
        if any(owner != number for _, owner in met):
            holding.add(number)
    return openings, frozenset(holding)


def _met(turn: str, words: Words) -> Iterator[tuple[int, int]]:
    """(where each word first stands in a turn, the message it belongs to)."""
    for word, place in words.first_places(turn.lower()).items():
        if word in words.places:
            yield place, words.places[word][0]
