"""Records of hunts, as JSON that a reader may compare line by line."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path

from qlora_hal_conformance import SUITE_VERSION
from qlora_hal_conformance.catalogue import suite_hash


def stamp(command: str) -> dict[str, object]:
    """What each record begins with: the command, the day, and the suite that hunted."""
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"command": command, "day": day, "suite": {"version": SUITE_VERSION, "sha256": suite_hash()}}


def write_record(path: Path, record: Mapping[str, object]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(path: Path) -> Mapping[str, object] | None:
    """None where there is none yet."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(record, dict), path
    return record
