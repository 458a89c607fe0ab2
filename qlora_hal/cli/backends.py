"""`qlora-hal backends`: what is installed, and whether it can run here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qlora_hal.errors.terminal_text import show, show_json

if TYPE_CHECKING:
    from qlora_hal.contract.backend import ProbeReport


def backends(
    *, json: Annotated[bool, Parameter(help="Print the reports as JSON.", negative="", show_default=False)] = False
) -> int:
    """List the backends: name, state, devices or the reason, and what to do; and the weight formats that are refused.
    Imports no tensor library."""
    from qlora_hal import api
    from qlora_hal.formats.catalogue import third_parties

    reports = api.backends()
    if json:
        show_json([report.as_json() for report in reports])
    else:
        show(reports_as_text(reports))
        for error in third_parties().refused.values():
            show(f"{error.message}\n  fix: {error.fix}")
    return 0


def reports_as_text(reports: Sequence[ProbeReport]) -> str:
    """Two lines for a backend that cannot run, one for the others; the ready ones first."""
    if not reports:
        return "No backend is installed."
    wide = max(len(report.backend) for report in reports)
    lines: list[str] = []
    for report in sorted(reports, key=lambda report: not report.ready):
        state = report.availability.value.replace("_", " ")
        about = ", ".join(report.devices) if report.ready and report.devices else report.reason
        lines.append(f"{report.backend:<{wide}}  {state:<15}  {about}".rstrip())
        if not report.ready and report.fix:
            lines.append(f"{'':<{wide}}  {'':<15}  fix: {report.fix}")
    return "\n".join(lines)
