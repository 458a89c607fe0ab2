"""From entry points to backends, one by one: a broken plugin becomes a report, the others go on.

Built-in backends are probed here. A third party's plugin is first imported in a child process with a time limit, so
that a crash, a hang, an exit or prints of its import are its own; it enters this process when it was found ready there
and backends are compared (`auto`), or when it is named.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from qlora_hal.contract.backend import (
    CONTRACT_VERSION,
    Availability,
    BackendSpec,
    ModelOutline,
    ProbeReport,
    QuantizedLoRATrainer,
)
from qlora_hal.contract.type_checks import wrong_fields
from qlora_hal.errors import (
    BackendConflictError,
    BackendContractError,
    BackendError,
    BackendNotFoundError,
    QloraHalError,
)
from qlora_hal.errors.foreign import place_in_plugin, told, traceback_in_plugin
from qlora_hal.errors.installation import is_from_index, pip
from qlora_hal.formats.catalogue import wrong_claims
from qlora_hal.model.linear_shapes import left_out_notes
from qlora_hal.processes.copies import computes, refuse_in_copy
from qlora_hal.processes.subprocess_call import SubprocessCallError, answer_stream, ask, one_line
from qlora_hal.processes.turns import alone_in_process

if TYPE_CHECKING:
    from qlora_hal.model.source import ModelSource

ENTRY_POINT_GROUP = "qlora_hal.backends"
OWN_DISTRIBUTION = "qlora-hal"
PROBE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """A backend as package metadata names it; nothing of it is imported. `spec` is set for in-process registration."""

    name: str
    distribution: str
    entry_point: EntryPoint | None = None
    spec: BackendSpec | None = None

    @property
    def built_in(self) -> bool:
        return self.distribution == OWN_DISTRIBUTION or self.spec is not None


def listed(registered: Iterable[BackendSpec] = ()) -> tuple[BackendEntry, ...]:
    """Every backend by name; `registered` are specs offered from inside this process."""
    found = [BackendEntry(spec.name, "this process", spec=spec) for spec in registered]
    for point in entry_points(group=ENTRY_POINT_GROUP):
        distribution = point.dist.name if point.dist is not None else "an unknown distribution"
        found.append(BackendEntry(point.name, distribution, entry_point=point))
    # An editable install beside a wheel lists the same entry point twice.
    unique = {(entry.name, entry.distribution): entry for entry in found}
    return tuple(sorted(unique.values(), key=lambda entry: entry.name))


def reports(entries: Sequence[BackendEntry]) -> tuple[ProbeReport, ...]:
    """One report for each name; a name that two distributions offer is refused for both. A name of ours is refused to
    all others, which are reported beside it."""
    entries, conflicts = _without_name_conflicts(entries)
    clashes = _clashing_names(entries)
    outside = [entry for entry in entries if not entry.built_in and entry.name not in clashes]
    with ThreadPoolExecutor(max_workers=max(1, len(outside))) as pool:
        probed_outside = dict(zip([e.name for e in outside], pool.map(_probe_in_child, outside), strict=True))
    collected: dict[str, ProbeReport] = {}
    for entry in entries:
        if entry.name in clashes:
            collected[entry.name] = _clash_report(entry.name, clashes[entry.name])
        elif entry.name in probed_outside:
            collected[entry.name] = probed_outside[entry.name]
        else:
            collected[entry.name] = probe(entry)
    for entry in conflicts:
        report = _name_conflict_report(entry)
        collected[report.backend] = report
    return tuple(collected[name] for name in sorted(collected))


def probe(entry: BackendEntry) -> ProbeReport:
    """Load one spec and ask it, in this process. Never raises."""
    printed = io.StringIO()
    try:
        with alone_in_process(), contextlib.redirect_stdout(printed):  # stdout belongs to --json
            report = load_spec(entry).probe()
    except (Exception, SystemExit) as error:
        if isinstance(error, QloraHalError):
            reason, trace = error.message, error.cause
        else:
            reason, trace = _placed(error), _for_its_author(entry, error)
        return _broken(entry, " ".join(reason.split()), notes=tuple(trace.splitlines()))
    if not isinstance(report, ProbeReport):
        return _broken(entry, f"probe() returned {type(report).__name__}, not a ProbeReport")
    return replace(report, backend=entry.name, distribution=entry.distribution)


def load_spec(entry: BackendEntry) -> BackendSpec:
    """Import the light module of a backend. Raises BackendContractError when it is not what the contract says (QH-E09),
    or declares weight formats otherwise than the catalogue (QH-E81), and BackendError QH-E08 when it cannot be
    imported."""
    spec = _imported(entry) if entry.spec is None else entry.spec
    if not isinstance(spec, BackendSpec):
        raise _contract_error(entry, f"it is a {type(spec).__name__}, not a BackendSpec")
    if spec.contract != CONTRACT_VERSION:
        raise _contract_error(
            entry, f"it was written for contract {spec.contract}; this is contract {CONTRACT_VERSION}"
        )
    if spec.name != entry.name:
        raise _contract_error(entry, f"its entry point says {entry.name}, its spec says {spec.name}")
    if wrong := wrong_fields(spec):
        raise _contract_error(entry, "; ".join(wrong))
    if wrong := wrong_claims(spec.capabilities):
        raise _format_error(entry, "; ".join(wrong))
    return spec


def _imported(entry: BackendEntry) -> object:
    assert entry.entry_point is not None
    try:
        return entry.entry_point.load()
    except QloraHalError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, ImportError) and (named := _module_of_contract_1(error)):
            raise _contract_error(
                entry,
                f"it was written for contract 1, whose {named} is {_MODULES_OF_CONTRACT_1[named]} now; this is "
                f"contract {CONTRACT_VERSION}",
            ) from error
        raise BackendError(
            "QH-E08",
            f"Backend {entry.name} of {entry.distribution} cannot be imported: {_placed(error)}",
            where=entry.entry_point.value,
            cause=_for_its_author(entry, error),
            fix=_repair(entry),
        ) from error


_MODULES_OF_CONTRACT_1 = {
    f"qlora_hal.{name}": f"qlora_hal.contract.{name}"
    for name in ("backend", "capabilities", "values", "memory_constants")
}
"""What a plugin of contract 1 imports, and where that is now."""


def _module_of_contract_1(error: ImportError) -> str:
    """Which of them an import asked for, in either form; nothing where it is another."""
    named = re.fullmatch(r"cannot import name '(\w+)' from 'qlora_hal'.*", str(error))
    asked = f"qlora_hal.{named[1]}" if named else error.name or ""
    return asked if asked in _MODULES_OF_CONTRACT_1 else ""


def _repair(entry: BackendEntry) -> str:
    """Update what came from an index; anything else is being written, and its author wants to see where it fails."""
    if entry.entry_point is not None and not is_from_index(entry.distribution):
        module = entry.entry_point.value.partition(":")[0]
        return f"See where it fails with: {shlex.quote(sys.executable)} -c 'import {module}'"
    return f"Update or uninstall it: {pip(f'install -U {entry.distribution}')}"


def _placed(error: BaseException) -> str:
    """A plugin's exception with file and line."""
    place = place_in_plugin(error)
    return f"{type(error).__name__}: {error}" + (f" ({place})" if place else "")


def _for_its_author(entry: BackendEntry, error: BaseException) -> str:
    return "" if is_from_index(entry.distribution) else traceback_in_plugin(error)


def find(name: str, entries: Sequence[BackendEntry]) -> BackendEntry:
    """The one entry of a name, or ours of that name. Raises BackendNotFoundError, BackendConflictError."""
    entries, _ = _without_name_conflicts(entries)
    matches = [entry for entry in entries if entry.name == name]
    if not matches:
        names = sorted({entry.name for entry in entries})
        close = [known for known in names if known.startswith(f"{name}_")] or difflib.get_close_matches(name, names)
        raise BackendNotFoundError(
            "QH-B03",
            f"There is no backend {name!r}; installed are {', '.join(names)}.",
            fix=f"Did you mean --backend {close[0]}?" if close else "Run qlora-hal backends.",
        )
    if len(matches) > 1:
        both = [entry.distribution for entry in matches]
        report = _clash_report(name, both)
        raise BackendConflictError("QH-E07", report.reason, fix=report.fix, context={"distributions": both})
    return matches[0]


def open_trainer(spec: BackendSpec, options: Mapping[str, object] | None = None) -> QuantizedLoRATrainer:
    """Import the trainer: the first heavy import of a run. Foreign exceptions come out as BackendError. `options` are
    `backend.options`, which the backend prepares the process for first. Raises BackendError QH-E67 where it could not
    compute."""
    trainer = _called(spec, spec.trainer, options or {})
    computes()
    if not isinstance(trainer, QuantizedLoRATrainer):
        raise BackendContractError(
            "QH-B02",
            f"{spec.trainer} returned a {type(trainer).__name__}, not a QuantizedLoRATrainer.",
            fix=f"Report this to the author of {spec.name}.",
        )
    return trainer


def outline_of(spec: BackendSpec, source: ModelSource, options: Mapping[str, object]) -> ModelOutline:
    """What the backend will make of this model: by its own outline, where it has one, else by the headers of the
    weight files. Foreign exceptions come out as BackendError."""
    if not spec.outline:
        return ModelOutline(source.facts.linear_modules, left_out_notes(source.facts))
    outline = _called(spec, spec.outline, options, source, options)
    if not isinstance(outline, ModelOutline):
        raise BackendContractError(
            "QH-B02",
            f"{spec.outline} returned a {type(outline).__name__}, not a ModelOutline.",
            fix=f"Report this to the author of {spec.name}.",
        )
    return outline


def _called(spec: BackendSpec, path: str, options: Mapping[str, object], *arguments: object) -> object:
    """Import `package.module:Name` of a backend and call it, its exceptions made ours."""
    refuse_in_copy()
    module_name, _, attribute = path.partition(":")
    try:
        with alone_in_process():
            if spec.prepare_process is not None:
                spec.prepare_process(options)
            found: object = getattr(import_module(module_name), attribute)(*arguments)
    except QloraHalError:
        raise
    except (Exception, SystemExit) as error:
        raise BackendError(
            "QH-B04",
            f"Backend {spec.name} could not be opened: {told(error)}",
            where=path,
            cause=f"It was raised in {place}." if (place := place_in_plugin(error)) else "",
            fix="Run qlora-hal doctor; if it names no cause, report this to the backend's author.",
        ) from error
    return found


def _without_name_conflicts(entries: Sequence[BackendEntry]) -> tuple[list[BackendEntry], list[BackendEntry]]:
    """The entries that keep their names, and those of others that take a name of ours."""
    ours = {entry.name for entry in entries if entry.distribution == OWN_DISTRIBUTION}
    conflicts = [entry for entry in entries if entry.name in ours and entry.distribution != OWN_DISTRIBUTION]
    return [entry for entry in entries if entry not in conflicts], conflicts


def _name_conflict_report(entry: BackendEntry) -> ProbeReport:
    fix = "Give the backend another name." if entry.spec else f"Uninstall it: {pip(f'uninstall {entry.distribution}')}"
    return ProbeReport(
        f"{entry.name} ({entry.distribution})",
        Availability.BROKEN,
        f"{entry.distribution} offers a backend called {entry.name}, which is the name of a built-in one.",
        fix,
        distribution=entry.distribution,
    )


def _clashing_names(entries: Sequence[BackendEntry]) -> dict[str, list[str]]:
    by_name: dict[str, list[str]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(entry.distribution)
    return {name: sources for name, sources in by_name.items() if len(sources) > 1}


def _clash_report(name: str, distributions: Sequence[str]) -> ProbeReport:
    return ProbeReport(
        name,
        Availability.BROKEN,
        f"Two distributions offer a backend called {name}: {' and '.join(distributions)}.",
        f"Uninstall one of them: {pip(f'uninstall {distributions[-1]}')}",
    )


def _probe_in_child(entry: BackendEntry) -> ProbeReport:
    try:
        answer = ask("qlora_hal.detect.discovery", entry.name, seconds=PROBE_SECONDS)
        return ProbeReport(
            entry.name,
            Availability(answer["availability"]),
            one_line(answer["reason"]),
            one_line(answer["fix"]),
            tuple(map(one_line, answer["devices"])),
            {one_line(package): one_line(version) for package, version in answer["versions"].items()},
            entry.distribution,
            answer.get("uses_accelerator"),
            tuple(map(one_line, answer.get("notes", ()))),
            one_line(answer.get("device_kind", "")),
            answer.get("compute_dtype"),
        )
    except SubprocessCallError as silence:
        if silence.waited is not None:
            patience = "Try again when the machine is less busy; if it still does not respond, tell the author of"
            return _broken(entry, f"its probe {silence}", fix=f"{patience} {entry.distribution}.")
        return _broken(entry, f"its probe {silence}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return _broken(entry, f"its probe returned no report: {error}")


def _broken(entry: BackendEntry, reason: str, *, fix: str = "", notes: tuple[str, ...] = ()) -> ProbeReport:
    return ProbeReport(
        entry.name,
        Availability.BROKEN,
        f"{entry.distribution} could not be queried: {reason}",
        fix or _repair(entry),
        distribution=entry.distribution,
        notes=notes,
    )


def _contract_error(entry: BackendEntry, reason: str) -> BackendContractError:
    return BackendContractError(
        "QH-E09",
        f"Backend {entry.name} of {entry.distribution} is not compatible: {reason}.",
        fix=f"Install a version of {entry.distribution} for contract {CONTRACT_VERSION}; for its author, "
        "docs/write_a_backend.md says what changed.",
    )


def _format_error(entry: BackendEntry, reason: str) -> BackendContractError:
    return BackendContractError(
        "QH-E81",
        f"Backend {entry.name} of {entry.distribution} declares weight formats wrongly: {reason}.",
        fix=f"Update {entry.distribution}, or install the package that holds the format's record; for its author, "
        "docs/write_a_backend.md says how formats are declared.",
    )


if __name__ == "__main__":
    with answer_stream() as stream:
        json.dump(probe(find(sys.argv[1], listed())).as_json(), stream)
