"""The merged model written as NF4 opens as bitsandbytes' own, and serves as a base whose original is gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional as codec
from safetensors.torch import load_file
from trainers import moved_adapter, source_of
from transformers import AutoModelForCausalLM

from qlora_hal import merge
from qlora_hal.adapter import write_adapter
from qlora_hal.contract.values import AdapterConfig
from qlora_hal.errors import ConfigError
from qlora_hal.formats import nf4

MakeTrained = Callable[..., Any]


@pytest.mark.parametrize("shape", [(64, 128), (3, 64), (5, 26)])
def test_codes_and_scales_are_bitsandbytes(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    weight[0, :7] = 0.0
    found = nf4.packed("layer", weight, "float32")
    expected, state = codec.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type="nf4")
    assert np.array_equal(found["layer.weight.absmax"], state.absmax.numpy())
    assert np.array_equal(found["layer.weight.quant_map"], state.code.numpy())
    # Only a value at the middle of two codes may fall to either side; random ones do not.
    count = shape[0] * shape[1]
    assert np.array_equal(found["layer.weight"].reshape(-1)[: count // 2], expected.numpy().reshape(-1)[: count // 2])


def test_nf4_folder_opens_in_transformers_and_is_measured(trained: MakeTrained, tmp_path: Path) -> None:
    result = trained("nf4").merge(tmp_path / "merged", requantize="nf4")
    folder = tmp_path / "merged/nf4"
    figures = json.loads((tmp_path / "merged/merge.json").read_text())["requantized"]
    assert figures["folder"] == "nf4"
    assert figures["kl_mean"] > result.kl
    assert figures["top1"] > 0.3  # of 4096 words
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "Linear4bit" in {type(module).__name__ for module in model.modules()}
    assert source_of(folder).facts.prequantized.weight_format == "nf4"
    merged = load_file(tmp_path / "merged/model.safetensors")["model.layers.0.mlp.up_proj.weight"].float()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    opened = codec.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    # Half the widest gap of the codebook, 0.152, times the largest weight of the block; bfloat16 once more.
    assert (opened - merged).abs().max() <= (0.152 + 2**-8) * merged.abs().max()


@pytest.mark.long
def test_adapter_on_a_base_that_is_stored_quantized_merges_into_it(trained: MakeTrained, tmp_path: Path) -> None:
    one = trained("nf4")
    one.merge(tmp_path / "first", requantize="nf4")
    base = tmp_path / "first/nf4"
    facts = source_of(base).facts
    config = AdapterConfig(4, 8.0, 0.0, False, tuple(sorted(facts.linear_modules)))
    provenance = {
        "base_fingerprint": facts.fingerprint,
        "weight_format": "nf4",
        "block_size": 64,
        "double_quant": False,
    }
    write_adapter(
        tmp_path / "second adapter",
        moved_adapter(config, dict(facts.linear_modules)),
        base_name=str(base),
        base_revision=None,
        provenance={**provenance, "compute_dtype": "bfloat16", "backend": "cpu_torch"},
    )
    choices: dict[str, Any] = {"rows": one.rows, "backend": "cpu_torch", "row_limit": 8}
    result = merge(tmp_path / "second adapter", tmp_path / "second", **choices)
    assert result.base == "dequantized"
    assert result.record["compute"]["dtype"] == "float32"  # type: ignore[index]
    names = set(load_file(tmp_path / "second/model.safetensors"))
    assert names == set(load_file(one.model / "model.safetensors"))
    assert "quantization_config" not in json.loads((tmp_path / "second/config.json").read_text())
    with pytest.raises(ConfigError, match="holds no other weights") as caught:
        merge(tmp_path / "second adapter", tmp_path / "third", base="original", **choices)
    assert caught.value.code == "QH-C62"


@pytest.mark.slow
@pytest.mark.parametrize(("strength", "is_lost"), [(0.01, True), (3.0, False)])
def test_a_format_in_which_the_adapter_is_lost_is_said(
    strength: float, is_lost: bool, trained: MakeTrained, tmp_path: Path
) -> None:
    """What a young adapter changes is below the steps between the codes of NF4: rounding takes it back."""
    found = trained("nf4", strength=strength).merge(tmp_path / "merged", requantize="nf4", dtype="float32")
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert (record["requantized"]["kl_mean"] >= record["comparison"]["kl_of_base"] / 2) is is_lost
    assert any("lost much of what was learnt" in note for note in found.notes) is is_lost
    assert record["notes"] == list(found.notes)
