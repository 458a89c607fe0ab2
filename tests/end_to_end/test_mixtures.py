"""A mixture of experts from its folder to an adapter that PEFT opens, a resume, and a merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_models import write_drawn_model
from fused_models import attach_in_torch
from safetensors.numpy import load_file
from small_runs import SMALL, merged
from tiny_models import write_model
from trainers import random_batch, source_of

from qlora_hal import TrainResult, merge, resume, train
from qlora_hal.adapter import read_adapter
from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.demo import data_path, model_path
from qlora_hal.errors import ConfigError, ModelError, UnsupportedFeatureError
from qlora_hal.model.facts import read_facts
from qlora_hal_backends.cpu_torch.trainer import open_trainer
from qlora_hal_backends.torch_family import fused

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SETTINGS = {"training.max_steps": 4, "checkpoint.save_steps": 2, "data.max_seq_length": 64, "lora.r": 4}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_the_demos_tokenizer(tmp_path_factory.mktemp("qwen3_moe"), "qwen3_moe")


@pytest.fixture(scope="module")
def with_a_dense_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """And shared experts beside the routed ones."""
    return with_the_demos_tokenizer(tmp_path_factory.mktemp("deepseek_v3"), "deepseek_v3")


def with_the_demos_tokenizer(folder: Path, kind: str) -> Path:
    """A random mixture."""
    vocabulary = read_facts(model_path()).vocabulary_size
    write_model(folder, kind, vocab_size=vocabulary, max_position_embeddings=1024)
    for name in TOKENIZER_FILES:
        shutil.copyfile(model_path() / name, folder / name)
    return folder


def settings(mixture: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    base = {**SETTINGS, "model.name_or_path": str(mixture), "output_dir": str(folder)}
    return merged(SMALL, {**base, **changes})


opened_by_peft = pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


@opened_by_peft
def test_train_writes_an_adapter_that_peft_opens_with_the_trainers_logits(mixture: Path, tmp_path: Path) -> None:
    result = train(settings(mixture, tmp_path / "run", **{"quantization.weight_format": "none"}))
    adapter = read_adapter(result.adapter_dir)
    stacks = [name for name, tensor in adapter.tensors.items() if tensor.ndim == 3]
    assert len(stacks) == 12
    assert all(adapter.tensors[name].any() for name in stacks)
    check_peft_has_the_trainers_logits(mixture, result.adapter_dir)


@opened_by_peft
@pytest.mark.parametrize(
    "chosen",
    [
        {"lora.experts": "none"},
        {"lora.experts": "shared"},
        {"lora.target_modules": r"model\.layers\.0\.mlp\..*"},
        {"lora.target_modules": r".*shared_experts\.down_proj"},
    ],
    ids=["no expert", "shared experts", "a dense layer", "one projection of shared experts"],
)
def test_peft_takes_dense_layers_of_a_mixture_for_what_they_are(
    chosen: dict[str, str], with_a_dense_layer: Path, tmp_path: Path
) -> None:
    """Their names are those of the experts' projections, which PEFT looks for first."""
    run = {"quantization.weight_format": "none", "training.learning_rate": 1e-2, **chosen}
    result = train(settings(with_a_dense_layer, tmp_path / "run", **run))
    assert not any(tensor.ndim == 3 for tensor in read_adapter(result.adapter_dir).tensors.values())
    check_peft_has_the_trainers_logits(with_a_dense_layer, result.adapter_dir)


def check_peft_has_the_trainers_logits(base: Path, adapter_dir: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    batch = random_batch(0, vocabulary=4096)
    trainer = open_trainer()
    trainer.load(source_of(base), Quantization(WeightFormat.NONE), Compute())
    trainer.attach(read_adapter(adapter_dir))
    ours, ids = trainer.logits(batch), torch.from_numpy(batch.input_ids).long()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        without = model(input_ids=ids).logits.numpy()
        expected = PeftModel.from_pretrained(model, adapter_dir).eval()(input_ids=ids).logits.numpy()
    # Float32 sums of at most 96 terms in another order.
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(ours - without).max() > 1e-3 * np.abs(without).max(), "the adapter moves the logits"


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_resumed_run_ends_with_the_same_bits(optimizer: str, mixture: Path, tmp_path: Path) -> None:
    extra = {"training.optim": optimizer, "training.weight_decay": 0.1}
    resumed, whole = resumed_and_whole(mixture, tmp_path, **extra)
    assert same_bits(resumed, whole)


@pytest.mark.parametrize("kind", ["olmoe", "glm4_moe"])
def test_a_resumed_run_of_fused_layers_ends_with_the_same_bits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, packed rows and recomputation; evaluations are those of the plain layers."""
    folder = with_the_demos_tokenizer(tmp_path / "model", kind)
    extra = {"lora.dropout": 0.1, "lora.experts": "none", "data.packing": True, "training.recompute": "full"}
    extra |= evaluated(tmp_path)
    plain = train(settings(folder, tmp_path / "plain", **extra))
    monkeypatch.setattr(fused, "try_attach", attach_in_torch)
    resumed, whole = resumed_and_whole(folder, tmp_path, **extra)
    record = json.loads((tmp_path / "broken" / "run.json").read_text())
    assert "fused layers" in record["resolved"]["kernel_path"]
    assert same_bits(resumed, whole)
    # Rounding in other orders, which Adam divides by the size of a gradient.
    assert whole.eval_loss_after == pytest.approx(plain.eval_loss_after, rel=1e-4)


def resumed_and_whole(model: Path, tmp_path: Path, **extra: Any) -> tuple[TrainResult, TrainResult]:
    """A run that goes on from its first half, and the run that was not interrupted."""
    whole = train(settings(model, tmp_path / "whole", **extra))
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for newer in (tmp_path / "broken").glob("checkpoints/*4"):
        shutil.rmtree(newer)
    shutil.rmtree(tmp_path / "broken" / "adapter")
    resumed = resume(tmp_path / "broken")
    assert resumed.steps == whole.steps == 4
    return resumed, whole


@pytest.mark.parametrize("base", ["none", "nf4"])
def test_a_merge_writes_the_layout_that_the_folder_has(base: str, mixture: Path, tmp_path: Path) -> None:
    result = train(settings(mixture, tmp_path / "run", **{"quantization.weight_format": base}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(data_path("validation").read_text().splitlines(keepends=True)[:8]))
    done = merge(result.adapter_dir, tmp_path / "merged", rows=rows, backend="cpu_torch", row_limit=8, dtype="float32")
    assert done.kl <= done.max_kl < 1e-8
    before, after = (load_file(folder / "model.safetensors") for folder in (mixture, tmp_path / "merged"))
    assert {name: tensor.shape for name, tensor in before.items()} == {n: tensor.shape for n, tensor in after.items()}
    name = "model.layers.0.mlp.experts.2.up_proj"
    adapter = load_file(result.adapter_dir / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
    moved = after[f"{name}.weight"] - before[f"{name}.weight"]
    if base == "none":
        np.testing.assert_allclose(moved, 16 / 4 * (b @ a), atol=1e-6)
    assert np.abs(moved).max() > 0


@opened_by_peft
@pytest.mark.slow
@pytest.mark.parametrize("base", ["none", "nf4"])
@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe"])
def test_experts_in_one_tensor_merge_into_the_layout_of_the_hub(kind: str, base: str, tmp_path: Path) -> None:
    """Gate and up in turns, or under names of their own; transformers opens the folder with the adapter's logits."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "base"
    vocabulary = read_facts(model_path()).vocabulary_size
    write_drawn_model(folder, kind, {"vocab_size": vocabulary, "max_position_embeddings": 1024})
    for name in TOKENIZER_FILES:
        shutil.copyfile(model_path() / name, folder / name)
    changes = {"quantization.weight_format": base, "data.packing": False, "training.learning_rate": 1e-2}
    result = train(settings(folder, tmp_path / "run", **changes))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(data_path("validation").read_text().splitlines(keepends=True)[:8]))
    done = merge(result.adapter_dir, tmp_path / "merged", rows=rows, backend="cpu_torch", row_limit=8, dtype="float32")
    assert done.kl <= done.max_kl < 1e-8
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "merged"))
    assert {name: tensor.shape for name, tensor in before.items()} == {n: tensor.shape for n, tensor in after.items()}
    if base == "none":
        check_peft_has_the_trainers_logits(folder, result.adapter_dir)
        batch = random_batch(0, vocabulary=4096)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        with torch.no_grad():
            found = model(input_ids=torch.from_numpy(batch.input_ids).long()).logits.numpy()
        trainer = open_trainer()
        trainer.load(source_of(folder), Quantization(WeightFormat.NONE), Compute())
        trainer.attach(read_adapter(result.adapter_dir))
        expected = trainer.logits(batch)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_only_attention_is_adapted_without_experts(mixture: Path, tmp_path: Path) -> None:
    result = train(settings(mixture, tmp_path / "run", **{"lora.experts": "none"}))
    modules = read_adapter(result.adapter_dir).config.target_modules
    assert {module.split(".")[3] for module in modules} == {"self_attn"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"lora.experts": "shared"}, "QH-U23"),
        ({"lora.dropout": 0.1}, "QH-U24"),
        ({"lora.target_modules": ["gate_proj"]}, "QH-U22"),
        ({"lora.target_modules": ["up_proj", "gate_proj"], "lora.experts": "none"}, "QH-N13"),
        ({"backend.name": "gptq_int4", "backend.allow_cpu": True}, "QH-B01"),
    ],
)
def test_a_dry_run_refuses_before_it_reads_data(
    changes: dict[str, Any], code: str, mixture: Path, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("nothing that could be read")
    asked = settings(mixture, tmp_path / "run", **{"data.path": str(tmp_path / "rows.jsonl"), **changes})
    with pytest.raises((ConfigError, UnsupportedFeatureError)) as refusal:
        train(asked, dry_run=True)
    assert refusal.value.code == code, json.dumps(refusal.value.context)


def test_a_mixture_of_one_expert_is_refused_before_it_loads(tmp_path: Path) -> None:
    write_model(tmp_path / "one", "qwen3_moe", num_experts=1, num_local_experts=1, num_experts_per_tok=1)
    for name in TOKENIZER_FILES:
        shutil.copyfile(model_path() / name, tmp_path / "one" / name)
    with pytest.raises(ModelError) as refusal:
        train(settings(tmp_path / "one", tmp_path / "run"), dry_run=True)
    assert refusal.value.code == "QH-M51"


@pytest.mark.parametrize("rest", ["host", "disk"])
def test_a_run_whose_layers_are_on_the_host_ends_with_the_same_bits_and_so_does_its_resume(
    rest: str, mixture: Path, tmp_path: Path
) -> None:
    extra = {"training.recompute": "full", **evaluated(tmp_path)}
    moved = {"training.base_offload": ["layers"], "backend.options": {"offloaded_layers": rest}}
    whole = train(settings(mixture, tmp_path / "whole", **extra))
    streamed = train(settings(mixture, tmp_path / "streamed", **extra, **moved))
    for newer in (tmp_path / "streamed").glob("checkpoints/*4"):
        shutil.rmtree(newer)
    record = json.loads((tmp_path / "streamed" / "run.json").read_text())
    assert record["resolved"]["base_offload"] == ["layers"]
    assert same_bits(streamed, whole)
    assert streamed.eval_loss_after == whole.eval_loss_after
    shutil.rmtree(tmp_path / "streamed" / "adapter")
    assert same_bits(resume(tmp_path / "streamed"), whole)


def evaluated(folder: Path) -> dict[str, Any]:
    """Settings of evaluations within a run, of eight rows."""
    rows = folder / "validation.jsonl"
    rows.write_text("".join(data_path("validation").read_text().splitlines(keepends=True)[:8]))
    return {"data.validation_path": str(rows), "training.eval_steps": 2}


def same_bits(run: TrainResult, other: TrainResult) -> bool:
    found, expected = (load_file(one.adapter_dir / "adapter_model.safetensors") for one in (run, other))
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.usefixtures("usual_signals")
def test_devices_that_share_the_experts_end_with_the_bits_of_whole_ones_and_so_does_a_resume(
    mixture: Path, tmp_path: Path
) -> None:
    """Six sequences a step, of four experts a layer; three devices go on with what two began."""
    step = {"training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 1}
    step |= {"training.global_batch_size": 6, **evaluated(tmp_path)}
    asked = {mode: settings(mixture, tmp_path / mode, **step, **{"parallel.mode": mode}) for mode in ("data", "shard")}
    whole, shared = (train(one, devices=2) for one in asked.values())
    assert json.loads((tmp_path / "shard" / "run.json").read_text())["resolved"]["parallel_mode"] == "shard"
    assert same_bits(shared, whole)
    assert shared.eval_loss_after == whole.eval_loss_after
    for newer in (tmp_path / "shard").glob("checkpoints/*4"):
        shutil.rmtree(newer)
    shutil.rmtree(tmp_path / "shard" / "adapter")
    shutil.copytree(tmp_path / "shard", tmp_path / "of three", symlinks=True)
    assert same_bits(resume(tmp_path / "shard", devices=2), whole)
    of_three = resume(tmp_path / "of three", devices=3)
    assert of_three.eval_loss_after == pytest.approx(whole.eval_loss_after, rel=2e-5)
