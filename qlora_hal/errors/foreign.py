"""Exceptions of other people's libraries, in words."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from itertools import dropwhile
from pathlib import Path

_LONGEST_WORDS = 300


def told(error: BaseException) -> str:
    """A foreign exception in words. A library that leaves may have said why in what it caught before."""
    package = missing_package(error)
    missing = f" (the package {package} is not installed)" if package else ""
    return f"{type(error).__name__}: {error}{missing}"


def place_in_plugin(error: BaseException) -> str:
    """`FILE, line N` where a plugin raised it, or where its syntax is wrong; empty where none of its code was run."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    last = next(reversed(list(_frames_of_plugin(error))), None)
    return f"{last.filename}, line {last.lineno}" if last else ""


def traceback_in_plugin(error: BaseException) -> str:
    """The traceback from where a plugin's code begins: what its author needs, without the import machinery and us."""
    lines = traceback.format_list(list(_frames_of_plugin(error))) + traceback.format_exception_only(error)
    return "".join(lines).rstrip()


def _frames_of_plugin(error: BaseException) -> Iterator[traceback.FrameSummary]:
    return dropwhile(_is_ours_or_of_imports, traceback.extract_tb(error.__traceback__))


def _is_ours_or_of_imports(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith((f"{_CORE}{os.sep}", f"{_IMPORTLIB}{os.sep}", "<frozen importlib"))


_CORE, _IMPORTLIB = Path(__file__).parents[1], Path(importlib.util.__file__).parent


def missing_package(error: BaseException) -> str:
    """The top-level package whose import failed on the way to this exception; empty where none did, and for a module
    that a package which is there does not have."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, ModuleNotFoundError) and link.name and not _is_installed(link.name.partition(".")[0]):
            return link.name.partition(".")[0]
        link = link.__cause__ or link.__context__
    return ""


def _is_installed(package: str) -> bool:
    try:
        return package in sys.modules or importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def first_words(text: str) -> str:
    """Of what another library says the first line, and the next one where that only leads to it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason was given"]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:_LONGEST_WORDS]
