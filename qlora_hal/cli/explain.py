"""`qlora-hal explain`: what a code means and what to do."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from qlora_hal.errors import ConfigError
from qlora_hal.errors.fault_catalogue import EXIT_STATUSES, Fault, faults, find_fault
from qlora_hal.errors.terminal_text import show, show_json


def explain(
    code: Annotated[str | None, Parameter(help="A code such as QH-D05; without one, all are listed.")] = None,
    /,
    *,
    json: Annotated[bool, Parameter(help="Print as JSON.", negative="", show_default=False)] = False,
) -> int:
    """Explain a fault code, or list all of them."""
    if code is None:
        rows = [asdict(fault) for fault in faults().values()]
        listing = "\n".join(f"{fault.code}  {fault.title}" for fault in faults().values())
        if json:
            show_json(rows)
        else:
            show(listing)
        return 0
    fault = find_fault(code)
    if fault is None:
        raise _unknown(code)
    if json:
        show_json(asdict(fault))
    else:
        show(fault_as_text(fault))
    return 0


def fault_as_text(fault: Fault) -> str:
    status = f"{fault.exit_status} ({EXIT_STATUSES[fault.exit_status]})"
    rows = (("what", fault.happens), ("why", fault.why), ("do", fault.do), ("exit", status))
    return "\n".join([f"{fault.code}: {fault.title}", *(f"  {name + ':':<6}{text}" for name, text in rows)])


def _unknown(code: str) -> ConfigError:
    import difflib

    name = code.strip().upper()
    close = difflib.get_close_matches(name if name.startswith("QH-") else f"QH-{name}", faults(), n=3, cutoff=0.6)
    near = f" Similar codes: {', '.join(close)}." if close else ""
    return ConfigError(
        "QH-U06", f"{code} is not a fault code.{near}", where="command line", fix="Run qlora-hal explain for the list."
    )
