"""The record of architectures beside transformers, and the table that is made of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]


def architectures() -> dict[str, dict[str, Any]]:
    record = json.loads((ROOT / "docs" / "runs" / "architectures_torch.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = record["architectures"]
    return found


def architecture_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture_table", ROOT / "benchmarks" / "architecture_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recorded_architecture_is_equal_or_refused_in_a_dry_run() -> None:
    """`not built` is what transformers itself could not build or run at small sizes."""
    found = architectures()
    assert {name: one for name, one in found.items() if one["result"] not in ("equal", "refused", "not built")} == {}
    refused = [one for one in found.values() if one["result"] == "refused"]
    assert {one["by"] for one in refused} == {"dry run"}
    assert {one["code"] for one in refused} <= {"QH-M50", "QH-M51"}


def test_the_page_holds_the_table_of_the_records() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert architecture_table().table() in page
