"""Backends that misbehave outside of arithmetic: each is the reference backend with one bad habit. Tests only."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from qlora_hal.contract.backend import Availability, BackendSpec
from qlora_hal.contract.values import Batch, Float32, LossSum
from qlora_hal_conformance.reference_backend import SPEC as HONEST
from qlora_hal_conformance.reference_backend import probe
from qlora_hal_oracle import DropoutMasks


def _named(name: str) -> BackendSpec:
    spec = replace(HONEST, name=name, trainer=f"odd_backends:{name}", probe=lambda: replace(probe(), backend=name))
    return spec


def _honest() -> object:
    from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer

    return ReferenceTrainer()


def _with_evaluate(name: str, act: Callable[[], None]) -> object:
    from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer

    class Odd(ReferenceTrainer):
        def evaluate(self, batches: Sequence[Batch]) -> LossSum:
            act()
            return super().evaluate(batches)

    trainer = Odd()
    trainer.spec = _named(name)  # type: ignore[misc]
    return trainer


def _skip() -> None:
    import pytest

    pytest.skip("no time today")


def _interrupt() -> None:
    raise KeyboardInterrupt


def _end_session() -> None:
    import pytest

    pytest.exit("that is enough", returncode=0)


def _start_another_and_die() -> None:
    """What was started holds the lock on the file that `LOCKED_BY_ANOTHER` names for as long as it lives."""
    import fcntl
    import subprocess

    with open(os.environ["LOCKED_BY_ANOTHER"], "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=(file.fileno(),))
        os.abort()


def dies() -> object:
    return _with_evaluate("dies", os.abort)


def leaves() -> object:
    return _with_evaluate("leaves", lambda: os._exit(0))


def exits() -> object:
    return _with_evaluate("exits", lambda: sys.exit(0))


def hangs() -> object:
    return _with_evaluate("hangs", lambda: time.sleep(3600))


def skips() -> object:
    return _with_evaluate("skips", _skip)


def interrupts() -> object:
    return _with_evaluate("interrupts", _interrupt)


def ends_the_session() -> object:
    return _with_evaluate("ends_the_session", _end_session)


def leaves_another() -> object:
    return _with_evaluate("leaves_another", _start_another_and_die)


def dies_at_once() -> object:
    os._exit(7)


def absent() -> object:
    raise AssertionError("a backend that cannot run here was opened")


DIES, LEAVES, EXITS, HANGS, SKIPS, INTERRUPTS, ENDS, ANOTHER, AT_ONCE = (
    _named(name)
    for name in (
        "dies",
        "leaves",
        "exits",
        "hangs",
        "skips",
        "interrupts",
        "ends_the_session",
        "leaves_another",
        "dies_at_once",
    )
)
ABSENT = replace(
    _named("absent"),
    probe=lambda: replace(
        probe(), backend="absent", availability=Availability.NO_DEVICE, reason="No such card.", fix="Buy one."
    ),
)


def wrong_only_together() -> object:
    """Packed rows, dropout and recomputation, each right alone and in pairs: with all three, the backward pass of a
    packed row draws the masks of another key."""
    from qlora_hal_conformance.reference_backend.step import MasksOf, WindowResult
    from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer

    class Together(ReferenceTrainer):
        def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
            honest = super().gradient_of(window, divisor, masks_of)
            if not self.compute.gradient_checkpointing or not any(batch.is_packed for batch in window):
                return honest
            drawn_anew = super().gradient_of(window, divisor, lambda batch: _rolled(masks_of(batch)))
            return replace(honest, gradients=drawn_anew.gradients)

    trainer = Together()
    trainer.spec = _named("wrong_only_together")  # type: ignore[misc]
    return trainer


def _rolled(masks: DropoutMasks) -> DropoutMasks:
    """The masks of the token before."""
    return {module: np.roll(mask, 1, axis=1) for module, mask in masks.items()}


def wrong_with_other_storage() -> object:
    """Shows twice the gradient where it recomputes in bfloat16; every other way to compute is right."""
    from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer

    class Storage(ReferenceTrainer):
        def gradients(self, window: Sequence[Batch]) -> Mapping[str, Float32]:
            found = super().gradients(window)
            is_wrong = self.compute.gradient_checkpointing and self.compute.dtype == "bfloat16"
            return {name: 2 * gradient if is_wrong else gradient for name, gradient in found.items()}

    trainer = Storage()
    trainer.spec = _named("wrong_with_other_storage")  # type: ignore[misc]
    return trainer


TOGETHER, OTHER_STORAGE = _named("wrong_only_together"), _named("wrong_with_other_storage")
