"""What libraries log and warn of holds texts of strangers, too: a value out of config.json, a name of a file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qlora_hal.errors.terminal_text import visible


class _VisibleRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return visible(super().getMessage())


@contextmanager
def foreign_output_visible() -> Iterator[None]:
    """For the whole of a command: control characters in log messages and warnings are shown as escapes, whichever
    library's handler prints them."""
    factory, formatted = logging.getLogRecordFactory(), warnings.formatwarning

    def visibly_formatted(*arguments: Any, **more: Any) -> str:
        return visible(formatted(*arguments, **more))

    logging.setLogRecordFactory(_VisibleRecord)
    warnings.formatwarning = visibly_formatted
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = formatted
