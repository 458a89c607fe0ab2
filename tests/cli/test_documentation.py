"""Pages that are generated are fresh, and tables written by hand agree with the code."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import qlora_hal
from qlora_hal.cli.application import VERBS
from qlora_hal.cli.reference import with_settings_table
from qlora_hal.config.fields import settings
from qlora_hal.errors.fault_catalogue import EXIT_STATUSES
from qlora_hal.report.run_file import RunRecord

DOCS = Path(qlora_hal.__file__).parent.parent / "docs"


def test_the_table_of_settings_is_the_schemas() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert page == with_settings_table(page)


def test_every_setting_says_in_a_sentence_what_it_does() -> None:
    assert [path for path, setting in settings().items() if not setting.description.endswith(".")] == []


def test_every_verb_and_exit_status_stands_in_the_page() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if not re.search(rf"(?m)^\| `{verb}\b", page)] == []
    table = page.partition("## Exit status")[2].partition("##")[0]
    assert {int(number) for number in re.findall(r"\b(\d+)\b(?=[^|]*\|[^|]*\|$)", table, flags=re.M)} >= {
        status for status in EXIT_STATUSES if status not in (129, 130, 143)
    }


def test_every_key_of_run_json_is_explained() -> None:
    page = (DOCS / "run-folder.md").read_text(encoding="utf-8")
    assert [item.name for item in fields(RunRecord) if f"`{item.name}`" not in page] == []
