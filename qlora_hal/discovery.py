"""From entry points to backends, one by one: a broken plugin becomes a report, the others go on.

Built-in backends are probed here. A third party's plugin is first imported in a child process with a time limit, so
that a crash, a hang, an exit or prints of its import are its own; it enters this process only when it is chosen.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from qlora_hal.backend import CONTRACT_VERSION, Availability, BackendSpec, ProbeReport
from qlora_hal.errors import (
    BackendConflictError,
    BackendContractError,
    BackendError,
    BackendNotFoundError,
    QloraHalError,
)

if TYPE_CHECKING:
    from qlora_hal.backend import QuantizedLoRATrainer

ENTRY_POINT_GROUP = "qlora_hal.backends"
OWN_DISTRIBUTION = "qlora-hal"
PROBE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Listed:
    """A backend as package metadata names it; nothing of it is imported. `spec` is set for in-process registration."""

    name: str
    distribution: str
    entry_point: EntryPoint | None = None
    spec: BackendSpec | None = None

    @property
    def built_in(self) -> bool:
        return self.distribution == OWN_DISTRIBUTION or self.spec is not None


def listed(registered: Iterable[BackendSpec] = ()) -> tuple[Listed, ...]:
    """Every backend by name; `registered` are specs offered from inside this process."""
    found = [Listed(spec.name, "this process", spec=spec) for spec in registered]
    for point in entry_points(group=ENTRY_POINT_GROUP):
        distribution = point.dist.name if point.dist is not None else "an unknown distribution"
        found.append(Listed(point.name, distribution, entry_point=point))
    # An editable install beside a wheel lists the same entry point twice.
    unique = {(entry.name, entry.distribution): entry for entry in found}
    return tuple(sorted(unique.values(), key=lambda entry: entry.name))


def reports(entries: Sequence[Listed]) -> tuple[ProbeReport, ...]:
    """One report for each name; a name that two distributions offer is refused for both."""
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
    return tuple(collected[name] for name in sorted(collected))


def probe(entry: Listed) -> ProbeReport:
    """Load one spec and ask it, in this process. Never raises."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):  # stdout belongs to --json
            report = load_spec(entry).probe()
    except (Exception, SystemExit) as error:
        reason = error.message if isinstance(error, QloraHalError) else f"{type(error).__name__}: {error}"
        return _broken(entry, " ".join(reason.split()))
    if not isinstance(report, ProbeReport):
        return _broken(entry, f"probe() returned {type(report).__name__}, not a ProbeReport")
    return replace(report, backend=entry.name, distribution=entry.distribution)


def load_spec(entry: Listed) -> BackendSpec:
    """Import the light module of a backend. Raises BackendContractError when it is not what the contract says."""
    if entry.spec is not None:
        return entry.spec
    assert entry.entry_point is not None
    spec = entry.entry_point.load()
    if not isinstance(spec, BackendSpec):
        raise _contract_error(entry, f"{entry.entry_point.value} is a {type(spec).__name__}, not a BackendSpec")
    if spec.contract != CONTRACT_VERSION:
        raise _contract_error(
            entry, f"it was written for contract {spec.contract}; this is contract {CONTRACT_VERSION}"
        )
    if spec.name != entry.name:
        raise _contract_error(entry, f"its entry point says {entry.name}, its spec says {spec.name}")
    return spec


def find(name: str, entries: Sequence[Listed]) -> Listed:
    """The one entry of a name. Raises BackendNotFoundError, BackendConflictError."""
    matches = [entry for entry in entries if entry.name == name]
    if not matches:
        import difflib

        names = sorted({entry.name for entry in entries})
        close = difflib.get_close_matches(name, names, n=1)
        raise BackendNotFoundError(
            "QH-B03",
            f"No backend is called {name!r}; installed are {', '.join(names)}.",
            fix=f"Did you mean --backend {close[0]}?" if close else "Run qlora-hal backends.",
        )
    if len(matches) > 1:
        both = [entry.distribution for entry in matches]
        report = _clash_report(name, both)
        raise BackendConflictError("QH-E07", report.reason, fix=report.fix, context={"distributions": both})
    return matches[0]


def open_trainer(spec: BackendSpec, options: Mapping[str, object] | None = None) -> QuantizedLoRATrainer:
    """Import the trainer: the first heavy import of a run. Foreign exceptions come out as BackendError. `options` are
    `backend.options`: some choices become variables of the environment first. A choice that is asked for
    wins over a variable that is set already; a default does not."""
    from importlib import import_module

    from qlora_hal.backend import QuantizedLoRATrainer

    for option, choices in spec.option_choices.items():
        asked = options is not None and option in options
        choice = options[option] if options is not None and asked else choices[0]
        for variable, value in spec.environment.get(option, {}).get(choice, {}).items():
            if asked or variable not in os.environ:
                os.environ[variable] = value
    module_name, _, attribute = spec.trainer.partition(":")
    try:
        trainer = getattr(import_module(module_name), attribute)()
    except QloraHalError:
        raise
    except Exception as error:
        raise BackendError(
            "QH-B04",
            f"Backend {spec.name} could not be opened: {type(error).__name__}: {error}",
            where=spec.trainer,
            fix="Run qlora-hal doctor; if it names no cause, report this to the backend's author.",
        ) from error
    if not isinstance(trainer, QuantizedLoRATrainer):
        raise BackendContractError(
            "QH-B02",
            f"{spec.trainer} gave a {type(trainer).__name__}, not a QuantizedLoRATrainer.",
            fix=f"Report this to the author of {spec.name}.",
        )
    return trainer


def _clashing_names(entries: Sequence[Listed]) -> dict[str, list[str]]:
    by_name: dict[str, list[str]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(entry.distribution)
    return {name: sources for name, sources in by_name.items() if len(sources) > 1}


def _clash_report(name: str, distributions: Sequence[str]) -> ProbeReport:
    return ProbeReport(
        name,
        Availability.BROKEN,
        f"Two distributions offer a backend called {name}: {' and '.join(distributions)}.",
        f"Uninstall one of them: pip uninstall {distributions[-1]}.",
    )


def _probe_in_child(entry: Listed) -> ProbeReport:
    command = [sys.executable, "-m", "qlora_hal.discovery", entry.name]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return _broken(entry, f"its probe did not answer within {PROBE_SECONDS:.0f} s")
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        ending = f"signal {-child.returncode}" if child.returncode < 0 else f"exit status {child.returncode}"
        return _broken(entry, f"its probe ended with {ending}: {last}")
    try:
        answer = json.loads(child.stdout.splitlines()[-1])
        return ProbeReport(
            entry.name,
            Availability(answer["availability"]),
            str(answer["reason"]),
            str(answer["fix"]),
            tuple(answer["devices"]),
            dict(answer["versions"]),
            entry.distribution,
            answer.get("uses_accelerator"),
            tuple(answer.get("notes", ())),
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return _broken(entry, f"its probe gave no report: {error}")


def _broken(entry: Listed, reason: str) -> ProbeReport:
    return ProbeReport(
        entry.name,
        Availability.BROKEN,
        f"{entry.distribution} could not be asked: {reason}",
        f"Update or uninstall it: pip install -U {entry.distribution}.",
        distribution=entry.distribution,
    )


def _contract_error(entry: Listed, reason: str) -> BackendContractError:
    return BackendContractError(
        "QH-E09",
        f"Backend {entry.name} of {entry.distribution} does not fit: {reason}.",
        fix=f"Install a version of {entry.distribution} for contract {CONTRACT_VERSION}.",
    )


if __name__ == "__main__":
    import os

    # Whatever the plugin prints, at import or from native code, goes to stderr; the answer alone goes to stdout.
    answer_stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    (named,) = [entry for entry in listed() if entry.name == sys.argv[1]]
    answer_stream.write(json.dumps(probe(named).as_json()) + "\n")
    answer_stream.flush()
