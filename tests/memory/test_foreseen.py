"""The estimate against the peak of a real run, on every backend that is ready here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from memory.measuring import Peaks, peaks

from qlora_hal.discovery import listed, load_spec
from qlora_hal_conformance.subject import Reference

MARGIN = 1.1
"""A peak may be this many times the estimate. Users plan with it: a tenth is what allocators round up."""

READY = [entry.name for entry in listed() if load_spec(entry).probe().ready]


def stays_within(found: Peaks) -> bool:
    """The whole peak, and what the large batch added: activations alone."""
    added, foreseen = found.large - found.small, found.foreseen_large - found.foreseen_small
    return found.large <= MARGIN * found.foreseen_large and added <= MARGIN * foreseen


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("backend", READY)
def test_a_peak_stays_within_the_estimate(backend: str, checkpointing: bool, tmp_path: Path) -> None:
    found = peaks(Reference(backend), tmp_path / "model", checkpointing=checkpointing)
    assert found.large > 0
    assert stays_within(found), found


def test_the_reference_is_foreseen_when_its_constants_are_true(tmp_path: Path) -> None:
    assert stays_within(peaks(_reference("FORESEEN"), tmp_path / "model", checkpointing=False))


def test_a_backend_that_tells_of_half_its_activations_is_caught(tmp_path: Path) -> None:
    assert not stays_within(peaks(_reference("HALF_FORESEEN"), tmp_path / "model", checkpointing=False))


def test_a_backend_whose_checkpointing_saves_nothing_is_caught(tmp_path: Path) -> None:
    assert not stays_within(peaks(_reference("FORESEEN"), tmp_path / "model", checkpointing=True))


def test_a_peak_is_that_of_the_process_alone(tmp_path: Path) -> None:
    """A program that holds 3 GB and starts a run does not make it one of 3 GB."""
    ballast = np.ones(3 * 2**30 // 8)
    found = peaks(Reference("cpu_torch"), tmp_path / "model", checkpointing=False)
    assert found.large < ballast.nbytes / 2


def _reference(name: str) -> Reference:
    return Reference(spec=f"measured_reference:{name}")
