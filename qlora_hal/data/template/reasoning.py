"""Where reasoning stands in a turn: between the marks that a template writes around it, or that people write.

A template's own marks are found by a trial: it writes a turn with a thought, and what stands right before and behind
the thought are its marks. `<think>` and `</think>` count in any case, for rows often hold them in their contents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from qlora_hal.data.template.chat_template import REASONING_FIELDS, TemplateFault
from qlora_hal.data.template.message_fields import CALLS, CONTENT
from qlora_hal.errors import UnsafeInputError

if TYPE_CHECKING:
    from qlora_hal.data.template.chat_template import ChatTemplate
    from qlora_hal.data.template.message_fields import Message
    from qlora_hal.data.template.turn_marks import Span

    Piece = tuple[str, bool]

Marks = tuple[str, str]
"""What stands before a thought, and behind it."""

USUAL_MARKS: Marks = ("<think>", "</think>")
_UNKNOWN: Marks = ("", "")
_THOUGHT, _SIGN = "hesitantly", "decidedly"
_TAG = r"(?:<[^<>\s]*>|\[[^\[\]\s]*\]|◁[^◁▷\s]*▷)"
_OPENING = re.compile(rf"{_TAG}\w*\s*$")
_CLOSING = re.compile(_TAG)


def reasoning_marks(template: ChatTemplate | None) -> ReasoningMarks:
    """The marks that count in turns of this template."""
    found = [] if template is None else [_marks_of(template, _ANSWERS), _marks_of(template, _CALLS)]
    own = dict.fromkeys(marks for marks in found if marks not in (None, USUAL_MARKS, _UNKNOWN))
    return ReasoningMarks((*filter(None, own), USUAL_MARKS), unknown=_UNKNOWN in found)


def _turns_that_answer() -> Iterator[Message]:
    for content in (_SIGN, [{"type": "text", "text": _SIGN}]):
        yield {"role": "assistant", CONTENT: content}


def _turns_that_call() -> Iterator[Message]:
    for arguments in ({"key": "text"}, '{"key": "text"}'):
        call = {"id": "call00001", "type": "function", "function": {"name": _SIGN, "arguments": arguments}}
        yield {"role": "assistant", CONTENT: "", CALLS: [call]}


_ANSWERS, _CALLS = tuple(_turns_that_answer()), tuple(_turns_that_call())
"""Turns to try. Some templates write a thought before calls alone, as Gemma 4's first one does."""


def _marks_of(template: ChatTemplate, turns: Sequence[Message]) -> Marks | None:
    """None where the template writes no thought in these turns, `_UNKNOWN` where it writes one between no marks that
    are told apart from text."""
    writes = False
    asked = {"role": "user", CONTENT: "text"}
    for turn in turns:
        thinking = {**turn, **dict.fromkeys(REASONING_FIELDS, _THOUGHT)}
        try:
            text = template.trace([asked, thinking]).text
            silent = template.trace([asked, turn]).text
            prompt = template.trace([asked], add_generation_prompt=True).text
        except (TemplateFault, UnsafeInputError):
            continue
        before, thought, behind = text.partition(_THOUGHT)
        between, sign, _ = behind.partition(_SIGN)
        if not thought or not sign:
            writes = writes or bool(thought)
            continue
        if before.rstrip().endswith(USUAL_MARKS[0]) and USUAL_MARKS[1] in between:
            return USUAL_MARKS
        # What follows the prompt is for the model to write: all of gpt-oss's <|channel|>analysis<|message|>, say.
        own = before.removeprefix(prompt).strip() if before.startswith(prompt) else ""
        last_tag, closing = _OPENING.search(before), _CLOSING.search(between)
        opening = own or (last_tag.group().strip() if last_tag else "")
        if opening and closing and not (CALLS in turn and _leads_to_a_call(closing, silent.partition(_SIGN)[0])):
            return opening, closing.group()
        writes = True
    return _UNKNOWN if writes else None


def _leads_to_a_call(tag: re.Match[str], before: str) -> bool:
    """Whether the tag stands before the call of a turn without a thought, too, in all that follows the thought."""
    return before.endswith(tag.string[tag.start() :])


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    """Pairs of marks, and what stands between them; `unknown` where the template writes thoughts between others."""

    pairs: Sequence[Marks]
    unknown: bool = False

    def occur_in(self, text: str) -> bool:
        """Whether an opening mark, or one that closes nothing but reasoning, stands in the text."""
        marks = (mark for pair in self.pairs for mark in (pair if _mirrored(*pair) else pair[:1]))
        return any(mark in text for mark in marks)

    def left_out(self, pieces: Sequence[Piece]) -> tuple[list[Piece], int]:
        """The pieces of a text without loss on what stands between marks; the marks keep theirs. And in how many
        trained parts there was reasoning."""
        text = "".join(piece for piece, _ in pieces)
        kept: list[Piece] = []
        at = found = 0
        for trained, group in groupby(pieces, key=itemgetter(1)):
            stop = at + sum(len(piece) for piece, _ in group)
            spans = self._spans(text, at, stop) if trained else []
            found += any(text[first:last].strip() for first, last in spans)
            for first, last in spans:
                kept += [(text[at:first], True), (text[first:last], False)]
                at = last
            kept.append((text[at:stop], trained))
            at = stop
        return [piece for piece in kept if piece[0]], found

    def _spans(self, text: str, start: int, stop: int) -> list[Span]:
        """What lies between marks of a trained part, in order and apart from one another."""
        spans: list[Span] = []
        for first, last in sorted(span for pair in self.pairs for span in _between(text, start, stop, *pair)):
            begin = max(first, spans[-1][1]) if spans else first
            if begin < last:
                spans.append((begin, last))
        return spans


def _between(text: str, start: int, stop: int, opening: str, closing: str) -> Iterator[Span]:
    """Reasoning may have been opened by the prompt in front of `start`; one that is never closed ends at `stop`."""
    at = start
    first, end = text.find(opening, start, stop), text.find(closing, start, stop)
    opened = text[:start].rstrip().endswith(opening)
    if opened or (_mirrored(opening, closing) and end >= 0 and (first < 0 or end < first)):
        last = _end_of_thought(text, start, stop, opening, closing)
        yield start, last
        at = min(last + len(closing), stop)
    while (begin := text.find(opening, at, stop)) >= 0:
        begin += len(opening)
        last = _end_of_thought(text, begin, stop, opening, closing)
        yield begin, last
        at = min(last + len(closing), stop)


def _end_of_thought(text: str, begin: int, stop: int, opening: str, closing: str) -> int:
    """Where the thought that begins at `begin` ends: at the last mark that closes nothing else. Thoughts quote their
    marks, and templates read them so (`content.split('</think>')[-1]`)."""
    end = text.find(closing, begin, stop)
    if end < 0 or not _mirrored(opening, closing):
        return end if end >= 0 else stop
    following = text.find(opening, end, stop)
    return text.rfind(closing, end, following if following >= 0 else stop)


def _mirrored(opening: str, closing: str) -> bool:
    """Whether a mark closes nothing else: gpt-oss's <|end|> also ends answers."""
    return closing.replace("/", "", 1) == opening
