"""Jinja's sandbox with bounds on size and time, and the functions that chat templates expect.

All that a template makes is measured: texts, collections, what a loop writes. What one step could make without bound
(`replace`, `join`, formats, repetition) is estimated first; what no chat template needs and could (padding to a width,
wrapping) is taken away.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import re
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from datetime import date
from typing import Any, TypeVar

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

SIZE_FLOOR, SIZE_FACTOR, SIZE_FACTOR_PER_TURN = 2**24, 256, 4
"""A rendering may make 16 Mi characters in all, and its input some hundred times over, a few times more at each turn:
templates collect texts and look through all messages at every message. What is published uses up to a fifteenth."""

SECONDS_OF_FLOOR, SECONDS_FACTOR, SECONDS_FACTOR_PER_TURN = 1.75, 2e-6, 4e-7
"""Processor time of a rendering, and what each character of the input adds to it, and each turn for each character."""

QUICK_SIZE, QUICK_SIZE_FACTOR, QUICK_SECONDS, QUICK_SECONDS_FACTOR = 2**20, 64, 0.1, 2e-6
"""What a quick rendering may make and take, and what each character of its input adds. What is published uses a tenth
of it; whatever needs more is rendered again elsewhere, with the limits above."""

TEMPLATE_DATE = date(2024, 7, 26)
"""What `strftime_now` tells: one fixed day (the one that Llama 3.2's template falls back to), for a run that renders
the date of its preparation cannot be repeated."""

GENERATION_START, GENERATION_END = "\ufdd3", "\ufdd4"
"""Unicode noncharacters around what a template encloses in `{% generation %}`."""

_ENTRY_SIZE = _STEP_SIZE = 16
_MOST_BITS = 2**14
"""Of a whole number: beyond, one division can take seconds."""
_WIDEST, _DEEPEST = 9999, 1000  # digits of a format's width; levels that Python's recursion allows
_WIDE = {"%": re.compile(r"\d{5}|%[-#0 +\d.]*\*"), "{": re.compile(r"\d{5}|\{[^{}]*\{")}
"""A width of five digits or one that an argument gives, in both kinds of format."""
_NO_METHODS = frozenset({"center", "encode", "expandtabs", "ljust", "rjust", "to_bytes", "translate", "zfill"})
_NO_FILTERS = ("batch", "center", "pprint", "random", "slice", "urlize", "wordwrap")
_QUICK_FILTERS = {
    "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "indent", "int", "items",
    "join", "last", "length", "list", "lower", "map", "reject", "rejectattr", "replace", "round", "safe", "select",
    "selectattr", "string", "title", "tojson", "trim", "upper",
}  # fmt: skip
_QUICK_METHODS = {
    "capitalize", "endswith", "find", "isdigit", "join", "lower", "lstrip", "replace", "rstrip", "split",
    "startswith", "strip", "title", "upper",
}  # fmt: skip
_QUICK_METHODS_OF_MAPPINGS = frozenset({"get", "items", "keys", "values"})
_QUICK_ARGUMENT = 64  # characters: `strip` compares each of a text with each of its argument
_PART_SIZE = 64  # bytes of a text of its own
_OF_COMPILER = ("_loop_vars", "_block_vars")
_NO_GLOBALS = ("lipsum", "cycler", "joiner")

_COLLECTIONS = (list, tuple, Mapping, KeysView, ValuesView, ItemsView)

_Value = TypeVar("_Value")


class TooMuch(Exception):
    """A template went beyond a limit; the message says which, to follow "The chat template NAME"."""


class TemplateFault(Exception):
    """A template that is none, or that refused or failed on what it was given."""


class Looked(Exception):
    """The template did more with a stand-in than to join or strip it."""


class StandIn(str):
    """A text in place of another, `_shown`: templates join it by `+`, for its own characters mean nothing."""

    __slots__ = ("_shown",)
    _shown: str

    def tell(self, *, looked: bool, asked: bool) -> None:
        """Note what another process did with a copy: whether it looked at it, and asked whether it is empty."""


def shown(text: str) -> str:
    """The text itself, or what stands for another."""
    return text._shown if isinstance(text, StandIn) else text


def size_of(value: object, most: float = math.inf) -> int:
    """Characters of a text, bits of a whole number; of a collection, 16 for each entry and the entries' own sizes.

    An entry counts as often as it is met, as it would be written. Counting ends above `most`.
    """
    size, waiting = 0, [value]
    while waiting and size <= most:
        item = waiting.pop()
        if isinstance(item, str):
            size += str.__len__(item)
        elif isinstance(item, int):
            size += item.bit_length()
        elif isinstance(item, range):
            size += _ENTRY_SIZE * len(item)
        elif isinstance(item, _COLLECTIONS):
            size += _ENTRY_SIZE * len(item)
            if size <= most:
                waiting.extend(item)
                waiting.extend(item.values() if isinstance(item, Mapping) else ())
    return size


def seconds_allowed(given: int, turns: int) -> float:
    """Processor time of a rendering whose input has the size `given` and so many messages."""
    return SECONDS_OF_FLOOR + given * (SECONDS_FACTOR + SECONDS_FACTOR_PER_TURN * turns)


@dataclass(slots=True)
class _Left:
    """What a rendering may still use."""

    size: int = SIZE_FLOOR
    seconds: float = math.inf
    until: float = math.inf


class _Current(threading.local):
    """The rendering of each thread; while a template is compiled, there is none yet."""

    def __init__(self) -> None:
        self.left = _Left()


class _Compiler(jinja2.compiler.CodeGenerator):
    """Writes the calls that measure what no method of the environment sees: literals, slices, `~`, comparisons, turns
    of loops."""

    def visit(self, node: jinja2.nodes.Node, *args: Any, **kwargs: Any) -> None:
        if isinstance(node, jinja2.nodes.For):
            _measure_turns(node)
        if not _is_measured(node):
            super().visit(node, *args, **kwargs)
            return
        self.write("environment.made(")
        super().visit(node, *args, **kwargs)
        self.write(")")

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        self.write("environment.concat([str(part) for part in ")
        self.visit(jinja2.nodes.Tuple(node.nodes, "load"), frame)
        self.write("])")

    def visit_ExprStmt(self, node: jinja2.nodes.ExprStmt, frame: jinja2.compiler.Frame) -> None:
        self.newline(node)
        self.write("environment.made(")
        self.visit(node.node, frame)
        self.write(")")


def _is_measured(node: jinja2.nodes.Node) -> bool:
    """Whether a node makes a collection, or compares: what no method of the environment sees."""
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, jinja2.nodes.Slice)
    if isinstance(node, jinja2.nodes.Tuple):
        return node.ctx == "load"
    return isinstance(node, jinja2.nodes.List | jinja2.nodes.Dict | jinja2.nodes.Compare)


def _measure_turns(loop: jinja2.nodes.For) -> None:
    """Have each turn, taken or filtered out, count the text that stands in the loop."""
    literal = jinja2.nodes.Const("".join(piece.data for piece in loop.find_all(jinja2.nodes.TemplateData)))
    loop.body.insert(0, jinja2.nodes.ExprStmt(literal, lineno=loop.lineno))
    if loop.test is not None:
        counted = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute("count_turn"), [literal], [], None, None)
        loop.test = jinja2.nodes.And(counted, loop.test)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Templates compiled here can reach nothing but what they are given, and raise TooMuch beyond the limits.

    A `quick` one takes only steps whose time grows with their input and is bounded with it, and far less of everything:
    it may run in this process. Trimming and the loop controls are what transformers renders with.
    """

    code_generator_class = _Compiler
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, *, quick: bool = False) -> None:
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self.made)
        self._current = _Current()
        self._quick = quick
        self.filters["tojson"] = self._to_json
        self.filters["format"] = self._format
        for name in _NO_FILTERS:
            del self.filters[name]
        for name, function in self.filters.items():
            self.filters[name] = self._measured(name, function)
        for name, test in self.tests.items():
            self.tests[name] = self._measured(f"is {name}", test)  # type: ignore[arg-type]  # jinja2 types them as plain functions
        for name in _NO_GLOBALS:
            del self.globals[name]
        self.globals.update(raise_exception=_raise_exception, strftime_now=TEMPLATE_DATE.strftime, namespace=_Namespace)

    def begin(self, given: int, turns: int) -> None:
        """Start a rendering of this thread; `given` is the size of its input."""
        if self._quick:
            size, seconds = QUICK_SIZE + given * QUICK_SIZE_FACTOR, QUICK_SECONDS + given * QUICK_SECONDS_FACTOR
        else:
            size = SIZE_FLOOR + given * (SIZE_FACTOR + SIZE_FACTOR_PER_TURN * turns)
            seconds = seconds_allowed(given, turns)
        self._current.left = _Left(size, seconds, time.thread_time() + seconds)

    def made(self, value: _Value) -> _Value:
        """The value, its size counted and the step that made it. Raises TooMuch."""
        left = self._current.left
        size = str.__len__(value) if isinstance(value, str) else size_of(value, left.size)
        left.size -= size + _STEP_SIZE
        if left.size < 0:
            raise _beyond_size()
        if isinstance(value, int) and size > _MOST_BITS:
            raise _beyond_bits()
        if time.thread_time() > left.until:
            raise TooMuch(f"runs longer than {left.seconds:.3g} seconds")
        return value

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.made(None)  # the path of an attribute can have thousands of parts
        return super().getitem(obj, argument)

    def count_turn(self, literal: str) -> bool:
        """Count a turn of a loop and the text that stands in it; always true. Raises TooMuch."""
        self.made(literal)
        return True

    @staticmethod
    def concat(pieces: Sequence[str]) -> str:  # type: ignore[override]
        """The pieces joined, stand-ins among them by their own `+`; jinja2 joins all output through this."""
        if any(isinstance(piece, StandIn) for piece in pieces):
            return functools.reduce(operator.add, pieces, "")
        return "".join(pieces)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _NO_METHODS and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self._refuse_wide_format(left, "%", right)
        elif operator == "*":
            self._refuse_above_left(max(_repeated(left, right), _repeated(right, left)))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._refuse_above_left(left.bit_length() * right)
            if left.bit_length() * right > _MOST_BITS:
                raise _beyond_bits()
        return self.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        name, owner = getattr(__obj, "__name__", ""), getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if __self._quick and not __self._is_quick(__obj, name, owner, args):
            raise TooMuch(f"calls {name}")
        if isinstance(owner, str):
            if name in ("format", "format_map"):
                given = [value for key, value in kwargs.items() if key not in _OF_COMPILER]
                __self._refuse_wide_format(owner, "{", [*args, *given])
            elif name == "replace":
                __self._refuse_above_left(_replaced(owner, *args))
            elif name == "split":
                __self._refuse_above_left(_split(owner, *args[:1]))
            elif name == "join":
                args = tuple(map(_at_hand, args))
                __self._refuse_above_left(sum(_joined(values, owner) for values in args))
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def _is_quick(self, function: Any, name: str, owner: object, args: tuple[Any, ...]) -> bool:
        """Whether a call ends soon: those of macros and of our own, and of methods that go once over their text."""
        if isinstance(owner, str):
            short = all(str.__len__(arg) <= _QUICK_ARGUMENT for arg in args if isinstance(arg, str))
            return name in _QUICK_METHODS and (short or not name.endswith("strip"))
        if isinstance(owner, Mapping):
            return name in _QUICK_METHODS_OF_MAPPINGS
        if function is self.globals["strftime_now"]:
            return all(str.__len__(arg) <= _QUICK_ARGUMENT for arg in args if isinstance(arg, str))
        ours = (self.globals[known] for known in ("range", "namespace", "raise_exception"))
        is_ours = any(function is known for known in ours) or isinstance(owner, _Generation) or name == "count_turn"
        return is_ours or isinstance(function, jinja2.runtime.Macro)

    def _measured(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        estimate = _ESTIMATES.get(name)
        passed = 1 if hasattr(function, "jinja_pass_arg") else 0
        is_quick = name in _QUICK_FILTERS or name.startswith("is ")

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            if self._quick and not is_quick:
                raise TooMuch(f"uses {name}")
            if estimate is not None:
                args = (*args[:passed], *map(_at_hand, args[passed:]))
                self._refuse_above_left(estimate(*args[passed:], **kwargs))
            return self.made(function(*args, **kwargs))

        return measured

    def _refuse_above_left(self, size: int) -> None:
        if size > self._current.left.size:
            raise _beyond_size()

    def _refuse_wide_format(self, form: str, sign: str, values: object) -> None:
        if _WIDE[sign].search(form.replace("{{", "")):
            raise TooMuch(f"pads a string to more than {_WIDEST} characters")
        self._refuse_above_left(str.__len__(form) + form.count(sign) * (_WIDEST + size_of(values)))

    def _format(self, form: object, *args: object, **kwargs: object) -> Any:
        text = str(form)
        self._refuse_wide_format(text, "%", kwargs or args)
        return text % (kwargs or args)

    def _to_json(
        self,
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML signs, which models were not trained on.
        settings: dict[str, Any] = {"ensure_ascii": ensure_ascii, "separators": separators, "sort_keys": sort_keys}
        if indent is None and separators is None:
            return json.dumps(value, **settings)
        self._refuse_above_left(_DEEPEST * _width(indent))
        return "".join(map(self.made, json.JSONEncoder(indent=indent, **settings).iterencode(value)))


def _beyond_size() -> TooMuch:
    return TooMuch("does far more than its input could need")


def _beyond_bits() -> TooMuch:
    return TooMuch(f"counts with whole numbers of more than {_MOST_BITS} bits")


def _at_hand(value: object) -> object:
    return list(value) if isinstance(value, Iterator) else value


def _repeated(sequence: object, times: object) -> int:
    if isinstance(times, int) and isinstance(sequence, str | list | tuple):
        return size_of(sequence) * times
    return 0


def _replaced(text: object, old: object, new: object, count: object = None) -> int:
    text, old, new = (value if isinstance(value, str) else str(value) for value in (text, old, new))
    return str.__len__(text) + str.count(text, old) * str.__len__(new)


def _joined(values: object, between: object = "", attribute: object = None) -> int:
    count = str.__len__(values) if isinstance(values, str) else len(values) if isinstance(values, _COLLECTIONS) else 0
    return size_of(values) + count * size_of(between)


def _split(text: str, separator: object = None) -> int:
    parts = str.count(text, separator) if isinstance(separator, str) and separator else str.__len__(text) // 2
    return str.__len__(text) + _PART_SIZE * (parts + 1)


def _listed(value: object) -> int:
    return _PART_SIZE * str.__len__(value) if isinstance(value, str) else 0


def _indented(text: object, width: object = 4, first: object = False, blank: object = False) -> int:
    text = str(text)
    return str.__len__(text) + (1 + str.count(text, "\n")) * _width(width)


def _width(indent: object) -> int:
    return indent if isinstance(indent, int) else size_of(indent)


def _rounded(value: object, precision: object = 0, method: object = "") -> int:
    return 4 * precision if isinstance(precision, int) else 0  # bits of 10**precision


_ESTIMATES: Mapping[str, Callable[..., int]] = {
    "replace": _replaced,
    "join": _joined,
    "indent": _indented,
    "round": _rounded,
    "list": _listed,
}
"""What filters make at most, where that is not about the size of their input."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: what stands inside is enclosed in marks."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: jinja2.runtime.Macro) -> str:
        return GENERATION_START + str(caller()) + GENERATION_END


def encloses_generation(source: str) -> bool:
    """Whether a template encloses what the assistant says in `{% generation %}`. In the text of any other, the signs
    for it are text."""
    return "endgeneration" in source


class _Namespace(jinja2.utils.Namespace):
    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template may not store {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # what it holds could be itself, many times over


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
