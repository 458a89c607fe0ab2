"""The measurement of first steps: what it compares, and that its mutant only changes the order of sums."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from qlora_hal.contract.values import Adapter
from qlora_hal_oracle import LoraScale, OracleTrainer
from qlora_hal_oracle.random_models import SHAPES, draw_tensors

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.start_signs import Model, Order, batch_of, compared, first_adapter


def test_channels_in_another_order_are_the_same_model() -> None:
    random = np.random.default_rng(5)
    shape = SHAPES[0]
    tensors = draw_tensors(shape, random)
    window = [batch_of(random.integers(3, shape.vocab_size, (2, 9)).astype(np.int32))]
    adapter = first_adapter(Model("drawn", shape, tensors, window))
    order = Order(random.permutation(shape.hidden_size), random.permutation(shape.intermediate_size))
    there = order.adapter(adapter)
    scale = LoraScale(adapter.config.alpha, adapter.config.r, False)
    usual = OracleTrainer(shape, tensors, adapter.tensors, scale).gradients(window)
    other = OracleTrainer(shape, order.weights(shape, tensors), there.tensors, scale).gradients(window)
    expected = order.adapter(Adapter(usual, adapter.config)).tensors  # type: ignore[arg-type]
    for name, gradient in expected.items():
        np.testing.assert_allclose(other[name], gradient, rtol=1e-9, atol=1e-12)
    assert any(not np.array_equal(other[name], gradient) for name, gradient in expected.items() if "lora_B" in name)


def test_signs_count_by_the_size_of_the_update() -> None:
    reference = np.array([3.0, -1.0, 0.5, -0.5])
    found = compared(np.array([3.0, -1.0, -0.5, -0.5]), reference)
    assert found["share_of_update"] == pytest.approx(0.5 / 5.0)
    assert found["share_of_entries"] == 0.25
    assert found["distance"] == pytest.approx(1.0 / np.linalg.norm(reference))
