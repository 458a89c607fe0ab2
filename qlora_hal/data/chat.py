"""From a conversation to text in pieces, each with loss or without.

The text is the template's own output, to the character. What is trained of it is each assistant turn as the template
wrote it (content, reasoning, tool calls, the token that ends it), less what a generation prompt would have put there.
Where a turn stands is told by the template's loops (template/turn_marks.py); a template that writes its turns
otherwise is run on the messages before a turn and up to it. `{% generation %}` marks, when a template has them, say
which parts of a turn are trained.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING

from qlora_hal.data.contents import Contents
from qlora_hal.data.template.chat_template import TemplateFault
from qlora_hal.data.template.trial import Trials
from qlora_hal.data.tokens.special_text import SpecialText

if TYPE_CHECKING:
    from qlora_hal.data.template.chat_template import ChatTemplate
    from qlora_hal.data.template.trial import Trial
    from qlora_hal.data.template.turn_marks import Rendering, Span

Piece = tuple[str, bool]
"""Text, and whether it is trained."""

Message = Mapping[str, object]
Tools = Sequence[object] | None

EMPTY_THOUGHT = re.compile(r"<think>\s*</think>")
"""A thinking part without thoughts, as templates of models that think write it."""

_HEADER = "header"
"""Where `prompts` keeps the last role that a turn began with."""
_EXACT_TURNS = 64
"""Messages up to which each turn's prompt is rendered; in a longer conversation that would take time that grows with
its square, and what stood after a message of the same kind stands there again."""

_FARTHEST_RENDERED = 1024
"""Messages up to which a conversation is rendered again to find one of its turns. Farther on a turn has to be found in
the text of the whole; where it is not, the row is refused, for each such turn would cost as much as all before it."""

_TAG_AT_END = re.compile(r"(<[^<>\s]*>)\s*\Z")
_TAG_LINE_OR_WORDS = r"<[^<>\s]*>|\n|[^<\n]+|<"


class TurnNotFound(Exception):
    """The place of an assistant turn in the rendered text cannot be told. `turn` counts messages from 0."""

    def __init__(self, turn: int) -> None:
        super().__init__(f"message {turn + 1}")
        self.turn = turn


@dataclass(frozen=True, slots=True)
class Target:
    """What one assistant turn contributes, in order, and whether a special token ends it."""

    spans: tuple[Span, ...]
    closed: bool


@dataclass(frozen=True, slots=True)
class Written:
    """A rendered conversation. `end_added` says that an end token was put behind it, for the template writes none;
    `silent` are turns of which the template writes nothing but a frame, `unmarked` those without its
    `{% generation %}`: neither is trained."""

    pieces: list[Piece]
    end_added: bool
    silent: tuple[int, ...] = ()
    unmarked: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


class ConversationWriter:
    """Renders conversations of one template and finds what is trained in them.

    `ends` are the tokens that end generation, as text: one of these ends a turn even where the template writes it as
    the beginning of the next message.
    """

    def __init__(
        self, template: ChatTemplate, special: SpecialText, eos_token: str, ends: Collection[str] = ()
    ) -> None:
        self._template, self._special, self._eos_token = template, special, eos_token
        self._ends = frozenset(ends) | {eos_token}
        self._prompt_pieces = re.compile(f"{special.pattern.pattern}|{_TAG_LINE_OR_WORDS}")
        self._prompt_after_user: str | None = None
        self.trials = Trials(template)
        self.contents = Contents(self.trials)

    def write(
        self, messages: Sequence[Message], first_target: int = 0, tools: Tools = None, untrained: Collection[int] = ()
    ) -> Written:
        """Pieces whose text together is the template's own output, and an end token behind it where the template ends
        the last answer with none; assistant turns before `first_target` and those `untrained` carry no loss.

        Raises TemplateFault, TurnNotFound, UnsafeInputError.
        """
        messages = self.contents.fitted(messages, tools)
        rendering = self.trace(messages, tools)
        turns = trained_turns(messages, first_target, untrained)
        return self.cut(rendering, messages, turns, tools, self.trials.of(messages, tools))

    def trace(self, messages: Sequence[Message], tools: Tools = None) -> Rendering:
        """The template's own output. Raises TemplateFault, UnsafeInputError."""
        return self._template.trace(messages, tools=tools)

    def cut(
        self,
        rendering: Rendering,
        messages: Sequence[Message],
        turns: Sequence[int],
        tools: Tools,
        trial: Trial | None,
    ) -> Written:
        """The text of a rendering in pieces, with loss on the assistant messages `turns`; `trial` is that of their
        form. Raises as `write` does."""
        pieces: list[Piece] = []
        silent, unmarked, at, end_added = [], [], 0, False
        prompts: dict[object, str] = {}
        for turn in turns:
            target = self._target(rendering, messages, turn, tools, trial, prompts)
            if target is not None and not target.spans:
                unmarked.append(turn)
                continue
            if target is None or not self._says_something(rendering.text, target):
                silent.append(turn)
                continue
            for start, stop in target.spans:
                if start < at:
                    raise TurnNotFound(turn)
                pieces += [(rendering.text[at:start], False), (rendering.text[start:stop], True)]
                at = stop
            if not target.closed and turn == len(messages) - 1:
                # Whatever still follows has to be written by the model before it can end.
                pieces += [(rendering.text[at:], True), (self._end_if_it_went_on(messages, tools), True)]
                at, end_added = len(rendering.text), True
        pieces.append((rendering.text[at:], False))
        return Written([piece for piece in pieces if piece[0]], end_added, tuple(silent), tuple(unmarked))

    # one turn -------------------------------------------------------------------------------------------------------
    def _target(
        self,
        rendering: Rendering,
        messages: Sequence[Message],
        turn: int,
        tools: Tools,
        trial: Trial | None,
        prompts: dict[object, str],
    ) -> Target | None:
        """What is trained of a turn; no span where the template's marks leave it out, None where nothing is written.
        `prompts` are those that were found before other turns of the conversation."""
        marked = rendering.generated
        found = self._turn_span(rendering, messages, turn, tools, trial)
        if found is None and self._template.marks_generation:
            assistant = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            if len(marked) != len(assistant):
                raise TurnNotFound(turn)
            found = marked[assistant.index(turn)]
        if found is None:
            found = self._span_by_difference(rendering, messages, turn, tools)
        if found is None:
            if trial is not None and (turn, "content") in trial.unwritten and not messages[turn].get("tool_calls"):
                return None
            raise TurnNotFound(turn)
        start, stop = found
        if not rendering.text[start:stop].strip():
            return None
        start += self._heading(rendering.text[start:stop], messages, turn, tools, prompts)
        if self._template.marks_generation:
            # The marks come in the order of the text, none within another.
            after = bisect.bisect_right(marked, start, key=itemgetter(1))
            before = bisect.bisect_left(marked, stop, key=itemgetter(0))
            spans = [(max(start, first), last) for first, last in marked[after:before]]
            return self._ended(rendering.text, spans, stop) if spans else Target((), closed=False)
        return self._ended(rendering.text, [(start, stop)], stop)

    def _turn_span(
        self, rendering: Rendering, messages: Sequence[Message], turn: int, tools: Tools, trial: Trial | None
    ) -> Span | None:
        spans = [(start, stop) for start, stop in rendering.turns.get(turn, ()) if rendering.text[start:stop].strip()]
        if len(spans) != 1:
            return None
        start, stop = spans[0]
        if not self._holds_others(spans[0], rendering, turn, trial):
            return start, stop
        # The template writes what follows (a tool's result) in the assistant's own turn: that part is not the model's.
        if turn > _FARTHEST_RENDERED:
            raise TurnNotFound(turn)
        alone = self._template.trace(messages[: turn + 1], tools=tools)
        (first, last), *more = alone.turns.get(turn, [(0, 0)])
        if more or first == last or not rendering.text.startswith(alone.text[first:last], start):
            raise TurnNotFound(turn)
        return start, start + last - first

    @staticmethod
    def _holds_others(span: Span, rendering: Rendering, turn: int, trial: Trial | None) -> bool:
        spans = rendering.written_spans
        within = range(bisect.bisect_left(spans, (span[0],)), bisect.bisect_left(spans, (span[1],)))
        inside = any(spans[at][1] <= span[1] and spans[at][2] != turn for at in within)
        return inside or (trial is not None and turn in trial.holding_others)

    def _span_by_difference(
        self, rendering: Rendering, messages: Sequence[Message], turn: int, tools: Tools
    ) -> Span | None:
        """A turn without its heading, where the texts of the messages before it and up to it begin the whole text."""
        if turn > _FARTHEST_RENDERED:
            return None
        try:
            opened = self._template.trace(messages[:turn], add_generation_prompt=True, tools=tools).text
            closed = self._template.trace(messages[: turn + 1], tools=tools).text
        except TemplateFault:
            return None
        if rendering.text.startswith(closed) and closed.startswith(opened):
            return len(opened), len(closed)
        return None

    # what a generation prompt holds ---------------------------------------------------------------------------------
    def _heading(
        self, text: str, messages: Sequence[Message], turn: int, tools: Tools, prompts: dict[object, str]
    ) -> int:
        """How many characters at the beginning of a turn are not for the model to write."""
        prompt = self._prompt_before(text, messages, turn, tools, prompts) if self._template.offers_prompt else ""
        if text.startswith(prompt) and prompt.strip():
            return len(prompt)
        if not prompt.strip() and self._template.offers_prompt:
            prompt = self._prompt([], tools)
        blank = len(text) - len(text.lstrip())
        at = blank
        # A prompt may open a thinking part that this turn does not have.
        for piece in self._prompt_pieces.findall(prompt.lstrip()):
            if not text.startswith(piece, at):
                break
            at += len(piece)
        if at > blank:
            return at
        goes_on = turn > 0 and messages[turn - 1]["role"] == "assistant"
        if self._template.marks_generation or (self._template.offers_prompt and goes_on):
            return 0
        return len(self._header_before(text, messages, turn, tools, prompts))

    def _header_before(
        self, text: str, messages: Sequence[Message], turn: int, tools: Tools, prompts: dict[object, str]
    ) -> str:
        """The role that a turn begins with. Far into a conversation it is that of the turn before, if this one begins
        with it."""
        known = prompts.get(_HEADER) if turn > _EXACT_TURNS else None
        if known is not None and text.startswith(known):
            return known
        if turn > _FARTHEST_RENDERED:
            raise TurnNotFound(turn)
        header = self.trials.header_of(messages, turn, tools)
        found = header if header.strip() and text.startswith(header) else ""
        prompts[_HEADER] = found
        return found

    def _prompt_before(
        self, text: str, messages: Sequence[Message], turn: int, tools: Tools, prompts: dict[object, str]
    ) -> str:
        """The prompt of a turn. Far into a conversation it is the one after the last message of the same kind, if this
        turn begins with it, and with no empty thought behind it, which a prompt may or may not hold."""
        kind = (messages[turn - 1]["role"], bool(messages[turn - 1].get("tool_calls"))) if turn else None
        known = prompts.get(kind) if turn > _EXACT_TURNS else None
        if known is not None and text.startswith(known):
            behind = text[len(known) :].lstrip()
            if not EMPTY_THOUGHT.match(behind):
                return known
        prompts[kind] = self._prompt(messages[:turn], tools)
        return prompts[kind]

    def _prompt(self, before: Sequence[Message], tools: Tools) -> str:
        """What the template writes for the assistant to go on after these messages."""
        if before:
            try:
                asked = self._template.trace(before, add_generation_prompt=True, tools=tools)
            except TemplateFault:
                pass
            else:
                if asked.end:
                    return asked.text[asked.end :]
                plain = self._template.trace(before, tools=tools).text
                return asked.text.removeprefix(plain) if asked.text.startswith(plain) else ""
        if self._prompt_after_user is None:
            self._prompt_after_user = ""
            self._prompt_after_user = self._prompt([{"role": "user", "content": "a"}], None)
        return self._prompt_after_user

    @cached_property
    def prompt_tag(self) -> str:
        """The tag that a generation prompt ends with, as <think>; empty where it ends otherwise."""
        if not self._template.offers_prompt:
            return ""
        found = _TAG_AT_END.search(self._prompt([], None))
        return found.group(1) if found else ""

    # where a turn ends ----------------------------------------------------------------------------------------------
    def _ended(self, text: str, spans: Sequence[Span], stop: int) -> Target:
        """The target that these spans of a turn make, to its end token. White space behind that token is left out."""
        *before, (start, last) = spans
        end = self._special.end_of_last(text[start:last])
        if end is not None:
            return Target((*before, (start, start + end)), closed=True)
        after = self._special.next_after(text, last)
        if after is not None and (after[1] <= stop or after[0] in self._ends):
            return Target((*before, (start, after[1])), closed=True)
        return Target((*before, (start, start + len(text[start:last].rstrip()))), closed=False)

    def _end_if_it_went_on(self, messages: Sequence[Message], tools: Tools) -> str:
        """The end token that the template would write behind the last answer as the next message's beginning, or the
        eos: so all turns of a template end with tokens of one kind."""
        last = len(messages) - 1
        answer = (
            {"role": "tool", "content": "a"} if messages[last].get("tool_calls") else {"role": "user", "content": "a"}
        )
        try:
            longer = self._template.trace([*messages, answer], tools=tools)
        except TemplateFault:
            return self._eos_token
        for _, stop in longer.turns.get(last, ()):
            after = self._special.next_after(longer.text, stop)
            if after is not None and after[0] in self._ends:
                return after[0]
        return self._eos_token

    def _says_something(self, text: str, target: Target) -> bool:
        return any(self._special.pattern.sub("", text[start:stop]).strip() for start, stop in target.spans)


def trained_turns(messages: Sequence[Message], first_target: int, untrained: Collection[int]) -> list[int]:
    """The numbers of the messages that carry loss."""
    return [
        number
        for number, message in enumerate(messages)
        if message["role"] == "assistant" and number >= first_target and number not in untrained
    ]
