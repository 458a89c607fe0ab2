"""The same merge where PEFT refuses: bases that MLX and GPTQ hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from trainers import moved_adapter, source_of

from qlora_hal import merge
from qlora_hal.adapter import write_adapter
from qlora_hal.contract.values import AdapterConfig
from qlora_hal.formats.mlx_affine import codes_of

pytestmark = pytest.mark.slow

MakeTrained = Callable[..., Any]


@pytest.mark.parametrize("weight_format", ["int4_affine", "int8_affine"])
def test_base_that_mlx_quantized_while_loading(trained: MakeTrained, tmp_path: Path, weight_format: str) -> None:
    one = trained(weight_format, backend="mlx_lora")
    result = one.merge(tmp_path / "merged", dtype="float32")
    assert result.base == "dequantized"
    assert result.kl <= result.max_kl < 1e-8
    assert result.record["base"]["trained_as"]["weight_format"] == weight_format  # type: ignore[index]
    assert result.record["base"]["kl_mean"]["original"] > 100 * result.kl  # type: ignore[index]


def adapter_on(base: Path, folder: Path, backend: str, weight_format: str) -> Path:
    """An adapter on a base that is stored quantized."""
    facts = source_of(base).facts
    assert facts.prequantized is not None
    write_adapter(
        folder,
        moved_adapter(
            AdapterConfig(4, 8.0, 0.0, False, tuple(sorted(facts.linear_modules))), dict(facts.linear_modules)
        ),
        base_name=str(base),
        base_revision=None,
        provenance={
            "base_fingerprint": facts.fingerprint,
            "weight_format": weight_format,
            "block_size": facts.prequantized.block_size,
            "double_quant": False,
            "compute_dtype": "float32",
            "backend": backend,
        },
    )
    return folder


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_checkpoint_whose_embedding_is_packed_as_well(
    base_model: Callable[..., Path], rows: Path, tmp_path: Path, bits: int
) -> None:
    from mlx_lm import convert

    model = base_model("llama")
    convert(str(model), mlx_path=str(tmp_path / "base"), quantize=True, q_bits=bits, q_group_size=64, dtype="float32")
    adapter = adapter_on(tmp_path / "base", tmp_path / "adapter", "mlx_lora", f"int{bits}_affine")
    result = merge(adapter, tmp_path / "merged", dtype="float32", rows=rows, row_limit=8)
    assert result.base == "dequantized"
    assert result.kl <= result.max_kl < 1e-8
    stored, original = load_file(tmp_path / "merged/model.safetensors"), load_file(model / "model.safetensors")
    assert set(stored) == set(original)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        steps = np.ptp(original[name].reshape(-1, 64), axis=1).repeat(64).reshape(original[name].shape) / (2**bits - 1)
        # MLX moves the grid so that 0 falls on it: up to one step, not half.
        assert (np.abs(stored[name] - original[name]) <= 1.01 * steps).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_of_every_width_are_mlxs(bits: int) -> None:
    import mlx.core as mx

    weight = np.random.default_rng(bits).standard_normal((4, 128), dtype=np.float32)
    packed, scales, biases = mx.quantize(mx.array(weight), group_size=64, bits=bits)
    codes = codes_of(np.array(packed), bits).reshape(4, 2, 64)
    ours = codes * np.array(scales)[..., None] + np.array(biases)[..., None]
    expected = np.array(mx.dequantize(packed, scales, biases, group_size=64, bits=bits))
    # One rounding of the product and one of the sum.
    assert np.abs(ours.reshape(4, 128) - expected).max() <= 2.0**-22 * np.abs(expected).max()


@pytest.mark.long
def test_gptq_model_made_from_a_merge_is_a_base_that_merges_again(trained: MakeTrained, tmp_path: Path) -> None:
    first = trained("nf4").merge(tmp_path / "first", base="dequantized", requantize="int4_gptq")
    assert first.record["requantized"]["kl_mean"] > first.kl  # type: ignore[index]
    assert not any("merging" in note for note in first.record["notes"])  # type: ignore[attr-defined]
    adapter = adapter_on(tmp_path / "first/int4_gptq", tmp_path / "adapter", "gptq_int4", "int4_gptq")
    result = merge(adapter, tmp_path / "second", dtype="float32", rows=trained("nf4").rows, row_limit=8)
    assert result.base == "dequantized"
    assert result.kl <= result.max_kl < 1e-8
    assert result.record["compute"]["backend"] == "gptq_int4"  # type: ignore[index]
    assert result.record["compute"]["merged_backend"] == "cpu_torch"  # type: ignore[index]
