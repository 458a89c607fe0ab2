"""Where each message stands in a rendered conversation, told by the template's own loops.

A template writes its turns in a loop over messages. Each loop is compiled with marks: one where a turn of the loop
begins, with the object it is about, and one where the loop ends. What stands between is what the template wrote for
that message, however it rewrites, moves or leaves out. While the template runs, a mark is a text without length, so
that a template sees and writes the same as without; marks of loops inside macros and captured blocks are gone when
their text is joined. Those that reach the output say where it stood when they came; no text that a template or a row
writes is ever taken for a mark.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, cast

import jinja2
import jinja2.nodes
import jinja2.runtime

from qlora_hal.data.template.sandbox import GENERATION_END, GENERATION_START, shown

Span = tuple[int, int]
"""Characters from the first to one past the last."""

# A template cannot name a filter with a space in it.
_BEGINS, _HAS_ENDED = "loop begins a turn", "loop has ended"
_GENERATION_SIGNS = re.compile(f"[{GENERATION_START}{GENERATION_END}]")


class LoopMark(str):
    """A piece of output: the loop of this number begins a turn about the object with this id, or has ended (None)."""

    __slots__ = ("about", "loop")
    loop: int
    about: int | None

    def __new__(cls, loop: int, about: int | None) -> LoopMark:
        self = super().__new__(cls, "")
        self.loop, self.about = loop, about
        return self

    def __str__(self) -> str:
        return self  # `str()` of compiled code would make a plain text of it


@jinja2.pass_context
def _begins(_: jinja2.runtime.Context, item: object, loop: int) -> LoopMark:
    return LoopMark(loop, id(item))


# A filter that takes the context is not computed while a template is compiled, which would make a plain text of it.
@jinja2.pass_context
def _has_ended(_: jinja2.runtime.Context, loop: int) -> LoopMark:
    return LoopMark(loop, None)


LOOP_FILTERS: Mapping[str, Callable[..., LoopMark]] = {_BEGINS: _begins, _HAS_ENDED: _has_ended}
"""The filters that `mark_loops` calls."""


def mark_loops(template: jinja2.nodes.Template) -> None:
    """Put marks into the loops of a parsed template and behind them."""
    _mark_loops(template, count())


def _mark_loops(node: jinja2.nodes.Node, numbers: Iterator[int]) -> None:
    for _, value in node.iter_fields():
        if isinstance(value, jinja2.nodes.Node):
            _mark_loops(value, numbers)
        elif isinstance(value, list):
            for place in range(len(value) - 1, -1, -1):
                if not isinstance(value[place], jinja2.nodes.Node):
                    continue
                _mark_loops(value[place], numbers)
                if isinstance(value[place], jinja2.nodes.For) and isinstance(value[place].target, jinja2.nodes.Name):
                    value.insert(place + 1, _marked(value[place], next(numbers)))


def _marked(loop: jinja2.nodes.For, number: int) -> jinja2.nodes.Output:
    """Put the mark of a turn into the loop; the mark that belongs behind it."""
    item = jinja2.nodes.Name(cast("jinja2.nodes.Name", loop.target).name, "load")
    loop.body.insert(0, _output(item, _BEGINS, [jinja2.nodes.Const(number)], loop.lineno))
    return _output(jinja2.nodes.Const(number), _HAS_ENDED, [], loop.lineno)


def _output(value: jinja2.nodes.Expr, name: str, arguments: list[jinja2.nodes.Expr], line: int) -> jinja2.nodes.Output:
    output = jinja2.nodes.Output([jinja2.nodes.Filter(value, name, arguments, [], None, None)])
    return cast("jinja2.nodes.Output", output.set_lineno(line))


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation. `turns` are the spans that loops wrote for each message, those without text left out;
    `end` is where the last loop over messages ended, 0 if none was seen; `generated` is what `{% generation %}` holds.
    """

    text: str
    turns: Mapping[int, Sequence[Span]]
    end: int
    generated: Sequence[Span]

    @cached_property
    def written_spans(self) -> Sequence[tuple[int, int, int]]:
        """(first character, one past the last, message) of every span that holds more than blanks, in order."""
        spans = [(start, stop, number) for number, its in self.turns.items() for start, stop in its]
        return sorted(span for span in spans if self.text[span[0] : span[1]].strip())

    def as_json(self) -> dict[str, object]:
        """What `from_json` reads again."""
        turns = [(number, start, stop) for number, spans in self.turns.items() for start, stop in spans]
        return {"text": self.text, "turns": turns, "end": self.end, "generated": self.generated}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Rendering:
        """The rendering that `as_json` wrote."""
        turns: dict[int, list[Span]] = {}
        for number, start, stop in value["turns"]:
            turns.setdefault(number, []).append((start, stop))
        generated = [(start, stop) for start, stop in value["generated"]]
        return cls(value["text"], turns, value["end"], generated)


def rendering_of(pieces: Sequence[str], text: str, messages: Sequence[object], *, generation: bool) -> Rendering:
    """What the marks among the pieces of an output say about its text, of which the pieces are the parts.

    With `generation` the signs around what `{% generation %}` holds are taken out of the text and told as spans.
    """
    numbers = {id(message): number for number, message in enumerate(messages)}
    reader = _Reader(text, generation=generation)
    at = 0
    for piece in pieces:
        if not isinstance(piece, LoopMark):
            at += str.__len__(shown(piece))
        elif piece.about is None:
            reader.loop_ended(piece.loop, at)
        elif piece.about in numbers:
            reader.turn_begins(piece.loop, numbers[piece.about], at)
    return reader.rendering()


class _Reader:
    """Reads the marks of one output in their order. Places are given in the text with signs, kept in the one without.

    The work grows with the marks alone, however many turns stay open.
    """

    def __init__(self, text: str, *, generation: bool) -> None:
        self._text = text
        self._signs = _GENERATION_SIGNS.finditer(text) if generation else iter(())
        self._next_sign = next(self._signs, None)
        self._parts: list[str] = []
        self._read = self._removed = 0
        self._turns: dict[int, list[Span]] = {}
        self._generated: list[Span] = []
        self._generation_start: int | None = None
        self._end = 0
        self._open: list[tuple[int, int, int]] = []  # loop, message, where it begins
        self._open_of: Counter[int] = Counter()
        self._over_messages: set[int] = set()

    def turn_begins(self, loop: int, message: int, place: int) -> None:
        at = self._at(place)
        self._close(loop, at)
        self._open.append((loop, message, at))
        self._open_of[loop] += 1
        self._over_messages.add(loop)

    def loop_ended(self, loop: int, place: int) -> None:
        at = self._at(place)
        self._close(loop, at)
        if loop in self._over_messages:
            self._end = at

    def rendering(self) -> Rendering:
        self._at(len(self._text))
        self._parts.append(self._text[self._read :])
        return Rendering("".join(self._parts), self._turns, self._end, self._generated)

    def _close(self, loop: int, at: int) -> None:
        """End the open turns of the loop, and what was opened within them."""
        while self._open_of[loop]:
            other, message, start = self._open.pop()
            self._open_of[other] -= 1
            if at > start:
                self._turns.setdefault(message, []).append((start, at))

    def _at(self, place: int) -> int:
        """The place in the text without signs; those before it are taken out."""
        while (sign := self._next_sign) is not None and sign.start() < place:
            self._parts.append(self._text[self._read : sign.start()])
            self._generation_sign(sign.group(), sign.start() - self._removed)
            self._read = sign.end()
            self._removed += 1
            self._next_sign = next(self._signs, None)
        return place - self._removed

    def _generation_sign(self, sign: str, at: int) -> None:
        if sign == GENERATION_START:
            self._generation_start = at
        elif self._generation_start is not None:
            self._generated.append((self._generation_start, at))
            self._generation_start = None
