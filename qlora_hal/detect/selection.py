"""From reports and needs to one backend, with the reason for every other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from qlora_hal.contract.backend import BackendSpec, ProbeReport
from qlora_hal.contract.capabilities import Requirements, unmet_requirements
from qlora_hal.detect.discovery import BackendEntry, find, load_spec
from qlora_hal.errors import BackendUnavailableError, QloraHalError, UnsupportedFeatureError

AskHook = Callable[[tuple[ProbeReport, ...], Requirements], str | None]


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend taken, why, and why not the others."""

    spec: BackendSpec
    reason: str
    rejections: Mapping[str, str] = field(default_factory=dict)


def choose(
    name: str,
    needs: Requirements,
    entries: Sequence[BackendEntry],
    reports: Sequence[ProbeReport],
    *,
    allow_cpu: bool,
    ask_hook: AskHook = lambda reports, needs: None,
) -> Choice:
    """A named backend or an error that says why not; `auto` takes the ready and able one of highest priority.

    `auto` never takes a backend without an accelerator unless `allow_cpu`. Raises BackendNotFoundError,
    BackendUnavailableError, UnsupportedFeatureError.
    """
    if name != "auto":
        return _named(name, needs, entries, reports)
    able, rejections = _able_backends(needs, entries, reports)
    overridden = ask_hook(tuple(reports), needs)
    if overridden is not None:
        choice = _named(overridden, needs, entries, reports)
        return Choice(choice.spec, "the qlora_hal_choose_backend hook chose it", rejections)
    accelerated = [spec for spec in able if has_accelerator(spec, reports)]
    if accelerated:
        return _highest(accelerated, able, rejections, "it is ready and has the highest priority")
    if able and allow_cpu:
        return _highest(able, able, rejections, "no accelerator is ready and the CPU is allowed")
    for spec in able:
        rejections[spec.name] = "ready, but auto chooses the CPU only when backend.allow_cpu is true"
    raise _nothing_fits(rejections, reports, able)


def _named(name: str, needs: Requirements, entries: Sequence[BackendEntry], reports: Sequence[ProbeReport]) -> Choice:
    entry = find(name, entries)
    report = next(report for report in reports if report.backend == name)
    if not report.ready:
        raise BackendUnavailableError(
            "QH-B05",
            f"Backend {name} cannot run here: {report.reason}",
            cause="\n".join(report.notes),
            fix=report.fix,
            context={"reports": [r.as_json() for r in reports]},
        )
    spec = load_spec(entry)
    lacks = unmet_requirements(needs, spec.capabilities)
    if lacks:
        raise UnsupportedFeatureError(
            "QH-B01",
            f"Backend {name} does not support what this run needs: {'; '.join(lacks)}.",
            fix=_who_can(needs, entries, reports, but_not=name),
            context={"lacks": list(lacks)},
        )
    return Choice(spec, "it was requested")


def _able_backends(
    needs: Requirements, entries: Sequence[BackendEntry], reports: Sequence[ProbeReport]
) -> tuple[list[BackendSpec], dict[str, str]]:
    able: list[BackendSpec] = []
    rejections: dict[str, str] = {}
    for report in reports:
        if not report.ready:
            rejections[report.backend] = report.reason
            continue
        try:
            spec = load_spec(find(report.backend, entries))
        except QloraHalError as error:  # what was ready in its probe's own process may fail in this one
            rejections[report.backend] = error.message
            continue
        lacks = unmet_requirements(needs, spec.capabilities)
        if lacks:
            rejections[spec.name] = f"does not support {'; '.join(lacks)}"
        else:
            able.append(spec)
    return able, rejections


def has_accelerator(spec: BackendSpec, reports: Sequence[ProbeReport]) -> bool:
    """What the probe found here, where it says; else what the spec says of the backend everywhere."""
    found = next(report.uses_accelerator for report in reports if report.backend == spec.name)
    return spec.uses_accelerator if found is None else found


def _highest(
    candidates: Sequence[BackendSpec], able: Sequence[BackendSpec], rejections: dict[str, str], reason: str
) -> Choice:
    chosen = max(candidates, key=lambda spec: (spec.priority, spec.name))
    for spec in able:
        if spec is not chosen:
            rejections[spec.name] = f"ready, but {chosen.name} has the higher priority"
    return Choice(chosen, reason, rejections)


def _who_can(
    needs: Requirements, entries: Sequence[BackendEntry], reports: Sequence[ProbeReport], *, but_not: str
) -> str:
    able = [
        spec.name
        for spec in _able_backends(needs, entries, reports)[0]
        if spec.name != but_not and not _lacks_arithmetic(spec, needs, reports)
    ]
    if able:
        return f"Choose --backend {able[0]}, or change the setting."
    return "Change the setting; no ready backend here supports it."


def _lacks_arithmetic(spec: BackendSpec, needs: Requirements, reports: Sequence[ProbeReport]) -> bool:
    """Whether a dtype that is asked for by name is one that `spec` may well not compute on what is here: a backend
    declares what its accelerators can, and only proving it on the device tells the rest."""
    return needs.compute_dtype == "float16" and not has_accelerator(spec, reports)


def _nothing_fits(
    rejections: Mapping[str, str], reports: Sequence[ProbeReport], on_cpu: Sequence[BackendSpec]
) -> BackendUnavailableError:
    listing = "\n".join(f"    {name}: {reason}" for name, reason in sorted(rejections.items()))
    fixes = {report.backend: report.fix for report in reports if report.fix}
    return BackendUnavailableError(
        "QH-E01",
        f"No backend with an accelerator can be used for this run:\n{listing}",
        fix=_on_the_cpu(max(on_cpu, key=lambda spec: (spec.priority, spec.name)).name)
        if on_cpu
        else "Run qlora-hal doctor: it prints one fix for each.",
        context={"reports": [report.as_json() for report in reports], "fixes": fixes},
    )


def _on_the_cpu(backend: str) -> str:
    return f"To train on this machine's CPU, add --backend {backend}; in Python, backend={backend!r}."
