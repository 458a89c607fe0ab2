"""Peaks are measured in a process of its own, and are that process's alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal_conformance.measuring import Measurement, peaks_in_child
from qlora_hal_conformance.subject import Reference
from qlora_hal_oracle.random_models import SHAPES, draw_tensors, write_model


@pytest.mark.long
def test_program_that_holds_much_does_not_raise_the_peak_of_a_run(tmp_path: Path) -> None:
    """Linux's `ru_maxrss` survives exec: read from there, this run would be one of 3 GB."""
    ballast = np.ones(3 * 2**30 // 8)
    shape = SHAPES[0]
    model = write_model(tmp_path / "model", shape, draw_tensors(shape, np.random.default_rng(0)))
    work = Measurement(
        Reference("cpu_torch"), model.folder, Quantization(WeightFormat.NF4, 64), "float32", False, ((1, 8), (2, 16)), 0
    )
    before, after = peaks_in_child(work, shape, tmp_path)
    assert 0 < before <= after < ballast.nbytes / 2
