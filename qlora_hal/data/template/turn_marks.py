"""Where each message stands in a rendered conversation, told by the template's own loops.

A template writes its turns in a loop over messages. Each loop is compiled with marks: one where a turn of the loop
begins, with the object it is about, and one where the loop ends. What stands between is what the template wrote for
that message, however it rewrites, moves or leaves out. While the template runs, a mark is a text without length, so
that a template sees and writes the same as without; marks of loops inside macros and captured blocks are gone when
their text is joined. Those that reach the output are written into it as signs, and taken out again with what they say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import cast

import jinja2
import jinja2.nodes
import jinja2.runtime

from qlora_hal.data.template.sandbox import GENERATION_END, GENERATION_START

Span = tuple[int, int]
"""Characters from the first to one past the last."""

# A template cannot name a filter with a space in it.
_BEGINS, _HAS_ENDED = "loop begins a turn", "loop has ended"
_SIGN = "\ufdda{}:{}\ufddb"
_SIGNS = re.compile(f"\ufdda(\\d+):(\\d*)\ufddb|[{GENERATION_START}{GENERATION_END}]")


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


def with_signs(pieces: Sequence[str], messages: Sequence[object]) -> list[str]:
    """The pieces of an output with marks as signs that hold the number of a message."""
    numbers = {id(message): number for number, message in enumerate(messages)}
    return [_sign(piece, numbers) if isinstance(piece, LoopMark) else piece for piece in pieces]


def _sign(mark: LoopMark, numbers: Mapping[int, int]) -> str:
    if mark.about is None:
        return _SIGN.format(mark.loop, "")
    # Other objects need no sign: only what messages are about is asked for.
    return _SIGN.format(mark.loop, numbers[mark.about]) if mark.about in numbers else ""


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered conversation. `turns` are the spans that loops wrote for each message, those without text left out;
    `end` is where the last loop over messages ended, 0 if none was seen; `generated` is what `{% generation %}` holds.
    """

    text: str
    turns: Mapping[int, Sequence[Span]]
    end: int
    generated: Sequence[Span]


def rendering_of(signed: str) -> Rendering:
    """What the signs in an output say, and the text without them."""
    reader = _SignReader()
    parts: list[str] = []
    at = read = 0
    for match in _SIGNS.finditer(signed):
        parts.append(signed[read : match.start()])
        at += match.start() - read
        read = match.end()
        if match.group(1) is None:
            reader.generation(match.group(), at)
        else:
            reader.loop(int(match.group(1)), match.group(2), at)
    parts.append(signed[read:])
    return Rendering("".join(parts), reader.turns, reader.end, reader.generated)


class _SignReader:
    def __init__(self) -> None:
        self.turns: dict[int, list[Span]] = {}
        self.generated: list[Span] = []
        self.end = 0
        self._open: list[tuple[int, int, int]] = []  # loop, message, where it begins
        self._over_messages: set[int] = set()
        self._generation_start: int | None = None

    def loop(self, loop: int, message: str, at: int) -> None:
        while any(other == loop for other, _, _ in self._open):
            _, number, start = self._open.pop()
            if at > start:
                self.turns.setdefault(number, []).append((start, at))
        if message:
            self._open.append((loop, int(message), at))
            self._over_messages.add(loop)
        elif loop in self._over_messages:
            self.end = at

    def generation(self, sign: str, at: int) -> None:
        if sign == GENERATION_START:
            self._generation_start = at
        elif self._generation_start is not None:
            self.generated.append((self._generation_start, at))
            self._generation_start = None
