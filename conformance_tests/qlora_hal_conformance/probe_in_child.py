"""A backend's light module looked at in a process of its own: how long its probe takes and what it imports.

python -m qlora_hal_conformance.probe_in_child '{"backend": "cpu_torch", ...}' [--without-libraries]
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from qlora_hal_conformance.subject import Reference, import_subject, probe_record
from qlora_hal_conformance.tolerances import PROBE_SECONDS

LIBRARIES = (
    "torch", "mlx", "mlx_lm", "transformers", "bitsandbytes", "gptqmodel", "auto_gptq", "peft", "accelerate", "optimum",
    "jax", "tensorflow", "tinygrad", "onnxruntime", "triton", "torchao",
)  # fmt: skip
"""What a probe must not import: each costs from a tenth of a second to ten."""

TIMED_CALLS, MOST_CALLS = 3, 40
"""On a busy machine a call may lose its processor half-way: while none was fast enough, it is asked again."""
LOOK_SECONDS = 1800.0
"""A last resort: a child that makes no progress is ended with its case, by a clock that knows of busy machines."""


class _Hidden:
    """A finder that finds everything but some packages, which look as if they were not installed."""

    def __init__(self, finder: Any, names: Sequence[str]) -> None:
        self._finder, self._names = finder, names

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        return None if name.partition(".")[0] in self._names else self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def hide(names: Sequence[str]) -> None:
    """From now on this process behaves as if the packages were not installed."""
    sys.meta_path[:] = [_Hidden(finder, names) for finder in sys.meta_path]
    from_name = importlib.metadata.Distribution.from_name
    hidden = {name.replace("_", "-") for name in names}

    def without(name: str) -> importlib.metadata.Distribution:
        if name.lower().replace("_", "-") in hidden:
            raise importlib.metadata.PackageNotFoundError(name)
        return from_name(name)

    importlib.metadata.Distribution.from_name = staticmethod(without)  # type: ignore[method-assign]


def look(reference: Reference, *, without_libraries: bool) -> dict[str, object]:
    """Import the spec, call its probe, and say what that took and brought along."""
    if without_libraries:
        hide(LIBRARIES)
    subject = import_subject(reference)
    seconds: list[float] = []
    while len(seconds) < TIMED_CALLS or (min(seconds) > PROBE_SECONDS and len(seconds) < MOST_CALLS):
        start = time.perf_counter()
        report = subject.spec.probe()
        seconds.append(time.perf_counter() - start)
    answer: dict[str, object] = {
        "probe": dict(probe_record(report)),
        "seconds": min(seconds),
        "imported": sorted(name for name in LIBRARIES if name in sys.modules),
        "opened": "",
    }
    if without_libraries and report.ready:
        try:
            subject.open().close()
        except BaseException as error:
            answer["opened"] = f"{type(error).__name__}: {error}"
    return answer


def look_in_child(reference: Reference, *, without_libraries: bool = False) -> Mapping[str, Any]:
    """`look` in a fresh process. Raises AssertionError when it dies or hangs."""
    command = [sys.executable, "-m", "qlora_hal_conformance.probe_in_child", json.dumps(reference.as_json())]
    command += ["--without-libraries"] if without_libraries else []
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"the probe did not answer within {LOOK_SECONDS:.0f} s") from error
    lines = child.stdout.strip().splitlines()
    reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
    assert (child.returncode, bool(lines)) == (0, True), (
        f"the probe's process ended with status {child.returncode}: {reason}"
    )
    answer = json.loads(lines[-1])
    assert isinstance(answer, dict)
    return answer


if __name__ == "__main__":
    # Whatever a backend prints goes to stderr; the answer alone goes to stdout.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    found = look(Reference(**json.loads(sys.argv[1])), without_libraries="--without-libraries" in sys.argv)
    answers.write(json.dumps(found, default=str) + "\n")
    answers.close()
