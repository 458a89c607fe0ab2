"""What the sections really hold, to compare with the catalogue."""

from __future__ import annotations

import tempfile
from dataclasses import replace

from qlora_hal_conformance.journal import Journal
from qlora_hal_conformance.request import Request
from qlora_hal_conformance.running import run_cases
from qlora_hal_conformance.subject import Reference


def collected_cases() -> list[str]:
    """Every case id that pytest finds in the sections, in order; no backend is opened."""
    with tempfile.TemporaryDirectory(prefix="qlora-hal-conformance-", ignore_cleanup_errors=True) as folder:
        request = replace(Request(Reference(), 0, folder), collect_only=True)
        run_cases(request, lambda event: None)
        for event in Journal(request.journal_path).read():
            cases = event.get("cases")
            if event["event"] == "collected" and isinstance(cases, list):
                return [str(case) for case in cases]
    return []
