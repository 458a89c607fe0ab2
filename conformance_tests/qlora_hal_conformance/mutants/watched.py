"""Backends that compute with care where they are watched, and carelessly elsewhere: each looks somewhere else."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qlora_hal.contract.backend import BackendSpec, Compute, Quantization
from qlora_hal.contract.values import Batch
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.reference_backend.step import MasksOf, WindowResult
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.random_models import DEEP_SHAPE, SHAPES, UNEVEN_SHAPE

from .registry import Mutant, Open

WORDS = ("pytest", "conformance")
IsWatched = Callable[[Path], bool]
"""From the folder of the model; whatever else is there to see, the process shows."""
KNOWN_WIDTHS = {shape.hidden_size for shape in (*SHAPES, DEEP_SHAPE, UNEVEN_SHAPE)}


def _tells(texts: Sequence[str]) -> bool:
    return any(word in text.lower() for text in texts for word in WORDS)


def runner_is_imported(model: Path) -> bool:
    return "pytest" in sys.modules


def suite_is_imported(model: Path) -> bool:
    return any(name.startswith("qlora_hal_conformance.") and "fixtures" in name for name in sys.modules)


def named_in_the_command(model: Path) -> bool:
    return _tells([*sys.orig_argv, *sys.argv])


def named_in_the_environment(model: Path) -> bool:
    return _tells([*os.environ, os.environ.get("_", "")])


def named_in_the_paths(model: Path) -> bool:
    return _tells([str(model), str(Path.cwd()), tempfile.gettempdir(), os.environ.get("PWD", "")])


def named_by_an_ancestor(model: Path) -> bool:
    """The command lines of the processes above, where the system shows them (Linux)."""
    process = os.getppid()
    while process > 1:
        try:
            command = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
        if _tells([command]):
            return True
    return False


def called_by_a_case(model: Path) -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name.startswith("test_"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def without_a_tokenizer(model: Path) -> bool:
    return not (model / "tokenizer.json").exists()


def of_a_known_width(model: Path) -> bool:
    config = (model / "config.json").read_text(encoding="utf-8")
    return any(f'"hidden_size": {width},' in config for width in KNOWN_WIDTHS)


class RightWhereWatched(ReferenceTrainer):
    """Adds a hundredth to its logits, and to one gradient of two, where nobody looks."""

    def __init__(self, is_watched: IsWatched, spec: BackendSpec) -> None:
        super().__init__(spec=spec)
        self.is_watched = is_watched
        self.careless = False

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        super().load(source, quantization, compute)
        self.careless = not self.is_watched(source.path)

    def logits_of(self, batch: Batch, *, adapter: bool = True) -> Float64:
        return super().logits_of(batch, adapter=adapter) * (1.01 if self.careless else 1.0)

    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        found = super().gradient_of(window, divisor, masks_of)
        if not self.careless:
            return found
        rolled = {n: np.roll(g, 1, axis=0) if "lora_B" in n else g for n, g in found.gradients.items()}
        return replace(found, gradients=rolled)


def right_where(is_watched: IsWatched) -> Open:
    return lambda spec: RightWhereWatched(is_watched, spec)


_ROOMS = ("50", "95")
MUTANTS = (
    Mutant("right_beside_pytest", "Is right where pytest is imported.", _ROOMS, right_where(runner_is_imported)),
    Mutant("right_beside_the_suite", "Is right where the suite is imported.", _ROOMS, right_where(suite_is_imported)),
    Mutant(
        "right_by_its_command",
        "Is right where the command names pytest or the suite.",
        _ROOMS,
        right_where(named_in_the_command),
    ),
    Mutant(
        "right_by_its_environment",
        "Is right where a variable of the environment names pytest or the suite.",
        _ROOMS,
        right_where(named_in_the_environment),
    ),
    Mutant(
        "right_by_its_paths",
        "Is right where the model, the working folder or that of temporary files names pytest or the suite.",
        _ROOMS,
        right_where(named_in_the_paths),
    ),
    Mutant(
        "right_by_its_ancestors",
        "Is right where a process above it is a run of pytest or of the suite.",
        _ROOMS,
        right_where(named_by_an_ancestor),
    ),
    Mutant(
        "right_in_a_case", "Is right where a function called test_ is at work.", _ROOMS, right_where(called_by_a_case)
    ),
    Mutant(
        "right_without_a_tokenizer",
        "Is right on models that have no tokenizer.",
        ("95",),
        right_where(without_a_tokenizer),
    ),
    Mutant(
        "right_at_known_widths",
        "Is right on models as wide as those the suite publishes.",
        ("95",),
        right_where(of_a_known_width),
    ),
)
