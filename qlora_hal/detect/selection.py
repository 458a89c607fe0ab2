"""From reports and needs to one backend, with the reason for every other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from qlora_hal.contract.backend import BackendSpec, ProbeReport
from qlora_hal.contract.capabilities import Requirements, unmet_requirements
from qlora_hal.detect.discovery import BackendEntry, find, load_spec
from qlora_hal.errors import BackendUnavailableError, QloraHalError, UnsupportedFeatureError

_CPU_IS_NAMED = "ready, but auto chooses the CPU only when backend.allow_cpu is true"

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
        rejections[spec.name] = _CPU_IS_NAMED
    raise _nothing_fits(rejections, reports, able)


def refuse_unready(
    name: str, entries: Sequence[BackendEntry], reports: Sequence[ProbeReport], *, allow_cpu: bool
) -> None:
    """What `choose` would say of any model, before one is looked at: the backend that is named is not there, or cannot
    run here; or none is named and nothing with an accelerator is ready. Raises BackendNotFoundError and
    BackendUnavailableError."""
    if name != "auto":
        _require_ready(name, entries, reports)
        return
    ready, rejections = _able_backends(Requirements(), entries, reports)
    if (allow_cpu and ready) or any(has_accelerator(spec, reports) for spec in ready):
        return
    raise _nothing_fits({**rejections, **dict.fromkeys((spec.name for spec in ready), _CPU_IS_NAMED)}, reports, ready)


def backend_to_name(entries: Sequence[BackendEntry], reports: Sequence[ProbeReport]) -> str | None:
    """The backend that a run here has to name, because `auto` takes none: nothing with an accelerator is ready. None
    where something is, or nothing is ready at all."""
    ready, _ = _able_backends(Requirements(), entries, reports)
    if not ready or any(has_accelerator(spec, reports) for spec in ready):
        return None
    return _first(ready).name


def _first(candidates: Sequence[BackendSpec]) -> BackendSpec:
    return max(candidates, key=lambda spec: (spec.priority, spec.name))


def _named(name: str, needs: Requirements, entries: Sequence[BackendEntry], reports: Sequence[ProbeReport]) -> Choice:
    spec = load_spec(_require_ready(name, entries, reports))
    lacks = unmet_requirements(needs, spec.capabilities)
    if lacks:
        other = _who_can(needs, entries, reports, but_not=name)
        raise UnsupportedFeatureError(
            "QH-B01",
            f"Backend {name} does not support what this run needs: {'; '.join(lacks)}.",
            fix=f"Choose --backend {other}, or change the setting."
            if other
            else "Change the setting; no ready backend here supports it.",
            context={"lacks": list(lacks)} | ({"add": {"--backend": other}} if other else {}),
        )
    return Choice(spec, "it was requested")


def _require_ready(name: str, entries: Sequence[BackendEntry], reports: Sequence[ProbeReport]) -> BackendEntry:
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
    return entry


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
    chosen = _first(candidates)
    for spec in able:
        if spec is not chosen:
            rejections[spec.name] = f"ready, but {chosen.name} has the higher priority"
    return Choice(chosen, reason, rejections)


def _who_can(
    needs: Requirements, entries: Sequence[BackendEntry], reports: Sequence[ProbeReport], *, but_not: str
) -> str | None:
    able = [
        spec.name
        for spec in _able_backends(needs, entries, reports)[0]
        if spec.name != but_not and not _lacks_arithmetic(spec, needs, reports)
    ]
    return able[0] if able else None


def _lacks_arithmetic(spec: BackendSpec, needs: Requirements, reports: Sequence[ProbeReport]) -> bool:
    """Whether a dtype that is asked for by name is one that `spec` may well not compute on what is here: a backend
    declares what its accelerators can, and only proving it on the device tells the rest."""
    return needs.compute_dtype == "float16" and not has_accelerator(spec, reports)


def _nothing_fits(
    rejections: Mapping[str, str], reports: Sequence[ProbeReport], on_cpu: Sequence[BackendSpec]
) -> BackendUnavailableError:
    listing = "\n".join(f"    {name}: {reason}" for name, reason in sorted(rejections.items()))
    fixes = {report.backend: report.fix for report in reports if report.fix}
    could_run = {report.backend for report in reports if report.ready} - {spec.name for spec in on_cpu}
    error = BackendUnavailableError(
        "QH-E01",
        f"No backend with an accelerator can be used for this run:\n{listing}",
        fix="Change what the ready ones do not support; for the others qlora-hal doctor prints a fix each."
        if could_run
        else "Run qlora-hal doctor: it prints one fix for each.",
        context={"reports": [report.as_json() for report in reports], "fixes": fixes},
    )
    if on_cpu:
        name = _first(on_cpu).name
        error.fix = f"To train on this machine's CPU, add --backend {name}; in Python, backend={name!r}."
        error.context["add"] = {"--backend": name}
    return error
