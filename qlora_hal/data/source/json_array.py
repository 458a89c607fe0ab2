"""The elements of one JSON array, one by one, from a file of any size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TextIO

from qlora_hal.data.source.json_text import decoded_from


class ArrayFault(ValueError):
    """Text that is no JSON array: `reason` at `line` and `column`, from 1; `too_long` when one element is too large."""

    def __init__(self, reason: str, line: int, column: int, *, too_long: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.line, self.column, self.too_long = reason, line, column, too_long


def array_elements(
    stream: TextIO, limits: tuple[int, int], describe: Callable[[json.JSONDecodeError], str]
) -> Iterator[tuple[int, object]]:
    """(line of its first character, value) of each element; `limits` are the characters and the values of one.

    Raises ArrayFault, after which nothing can be read: where the next element begins cannot be known.
    """
    text = _SlidingText(stream, limits, describe)
    text.take("[")
    if text.peek() != "]":
        while True:
            text.peek()
            yield text.line, text.element()
            if text.take(",]") == "]":
                break
            if text.peek() == "]":
                raise text.fault("a comma precedes the end of the list")
    else:
        text.take("]")
    if text.peek():
        raise text.fault("something follows the end of the list")


class _SlidingText:
    """The part of the file that is being decoded; grows until an element is whole."""

    def __init__(
        self,
        stream: TextIO,
        limits: tuple[int, int],
        describe: Callable[[json.JSONDecodeError], str],
    ) -> None:
        self._stream, self._limits, self._describe = stream, limits, describe
        self._text, self._at = "", 0
        self.line, self._column = 1, 1

    def fault(self, reason: str, ahead: int = 0) -> ArrayFault:
        line, column = self._place(self._at + ahead)
        return ArrayFault(reason, line, column)

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            rest = self._text[self._at : self._at + 4096]
            blank = len(rest) - len(rest.lstrip(" \t\r\n"))
            self._advance(blank)
            if blank < len(rest):
                return self._text[self._at]
            if self._at == len(self._text) and not self._refill(2**20):
                return ""

    def take(self, expected: str) -> str:
        sign = self.peek()
        if not sign or sign not in expected:
            raise self.fault(f"{' or '.join(expected)} was expected")
        self._advance(1)
        return sign

    def element(self) -> object:
        while True:
            try:
                value, end = decoded_from(self._text, self._at)
            except json.JSONDecodeError as error:
                held = len(self._text) - self._at
                longest, most_values = self._limits
                if held > longest or (held > most_values and self._values_held() > most_values):
                    raise ArrayFault("too long", self.line, self._column, too_long=True) from error
                ahead = error.pos - self._at
                # Doubling keeps the repeated decoding linear in the size of the element.
                if not self._refill(max(2**20, held)):
                    raise self.fault(self._describe(error), ahead) from error
            except (ValueError, RecursionError) as error:
                raise self.fault(str(error).split(";")[0]) from error
            else:
                self._advance(end - self._at)
                return value

    def _values_held(self) -> int:
        return sum(self._text.count(sign, self._at) for sign in ",[{")

    def _refill(self, count: int) -> bool:
        more = self._stream.read(count)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def _place(self, at: int) -> tuple[int, int]:
        passed = self._text[self._at : at]
        lines = passed.count("\n")
        return self.line + lines, (len(passed) - passed.rfind("\n")) if lines else self._column + len(passed)

    def _advance(self, count: int) -> None:
        self.line, self._column = self._place(self._at + count)
        self._at += count
