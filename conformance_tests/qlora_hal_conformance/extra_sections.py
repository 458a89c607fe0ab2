"""Sections that plugins add: run after the certificate's own, in a process of their own, and never counted.

A plugin offers folders or files through the hook `qlora_hal_conformance_sections`. Two files may not share a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import pluggy

from qlora_hal import hooks
from qlora_hal_conformance.counting import count
from qlora_hal_conformance.journal import Journal
from qlora_hal_conformance.request import Request
from qlora_hal_conformance.running import Progress, run_cases
from qlora_hal_conformance.verdicts import CaseResult


def offered_sections(note: Callable[[str], None]) -> tuple[Path, ...]:
    """Every existing path that a plugin offers. A plugin that fails is named and left out."""
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    paths: list[Path] = []
    for point in entry_points(group=hooks.ENTRY_POINT_GROUP):
        try:
            manager.register(point.load(), name=point.name)
            manager.check_pending()
            [offered] = manager.hook.qlora_hal_conformance_sections() or [()]
            paths += [Path(path) for path in offered]
        except (Exception, SystemExit) as error:
            note(f"the extra sections of {point.name} are left out: {type(error).__name__}: {error}")
        finally:
            if manager.has_plugin(point.name):
                manager.unregister(name=point.name)
    return tuple(path for path in paths if path.exists())


def run_extra(request: Request, sections: Sequence[Path], progress: Progress) -> list[CaseResult]:
    """Run a plugin's sections with the same fixtures and verdicts."""
    extra = replace(request, extra=True, done=())
    run_cases(extra, progress, sections=tuple(sections))
    journal = Journal(extra.journal_path)
    collected: list[str] = []
    for event in journal.read():
        cases = event.get("cases")
        if event["event"] == "collected" and isinstance(cases, list):
            collected = collected or [str(case) for case in cases]
    return list(count(journal, collected).results)
