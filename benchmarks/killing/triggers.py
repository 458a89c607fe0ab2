"""Where a run is killed: at the n-th call of one of its phases, at a named point of a save, or after some seconds.

Calls are counted by the interpreter's own profiler in the main thread, so a kill can be told and repeated: "call 317 of
loading". The handler of a signal runs where Python would run it for a signal from outside, between two instructions.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

STARTING = "starting"

PHASES: Mapping[str, str] = {
    "run_new": "preparing",
    "run_resumed": "preparing",
    "with_quantized_base": "quantizing",
    "Execution._load": "loading",
    "Execution._attach": "loading",
    "Execution._evaluation": "evaluating",
    "Execution._sampled": "answering",
    "run": "stepping",
    "RunCallbacks.save": "saving",
    "_prune": "pruning",
    "RunCallbacks.best": "keeping the best",
    "write_run_adapter": "writing the adapter",
    "Execution._finish": "reporting",
}
"""Function of the core -> the phase that lasts while it runs; the innermost counts."""


@dataclass(frozen=True)
class Kill:
    """One signal. `phase` with `call`, or `point` with `call` (its n-th pass), or `seconds` after the start. `again`
    sends the signal once more right after it was first sent."""

    signal: str
    phase: str = ""
    point: str = ""
    call: int = 0
    seconds: float = 0.0
    again: bool = False

    @property
    def number(self) -> signal.Signals:
        return signal.Signals[self.signal]

    def as_json(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if value}


class PhaseCounter:
    """Counts the calls of each phase, and kills at one of them. Install with `sys.setprofile`."""

    def __init__(self, kill: Kill | None = None) -> None:
        self.calls: Counter[str] = Counter()
        self._kill = kill
        self._phase = STARTING
        self._outer: list[tuple[FrameType, str]] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            phase = PHASES.get(frame.f_code.co_qualname)
            if phase is not None and _is_ours(frame):
                self._outer.append((frame, self._phase))
                self._phase = phase
            self.calls[self._phase] += 1
            kill = self._kill
            if kill is not None and kill.phase == self._phase and kill.call == self.calls[self._phase]:
                self._kill = None
                os.kill(os.getpid(), kill.number)
                if kill.again:
                    os.kill(os.getpid(), kill.number)
        elif event == "return" and self._outer and self._outer[-1][0] is frame:
            _, self._phase = self._outer.pop()


def arm(kill: Kill | None) -> PhaseCounter | None:
    """In the process that is to be killed, before it begins. Kills by time come from outside."""
    if kill is not None and kill.point:
        os.environ["QLORA_HAL_FAULTS"] = f"{kill.point}:kill@{kill.call}"
    if kill is not None and not kill.phase:
        return None
    counter = PhaseCounter(kill)
    sys.setprofile(counter)
    return counter


def _is_ours(frame: FrameType) -> bool:
    file = frame.f_code.co_filename.replace(os.sep, "/")
    return "/qlora_hal/" in file and (frame.f_code.co_qualname != "run" or file.endswith("/loop.py"))
