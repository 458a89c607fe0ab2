"""`qlora-hal compare`: two runs side by side in the terminal, and on one page where it is asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qlora_hal.cli.arguments import Switch
from qlora_hal.errors import ConfigError, StorageError
from qlora_hal.errors.terminal_text import show, show_json, visible_line

if TYPE_CHECKING:
    from qlora_hal.report.comparison import Comparison

_WIDEST = 44


def compare(
    first: Annotated[Path, Parameter(help="The folder of a run.")],
    second: Annotated[Path, Parameter(help="The folder of another run.")],
    /,
    *,
    page: Annotated[
        Path | None, Parameter(help="Also write one HTML page with both curves, figures and settings.")
    ] = None,
    json: Annotated[bool, Switch, Parameter(help="Print as JSON.")] = False,
) -> int:
    """Compare two runs, also while they train: qlora-hal compare runs/a runs/b --page compare.html."""
    from qlora_hal.report.comparison import ComparedRun, compared
    from qlora_hal.run.identity import differing_settings

    if page is not None and page.exists():
        raise ConfigError(
            "QH-U07", f"{page} already exists.", where=str(page), fix="Choose another name, or remove the file."
        )
    runs = ComparedRun.read(first), ComparedRun.read(second)
    differing = differing_settings(runs[0].part("config"), runs[1].part("config"), apart_from=lambda key: False)
    comparison = compared(*runs, differing)
    if json:
        show_json(comparison.as_json())
    else:
        show(comparison_as_text(comparison))
    if page is not None:
        _write(page, comparison)
    return 0


def _write(page: Path, comparison: Comparison) -> None:
    from qlora_hal.files.output_path import write_whole
    from qlora_hal.report.comparison_page import render_comparison

    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_whole(page, render_comparison(comparison))
    except OSError as error:
        raise StorageError(
            "QH-S12", f"{page} cannot be written: {error.strerror}.", where=str(page), fix="Choose another path."
        ) from error
    show(f"wrote {page}", stream=sys.stderr)


def comparison_as_text(comparison: Comparison) -> str:
    """Figures, then settings that differ with their origin, then what else differs."""
    from qlora_hal.report.comparison_page import shown_value

    names = [str(run.folder) for run in comparison.runs]
    lines = _table([("", names[0], names[1]), *comparison.figures])
    lines += ["", "settings that differ:" if comparison.settings else "no setting differs"]
    lines += _table(
        [
            (
                item.path,
                *(f"{shown_value(value)}  ({origin})" for value, origin in zip(item.values, item.origins, strict=True)),
            )
            for item in comparison.settings
        ]
    )
    if comparison.resolved:
        lines += ["", "what they resolved to, where it differs:", *_table(list(comparison.resolved))]
    return "\n".join(lines)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    cells = [[_short(cell) for cell in row] for row in rows]
    widths = [max((len(row[column]) for row in cells), default=0) for column in range(3)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _short(text: str) -> str:
    text = visible_line(text)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."
