"""Text as it may stand in a terminal: the one place that keeps control characters of strangers from acting there.

Rows, model files, file names and error texts of libraries are written by others; a terminal obeys what they hold: an
escape sequence moves the cursor, sets the title or fills the clipboard, a bidirectional override shows another order
than the file has. Such characters are shown as escapes. What a person reads (any script, emoji, new lines, tabs) stays.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import TextIO

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 without tab and new line, DEL, C1
    "\u2028\u2029\u202a-\u202e\u2066-\u2069"  # line separators, bidirectional embeddings, overrides, isolates
    "\ud800-\udfff]"  # halves of characters, which have no form in UTF-8
)


def visible(text: str) -> str:
    """The text with control characters as escapes (`\\x1b`, `\\u202e`); new lines and tabs stay."""
    return _UNSAFE.sub(_escape, text.replace("\r\n", "\n"))


def visible_line(text: str) -> str:
    """The text on one line: new lines and tabs are escapes, too."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def show(text: str, *, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print a text for a person; to the standard output when no stream is given."""
    print(visible(text), file=sys.stdout if stream is None else stream, end=end)


def show_json(value: object, *, default: Callable[[object], object] | None = None) -> None:
    """Print a value as one line of JSON on the standard output; what would act in a terminal is escaped there, too."""
    print(json_line(value, default=default))


def json_line(value: object, *, default: Callable[[object], object] | None = None) -> str:
    """The value as JSON on one line, without characters that act in a terminal; `default` as `json.dumps` has it."""
    text = json.dumps(value, default=default, ensure_ascii=False)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
