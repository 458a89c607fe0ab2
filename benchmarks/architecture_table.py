"""The table of docs/models.md, from the records under docs/runs: one column to a family of backends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUNS = Path(__file__).parents[1] / "docs" / "runs"
START, END = "<!-- the table: generated -->", "<!-- end of the table -->"
COLUMNS = {"torch family": "architectures_torch.json"}
"""Title of a column -> its record; a record maps `architectures` to `result`, and to `why` and `by` of a refusal."""


def write_table(page: Path) -> None:
    """Put the table between its two marks."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    page.write_text(f"{before}{START}\n\n{table()}\n\n{END}{after}", encoding="utf-8")


def table() -> str:
    """Markdown: every architecture of every record, and what became of it."""
    records = {title: _architectures(name) for title, name in COLUMNS.items() if (RUNS / name).exists()}
    names = sorted({name for record in records.values() for name in record})
    lines = [f"| `model_type` | {' | '.join(records)} |", f"|---|{'---|' * len(records)}"]
    lines += [f"| `{name}` | {' | '.join(_cell(record.get(name)) for record in records.values())} |" for name in names]
    return "\n".join(lines)


def _architectures(name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((RUNS / name).read_text(encoding="utf-8"))["architectures"]
    return found


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if found["result"] != "equal":
        stage = f", found at {found['by']}" if found.get("by") == "load" else ""
        return f"{found['result']}{stage}: {_short(found.get('why', ''))}".replace("|", "\\|")
    words = ["trains"]
    if found.get("packing", "yes") != "yes":
        words.append("no packed rows")
    if found.get("head") == "whole forward pass":
        words.append("logits made whole")
    return ", ".join(words)


def _short(why: str) -> str:
    """A reason without the names of one checkpoint."""
    first = why.partition(" (model.")[0].partition("; tensors are read")[0].rstrip(".")
    return first.partition(" (")[0] if "joins or splits" in first else first
