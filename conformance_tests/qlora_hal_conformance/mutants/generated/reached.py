"""Which statements an honest private copy reaches, told by the copy itself as it reaches them.

Each statement is preceded by a call that writes its place down the first time, at once: a child that is killed leaves
what it saw.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from .sources import MODULES

REACHED_VARIABLE = "QLORA_HAL_REACHED_STATEMENTS"
"""Names the file that is added to, for all processes of a run."""

_NOTE = "__reached__"
_SHORT = {name: short for short, name in MODULES.items()}

Places = frozenset[tuple[str, int]]
"""(short name of a module, line of a statement)"""


def noting(tree: ast.Module, original: str) -> ast.Module:
    """A module that notes each of its statements in the file that the environment names."""
    short = _SHORT.get(original)
    if short is None:
        return tree
    for node in list(ast.walk(tree)):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                setattr(node, field, list(_noted(statements, short)))
    start = next(n for n, statement in enumerate(tree.body) if not _must_be_first(statement))
    tree.body[start:start] = ast.parse(f"from {__name__} import note as {_NOTE}").body
    return ast.fix_missing_locations(tree)


def _noted(statements: Iterable[ast.stmt], short: str) -> Iterable[ast.stmt]:
    for statement in statements:
        if not _must_be_first(statement):
            yield from ast.parse(f"{_NOTE}({short!r}, {statement.lineno})").body
        yield statement


def _must_be_first(statement: ast.stmt) -> bool:
    """A docstring, or an import from the future."""
    is_future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
    return is_future or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))


def _note_once() -> Callable[[str, int], None]:
    seen: set[tuple[str, int]] = set()

    def note(short: str, line: int) -> None:
        if (short, line) not in seen:
            seen.add((short, line))
            with open(os.environ[REACHED_VARIABLE], "a", encoding="utf-8") as file:
                file.write(f"{short} {line}\n")

    return note


note = _note_once()


def read_places(path: Path) -> Places:
    """What all processes of a run wrote."""
    pairs = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return frozenset((short, int(line)) for short, line in pairs)
