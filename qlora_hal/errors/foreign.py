"""Exceptions of other people's libraries, in words."""

from __future__ import annotations

import importlib.util
import sys


def told(error: BaseException) -> str:
    """A foreign exception in words. A library that leaves may have said why in what it caught before."""
    package = missing_package(error)
    missing = f" (the package {package} is not installed)" if package else ""
    return f"{type(error).__name__}: {error}{missing}"


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
