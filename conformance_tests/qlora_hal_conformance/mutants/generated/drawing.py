"""Which changes are tried: evenly over modules and operators, by a seed, none of which nobody could see anything."""

from __future__ import annotations

import ast
import importlib
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest

from .changes import changes_of, is_written_alike, makes_equal_code, statements_of, told
from .identity import Identity
from .private_copy import private_copy
from .reached import Places
from .sources import BACKEND, MODULES, source_of

ReachedBy = Mapping[str, Places]
"""Number of a section -> the statements that an honest backend reaches in it."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A change to try: where it stands, what it makes of the code, and the sections that get there."""

    identity: Identity
    within: str
    was: str
    becomes: str
    sections: tuple[str, ...]
    at_import: bool = False


def drawn(seed: int, reached_by: ReachedBy) -> Iterator[Drawn]:
    """All changes that can be seen, in the order in which they are tried: one of each module and operator, then the
    next of each. The first of a longer draw are those of a shorter one."""
    chance = random.Random(seed)
    groups: dict[tuple[str, str], list[Drawn]] = defaultdict(list)
    for module in MODULES:
        for change in _changes_reached(module, reached_by):
            groups[module, change.identity.operator].append(change)
    for group in groups.values():
        chance.shuffle(group)
    for one_of_each in zip_longest(*groups.values()):
        in_turn = [change for change in one_of_each if change is not None]
        chance.shuffle(in_turn)
        yield from (with_words(change) for change in in_turn if _can_be_seen(change))


def _changes_reached(module: str, reached_by: ReachedBy) -> Iterator[Drawn]:
    """What is at the top of a module is reached where something that reads it is."""
    tree = ast.parse(source_of(module))
    readers = _readers(tree)
    for change in changes_of(tree):
        lines = readers.get(change.place.statement, {change.place.statement})
        sections = tuple(
            section for section, places in reached_by.items() if any((module, line) in places for line in lines)
        )
        if sections:
            place = change.place
            yield Drawn(Identity(module, *change.where), place.within, "", "", sections, place.at_import)


def not_reached(reached_by: ReachedBy) -> Mapping[str, list[int]]:
    """By module the lines in functions that no section reaches: what stands there is not drawn, and not judged."""
    reached = frozenset[tuple[str, int]]().union(*reached_by.values())
    lines = {
        module: sorted(n for n in statements_of(ast.parse(source_of(module))) if (module, n) not in reached)
        for module in MODULES
    }
    return {module: numbers for module, numbers in lines.items() if numbers}


def _readers(tree: ast.Module) -> Mapping[int, set[int]]:
    """Line of a private constant at the top of a module -> lines of the statements that read it."""
    read_at: dict[str, set[int]] = defaultdict(set)
    for statement in ast.walk(tree):
        if isinstance(statement, ast.stmt) and not isinstance(statement, ast.FunctionDef | ast.ClassDef):
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    read_at[node.id].add(statement.lineno)
    return {statement.lineno: read_at[name] for statement in tree.body for name in _private_names(statement)}


def _private_names(statement: ast.stmt) -> list[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name) and target.id.startswith("_")]


def named(identity: Identity, reached_by: ReachedBy) -> Drawn:
    """One change by its identity. Raises LookupError for one that there is not."""
    found = (change for change in _changes_reached(identity.module, reached_by) if change.identity == identity)
    change = next(found, None)
    if change is None:
        raise LookupError(f"no section reaches {identity}, or there is no such change")
    return with_words(change)


def with_words(change: Drawn) -> Drawn:
    was, becomes = told(source_of(change.identity.module), change.identity.where)
    return replace(change, was=was, becomes=becomes)


def _can_be_seen(change: Drawn) -> bool:
    """Neither equal code, nor code with which nothing can be imported."""
    source, where = source_of(change.identity.module), change.identity.where
    if makes_equal_code(source, where) or is_written_alike(source, where):
        return False
    return not change.at_import or _can_be_imported(change.identity)


def _can_be_imported(identity: Identity) -> bool:
    copy = private_copy(str(identity))
    try:
        importlib.import_module(copy.name(f"{BACKEND}.trainer"))
    except Exception:
        return False
    finally:
        copy.forget()
    return True
