"""`qlora-hal doctor`: what is here, what can run, and whether it computes correctly. One fix for each finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qlora_hal.cli.arguments import Switch
from qlora_hal.cli.findings import Finding, Verdict
from qlora_hal.errors import figures
from qlora_hal.errors.terminal_text import show, show_json

if TYPE_CHECKING:
    from qlora_hal.contract.backend import ProbeReport
    from qlora_hal.detect.hardware import Machine

UNHEALTHY = 3
PROVE_SECONDS = 180.0


def doctor(
    *,
    backend: Annotated[str | None, Parameter(help="Check only this backend.")] = None,
    output_dir: Annotated[Path, Parameter(help="The folder where runs will be written.")] = Path("."),
    timeout: Annotated[float, Parameter(help="Time limit for each backend's self-test in seconds.")] = PROVE_SECONDS,
    json: Annotated[bool, Switch, Parameter(help="Print as JSON.")] = False,
) -> int:
    """Check the machine, and run the self-test of every ready backend. Exit 3 when one fails."""
    from qlora_hal import api
    from qlora_hal.cli.findings import disk_finding, memory_finding, storage_finding
    from qlora_hal.detect.discovery import find, listed
    from qlora_hal.detect.hardware import inventory

    if backend is not None:
        find(backend, listed())
    machine = inventory()
    reports = [report for report in api.backends() if backend in (None, report.backend)]
    findings = [
        *proofs(reports, timeout),
        storage_finding(output_dir),
        disk_finding(output_dir),
        memory_finding(machine.memory_available_bytes, machine.memory_pressure),
    ]
    if backend is None:
        findings.append(accelerator_finding(reports))
    status = exit_status(findings, chosen=backend)
    if json:
        show_json(_as_json(machine, reports, findings, status), default=str)
    else:
        show(as_text(machine, reports, findings))
    return status


def proofs(reports: Sequence[ProbeReport], timeout: float) -> list[Finding]:
    """One finding for each backend: what stands in its way, or what its proof said."""
    from qlora_hal.detect.self_test import self_test

    findings = []
    for report in reports:
        if report.ready:
            said = self_test(report.backend, timeout_seconds=timeout)
            findings.append(proof_finding(report.backend, said))
        else:
            verdict = Verdict.FAIL if report.availability.value in ("broken", "wrong_build") else Verdict.ABSENT
            findings.append(Finding(report.backend, verdict, report.reason, report.fix, is_backend=True))
    return findings


def proof_finding(backend: str, said: Mapping[str, object]) -> Finding:
    """A proof's mapping (`verdict`, `reason`, `fix`, `checks`) as a finding."""
    checks = said.get("checks")
    details = tuple(
        f"{check.get('name')}: {check.get('verdict')} {check.get('detail') or ''}".rstrip()
        for check in (checks if isinstance(checks, (list, tuple)) else ())
        if isinstance(check, Mapping)
    )
    return Finding(
        backend,
        Verdict(str(said.get("verdict", "fail"))),
        str(said.get("reason") or ""),
        str(said.get("fix") or ""),
        details,
        is_backend=True,
    )


def accelerator_finding(reports: Sequence[ProbeReport]) -> Finding:
    """Whether anything but the CPU is there."""
    from qlora_hal.detect.discovery import find, listed, load_spec
    from qlora_hal.detect.selection import has_accelerator

    entries = listed()
    ready = [report.backend for report in reports if report.ready]
    fast = [name for name in ready if has_accelerator(load_spec(find(name, entries)), reports)]
    if fast:
        return Finding("accelerator", Verdict.PASS, ", ".join(fast))
    if ready:
        text = f"none is ready; {', '.join(ready)} trains on the CPU, slowly and only when allowed"
        return Finding("accelerator", Verdict.WARN, text, "Pass --backend.allow_cpu, or apply one of the fixes above.")
    return Finding("accelerator", Verdict.FAIL, "no backend is ready", "Apply one of the fixes above.")


def exit_status(findings: Sequence[Finding], *, chosen: str | None) -> int:
    """3 when the chosen backend is not proved, or, without a choice, when any finding failed."""
    if chosen is not None and any(f.name == chosen and f.verdict is Verdict.ABSENT for f in findings):
        return UNHEALTHY
    return UNHEALTHY if any(f.verdict is Verdict.FAIL for f in findings) else 0


def as_text(machine: Machine, reports: Sequence[ProbeReport], findings: Sequence[Finding]) -> str:
    """The machine in a few lines, then a line for each finding with its fix below."""
    lines = machine_lines(machine)
    for report in reports:
        if report.ready and report.versions:
            versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
            lines.append(f"{report.backend}: {versions}")
        lines += [f"{report.backend}: {note}" for note in report.notes]
    lines.append("")
    wide = max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        lines.append(f"{finding.verdict.value:<6}  {finding.name:<{wide}}  {finding.text}".rstrip())
        lines += [f"{'':<6}  {'':<{wide}}  - {detail}" for detail in finding.details]
        if finding.fix and finding.verdict is not Verdict.PASS:
            lines.append(f"{'':<6}  {'':<{wide}}  fix: {finding.fix}")
    return "\n".join(lines)


def machine_lines(machine: Machine) -> list[str]:
    cpu = machine.cpu
    lines = [
        f"{machine.system} {machine.system_version}, {machine.architecture}",
        f"{cpu.name}, {cpu.logical_cores} logical cores, {', '.join(cpu.instruction_sets) or 'no vector sets known'}",
        f"memory {figures.size(machine.memory_bytes)}, available {figures.size(machine.memory_available_bytes)}",
    ]
    if machine.memory_limit_bytes is not None:
        lines.append(f"limit of this container {figures.size(machine.memory_limit_bytes)}")
    for gpu in machine.gpus:
        lines.append(
            f"{gpu.name}, {figures.size(gpu.memory_free_bytes)} free of {figures.size(gpu.memory_total_bytes)}"
        )
    lines += [f"a GPU from {vendor} is on the bus, but no driver responds" for vendor in machine.unusable_cards]
    return [*lines, *machine.notes]


def _as_json(
    machine: Machine, reports: Sequence[ProbeReport], findings: Sequence[Finding], status: int
) -> dict[str, object]:
    return {
        "machine": machine.as_json(),
        "backends": [report.as_json() for report in reports],
        "findings": [finding.as_json() for finding in findings],
        "exit_status": status,
    }
