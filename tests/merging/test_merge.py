"""Merged models of every weight format beside the adapter model, PEFT, transformers and mlx-lm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from trainers import open_cpu_trainer, random_batch, source_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_hal.adapter.naming import lora_a_key, lora_b_key
from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.errors import NumericsError
from qlora_hal.export import MergeRequest, carry_out, weights
from qlora_hal.export.rounding import UNIT_ROUNDOFF
from qlora_hal.report.console import RunConsole

pytestmark = pytest.mark.slow

FORMATS = [("none", False), ("nf4", True), ("nf4", False), ("fp4", True), ("int8", False)]
FAMILIES = ["qwen2", "gemma2", "phi", "phi3"]
MakeTrained = Callable[..., Any]


def opened_logits(folder: Path, input_ids: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(input_ids).long()).logits.numpy()  # type: ignore[type-arg]
    return logits


def adapter_logits(trained: Any, weight_format: str, double_quant: bool, batch: Any) -> np.ndarray:  # type: ignore[type-arg]
    from qlora_hal_backends.cpu_torch.trainer import open_trainer

    trainer = open_trainer()
    size = 64 if weight_format in ("nf4", "fp4") else None
    trainer.load(source_of(trained.model), Quantization(WeightFormat(weight_format), size, double_quant), Compute())
    trainer.attach(trained.adapter)
    return trainer.logits(batch)


@pytest.mark.parametrize(("weight_format", "double_quant"), FORMATS)
def test_merged_folder_opened_by_transformers_gives_the_adapters_logits(
    trained: MakeTrained, tmp_path: Path, weight_format: str, double_quant: bool
) -> None:
    one = trained(weight_format, double_quant=double_quant)
    result = one.merge(tmp_path / "merged", dtype="float32")
    batch = random_batch(3, vocabulary=4096)
    expected = adapter_logits(one, weight_format, double_quant, batch)
    found = opened_logits(tmp_path / "merged", batch.input_ids)
    # Reordered float32 sums of 128 terms through 14 layers; 6e-6 of the largest logit was the most seen.
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert result.kl <= result.max_kl < 1e-8
    assert result.top1 == 1.0
    assert result.base == ("original" if weight_format == "none" else "dequantized")


@pytest.mark.long
@pytest.mark.parametrize(("weight_format", "double_quant"), FORMATS[1:])
def test_base_that_was_trained_on_is_found_by_measuring_both(
    trained: MakeTrained, tmp_path: Path, weight_format: str, double_quant: bool
) -> None:
    result = trained(weight_format, double_quant=double_quant).merge(tmp_path / "merged", dtype="bfloat16")
    kl = json.loads((tmp_path / "merged/merge.json").read_text())["base"]["kl_mean"]
    assert result.base == "dequantized"
    assert kl["dequantized"] == result.kl <= result.max_kl
    assert kl["original"] > 10 * kl["dequantized"] or weight_format == "int8"
    assert kl["original"] > kl["dequantized"]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_merge_of_an_unquantized_base_is_pefts(
    trained: MakeTrained, tmp_path: Path, use_rslora: bool, family: str
) -> None:
    one = trained("none", use_rslora=use_rslora, family=family)
    one.merge(tmp_path / "merged", dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(one.model, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = peft.PeftModel.from_pretrained(base, str(one.folder)).merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged/model.safetensors")
    config = one.adapter.config
    for name, tensor in found.items():
        module = name.removesuffix(".weight")
        if module not in config.target_modules:
            assert torch.equal(tensor, before[name]), name
            continue
        a, b = one.adapter.tensors[lora_a_key(module)], one.adapter.tensors[lora_b_key(module)]
        # PEFT makes the product of r terms in float32, scales it, adds it: r + 2 roundings of what |B| |A| can reach.
        reach = config.scale * (np.abs(b) @ np.abs(a)) + np.abs(before[name].numpy())
        bound = (config.r + 4) * UNIT_ROUNDOFF["float32"] * reach
        assert (np.abs(tensor.numpy() - expected[name].numpy()) <= bound).all(), name
        assert not torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_merged_weight_is_the_dequantized_one_plus_the_product_rounded_once(
    trained: MakeTrained, tmp_path: Path, dtype: str
) -> None:
    one = trained("nf4", targets=["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
    one.merge(tmp_path / "merged", dtype=dtype)
    found = load_file(tmp_path / "merged/model.safetensors")
    opened = open_cpu_trainer(one.model, weight_format="nf4")
    stored = load_file(one.model / "model.safetensors")
    modules = opened.trainer.linear_modules()
    for module in modules:
        expected = opened.trainer.dequantized_weight(module).astype(np.float64)
        if module in one.adapter.config.target_modules:
            a, b = one.adapter.tensors[lora_a_key(module)], one.adapter.tensors[lora_b_key(module)]
            expected = expected + one.adapter.config.scale * (b.astype(np.float64) @ a.astype(np.float64))
        tensor = found[f"{module}.weight"]
        assert tensor.dtype == getattr(torch, dtype)
        # One rounding to dtype (half a unit more for subnormal float16), and before it two of float32.
        bound = (UNIT_ROUNDOFF[dtype] + 3 * UNIT_ROUNDOFF["float32"]) * np.abs(expected) + 2.0**-25
        assert (np.abs(tensor.double().numpy() - expected) <= bound).all()
    rest = {name for name in stored if name.removesuffix(".weight") not in modules}
    assert rest
    assert all(torch.equal(found[name], stored[name].to(found[name].dtype)) for name in rest)


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_and_tied_embeddings_come_along(trained: MakeTrained, tmp_path: Path, family: str) -> None:
    one = trained("nf4", family=family)
    one.merge(tmp_path / "merged")
    assert set(load_file(tmp_path / "merged/model.safetensors")) == set(load_file(one.model / "model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (
        family in ("qwen2", "gemma2")
    )


def test_folder_has_all_that_transformers_and_mlx_lm_open(trained: MakeTrained, tmp_path: Path, rows: Path) -> None:
    import mlx_lm

    one = trained("nf4")
    # The weights of this model take 6 MB in 16 bits; 2 MB a shard makes several.
    request = MergeRequest(one.folder, tmp_path / "merged", rows=str(rows), backend="cpu_torch", row_limit=8)
    carry_out(request, RunConsole(quiet=True), shard_bytes=500_000)
    shards = sorted((tmp_path / "merged").glob("model-*-of-*.safetensors"))
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert len(shards) > 1
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    text = "List the files of this folder."
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")(text)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(one.model)(text)["input_ids"]
    model, tokenizer = mlx_lm.load(str(tmp_path / "merged"))
    import mlx.core as mx

    logits = np.array(model(mx.array([ids])).astype(mx.float32))
    expected = opened_logits(tmp_path / "merged", np.array([ids], np.int32))
    # mlx computes in bfloat16: one rounding in each of 14 layers, of the largest logit.
    assert np.abs(logits - expected).max() <= 14 * UNIT_ROUNDOFF["bfloat16"] * np.abs(expected).max()
    assert tokenizer.encode(text) == ids
    assert "merge.json" in (tmp_path / "merged/README.md").read_text()


@pytest.mark.long
def test_one_call_twice_gives_the_same_bytes(trained: MakeTrained, tmp_path: Path) -> None:
    one = trained("nf4")
    first, second = (one.merge(tmp_path / name).record["files"] for name in ("first", "second"))
    assert first == second


@pytest.mark.long
@pytest.mark.fault("C21")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scale_that_was_dropped_is_caught_and_leaves_nothing(
    trained: MakeTrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    right = weights.add_product
    monkeypatch.setattr(weights, "add_product", lambda weight, a, b, scale: right(weight, a, b, 1.0))
    with pytest.raises(NumericsError) as caught:
        trained("nf4").merge(tmp_path / "merged", dtype=dtype)
    error = caught.value
    assert (error.code, error.exit_status) == ("QH-C21", 6)
    assert error.context["comparison"]["kl_mean"] > error.context["limits"]["max_kl"]  # type: ignore[index]
    assert "KL" in error.message
    assert "Nothing was written" in error.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter-nf4"]


@pytest.mark.parametrize("wrong", ["one module left out", "B and A of two modules swapped", "scale a tenth too large"])
def test_other_slips_are_caught(
    trained: MakeTrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    right, calls = weights.add_product, []

    def slipped(weight: Any, a: Any, b: Any, scale: float) -> None:
        calls.append(1)
        if wrong == "one module left out" and len(calls) == 5:
            return
        right(weight, a, b[::-1] if wrong.startswith("B") else b, scale * (1.1 if wrong.startswith("scale") else 1))

    monkeypatch.setattr(weights, "add_product", slipped)
    with pytest.raises(NumericsError, match="is not the adapter model"):
        trained("nf4").merge(tmp_path / "merged", base="dequantized", dtype="float16")


@pytest.mark.fault("C21")
def test_original_base_of_a_quantized_training_is_refused_unless_the_distance_is_stated(
    trained: MakeTrained, tmp_path: Path
) -> None:
    one = trained("nf4")
    with pytest.raises(NumericsError, match="KL") as caught:
        one.merge(tmp_path / "merged", base="original")
    assert "--base dequantized" in caught.value.fix
    assert not (tmp_path / "merged").exists()
    result = one.merge(tmp_path / "merged", base="original", max_kl=10.0, min_top1=0.0)
    assert result.base == "original"
    assert result.max_kl == 10.0


@pytest.mark.fault("C21")
def test_adapter_smaller_than_the_rounding_is_not_merged_into_bfloat16(trained: MakeTrained, tmp_path: Path) -> None:
    one = trained("nf4", strength=0.002)
    with pytest.raises(NumericsError, match="a tenth of what the adapter changes") as caught:
        one.merge(tmp_path / "merged", base="dequantized")
    assert "float32" in caught.value.fix
    assert one.merge(tmp_path / "merged", base="dequantized", dtype="float32").kl < 1e-8


@pytest.mark.long
def test_a_base_quantized_in_bfloat16_is_compared_in_float32_where_the_files_are_bfloat16(
    trained: MakeTrained, tmp_path: Path
) -> None:
    exact = trained("nf4", dtype="bfloat16", compute_dtype="bfloat16").merge(tmp_path / "exact")
    assert exact.record["compute"]["dtype"] == "float32"  # type: ignore[index]
    finer = trained("nf4", dtype="float32", compute_dtype="bfloat16").merge(tmp_path / "finer")
    assert finer.record["compute"]["dtype"] == "bfloat16"  # type: ignore[index]
    assert "quantized from its weights in bfloat16" in finer.record["compute"]["why"]  # type: ignore[index]
    assert finer.base == "dequantized"


def test_codes_do_not_depend_on_the_compute_dtype_when_the_files_hold_it(base_model: Callable[..., Path]) -> None:
    folder = base_model("llama", "bfloat16")
    in_float32, in_bfloat16 = (open_cpu_trainer(folder, weight_format="nf4", dtype=d) for d in ("float32", "bfloat16"))
    for module in in_float32.trainer.linear_modules():
        wide = torch.from_numpy(in_float32.trainer.dequantized_weight(module))
        narrow = torch.from_numpy(in_bfloat16.trainer.dequantized_weight(module))
        assert torch.equal(wide.to(torch.bfloat16).float(), narrow)
