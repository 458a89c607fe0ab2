"""How `--help` lays options out: descriptions beside the names where these fit, below them where they do not. A name is
what a user copies, so it is never broken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cyclopts.help import ColumnSpec, DefaultFormatter, DescriptionRenderer, HelpEntry
from cyclopts.help.specs import AsteriskColumn

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

NAMES_SHARE = 0.4
"""The part of a line that names may take before descriptions move below them."""


def help_formatter() -> DefaultFormatter:
    return DefaultFormatter(column_specs=_columns)


def _columns(console: Console, options: ConsoleOptions, entries: list[HelpEntry]) -> tuple[ColumnSpec, ...]:
    widest = max((len(_names(entry)) for entry in entries), default=0)
    if widest > console.width * NAMES_SHARE:
        return (ColumnSpec(renderer=_name_above_description, header="Option", overflow="fold"),)
    names = ColumnSpec(renderer=_names, header="Option", style="cyclopts.name", no_wrap=True)
    described = ColumnSpec(renderer=DescriptionRenderer(), header="Description", overflow="fold")
    return (AsteriskColumn, names, described) if any(entry.required for entry in entries) else (names, described)


def _names(entry: HelpEntry) -> str:
    return " ".join(entry.display_labels_with_metavar)


def _name_above_description(entry: HelpEntry) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    description: Any = DescriptionRenderer()(entry)
    return Group(Text(_names(entry), style="cyclopts.name", overflow="fold"), Padding(description, (0, 0, 0, 4)))
