"""Backends that misbehave outside of arithmetic: each is the reference backend with one bad habit. Tests only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from qlora_hal.contract.backend import Availability, BackendSpec, Compute, Quantization
from qlora_hal.contract.values import Adapter, Batch, Float32, LossSum
from qlora_hal.contract.world import World
from qlora_hal.errors import ConfigError, UnsupportedFeatureError
from qlora_hal.model.source import ModelSource
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


def of_one_device() -> object:
    """Gives every rank but the first no device, as a machine with one card does."""
    from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer

    class OneDevice(ReferenceTrainer):
        def join_ranks(self, world: World, timeout_seconds: float) -> None:
            if world.local_rank:
                raise ConfigError("QH-R01", f"Rank {world.rank} has no device.", fix="Ask for 1 device.")
            super().join_ranks(world, timeout_seconds)

    return OneDevice(spec=_named("of_one_device"))


def dies_as_second_rank() -> object:
    from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer

    class Dies(ReferenceTrainer):
        def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
            if self.ranks.world.rank:
                os._exit(7)
            super().attach(adapter, optimizer)

    return Dies(spec=_named("dies_as_second_rank"))


ONE_DEVICE = replace(
    _named("of_one_device"),
    uses_accelerator=True,
    probe=lambda: replace(probe(), backend="of_one_device", devices=("a card",)),
)
NO_DEVICE_OF_TWO = replace(
    ONE_DEVICE, probe=lambda: replace(probe(), backend="of_one_device", devices=("a card", "another card"))
)
DIES_AS_SECOND_RANK = _named("dies_as_second_rank")
WITH_LAUNCHER = replace(HONEST, launcher="odd_backends")
"""This module, run: `python -m odd_backends RANKS MAX_RESTARTS MODULE FOLDER`."""


def launch(ranks: str, restarts: str, module: str, folder: str) -> int:
    """As a backend's own launcher: ranks that meet where it says, and a file that says who started them."""
    assert restarts == "0"
    with open(os.path.join(folder, "launched"), "w") as file:
        file.write(ranks)
    meeting = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 10000)}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", module, folder],
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(int(ranks))
    ]
    return max(child.wait() for child in children)


TOGETHER, OTHER_STORAGE = _named("wrong_only_together"), _named("wrong_with_other_storage")

if __name__ == "__main__":
    sys.exit(launch(*sys.argv[1:]))


def on_a_device_without_fp8() -> object:
    return _with_load_in_fp8(UnsupportedFeatureError("QH-B01", "This device has no fp8.", fix="Use bfloat16."))


def that_fails_in_fp8() -> object:
    return _with_load_in_fp8(RuntimeError("a kernel did not compile"))


def _with_load_in_fp8(error: Exception) -> object:
    from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer

    class Odd(ReferenceTrainer):
        def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
            if compute.fp8_products:
                raise error
            super().load(source, quantization, compute)

    return Odd()
