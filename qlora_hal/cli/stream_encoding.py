"""Text that the encoding of standard output cannot hold: written as JSON writes it in ASCII, never an error.

Rows, paths and answers hold any sign there is, and a pipe in the C locale takes ASCII alone. The escapes are those of
JSON, so that what `--json` prints stays JSON with the same values.
"""

from __future__ import annotations

import codecs
import io
import sys

_NAME = "qlora_hal.json_escapes"


def escape_what_streams_cannot_hold() -> None:
    """Let standard output and standard error escape what their encodings cannot hold."""
    codecs.register_error(_NAME, _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_NAME)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4)), error.end
