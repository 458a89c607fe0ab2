"""Products in 8-bit floats, as the oracle computes them: against torch's E4M3, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch, draw_wide_rows
from qlora_hal_oracle import EXACT, Fp8Products, LoraScale, OracleTrainer
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.fp8 import row_scaled, row_scales, to_e4m3
from qlora_hal_oracle.lora import BackwardRun
from qlora_hal_oracle.microscaling import E4M3
from qlora_hal_oracle.random_models import SHAPES


def test_e4m3_is_that_of_torch() -> None:
    """Every number between and beyond: ties, subnormals, what underflows, and the largest."""
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    known = np.unique(E4M3[~np.isnan(E4M3)])
    values = np.concatenate(
        [known, (known[1:] + known[:-1]) / 2.0, random.normal(size=4000) * 2.0 ** random.integers(-14, 9, 4000)]
    ).clip(-448.0, 448.0)
    values = values.astype(np.float32).astype(np.float64)
    expected = torch.tensor(values, dtype=torch.float32).to(torch.float8_e4m3fn).to(torch.float64).numpy()
    assert np.array_equal(to_e4m3(values), expected)


def test_nothing_goes_beyond_the_largest() -> None:
    assert to_e4m3(np.array([447.0, 449.0, 1e6, -1e6])).tolist() == [448.0, 448.0, 448.0, -448.0]


def test_each_row_has_its_own_scale_and_zeros_have_one() -> None:
    values = np.array([[0.0, 0.0], [448.0, 1.0], [2.0**-20, -(2.0**-21)]])
    scales = row_scales(values)
    assert scales[:2, 0].tolist() == [1.0, 1.0]
    held = row_scaled(values)
    assert held.elements[2].tolist() == [448.0, -224.0]
    np.testing.assert_allclose(held.values, values, rtol=2.0**-4)


def test_gradient_is_that_of_the_product_with_the_rounded_weight() -> None:
    """With inputs and gradients as they are, gradients are those of a model whose base is the rounded one."""
    random = np.random.default_rng(1)
    shape, tensors = draw_wide_rows(random, SHAPES[0])
    adapter, batch = draw_adapter(random, shape, rank=4), draw_batch(random, shape)
    scale = LoraScale(adapter.config.alpha, adapter.config.r)
    weights = Fp8Products(inputs=False, gradients=False)
    rounded = {
        name: row_scaled(tensor.astype(np.float64)).values if name.endswith("proj.weight") else tensor
        for name, tensor in tensors.items()
    }
    found = OracleTrainer(shape, tensors, adapter.tensors, scale, fp8=weights).gradients([batch])
    expected = OracleTrainer(shape, rounded, adapter.tensors, scale).gradients([batch])  # type: ignore[arg-type]
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_a_product_is_the_sum_of_the_rounded_rows() -> None:
    """Forward and back, element by element as the contract writes them; the adapter's path sees no rounding."""
    random = np.random.default_rng(2)
    shape, tensors = draw_wide_rows(random, SHAPES[0])
    adapter = draw_adapter(random, shape, rank=4)
    scale = LoraScale(adapter.config.alpha, adapter.config.r)
    model = OracleTrainer(shape, tensors, adapter.tensors, scale, fp8=Fp8Products()).model
    linear = model.linear("model.layers.0.mlp.up_proj")
    assert linear.lora_a is not None
    assert linear.lora_b is not None
    x, g = random.normal(size=(1, 5, 128)), random.normal(size=(1, 5, len(linear.weight)))
    s = _scales(linear.weight)
    e = to_e4m3(linear.weight / s[:, None])
    y, trace = linear.forward(x, EXACT)
    a = _scales(x[0])
    low_rank = scale.factor * x[0] @ linear.lora_a.T @ linear.lora_b.T
    expected = (to_e4m3(x[0] / a[:, None]) @ e.T) * a[:, None] * s + low_rank
    np.testing.assert_allclose(y[0], expected, rtol=1e-9, atol=1e-9)
    h = g[0] * s
    c = _scales(h)
    expected = c[:, None] * (to_e4m3(h / c[:, None]) @ e) + scale.factor * g[0] @ linear.lora_b @ linear.lora_a
    found = linear.backward(g, trace, BackwardRun(EXACT, False))
    np.testing.assert_allclose(found[0], expected, rtol=1e-9, atol=1e-9)


def _scales(rows: Float64) -> Float64:
    found = np.abs(rows).max(axis=1).astype(np.float32) / np.float32(448.0)
    return np.where(found == 0.0, 1.0, found).astype(np.float64)
