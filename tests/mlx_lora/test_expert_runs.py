"""A mixture of experts on MLX from its folder to an adapter that mlx-lm opens; begun there and ended on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from small_runs import SMALL, merged
from tiny_models import write_model

from qlora_hal import resume, train
from qlora_hal.adapter import read_adapter, write_mlx_adapter
from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Batch
from qlora_hal.demo import model_path
from qlora_hal.errors import ModelError, UnsupportedFeatureError
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.mlx_lora.trainer import MLXLoRATrainer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SETTINGS = {
    "training.max_steps": 4, "checkpoint.save_steps": 2, "data.max_seq_length": 64, "lora.r": 4,
    "backend.name": "mlx_lora", "quantization.compute_dtype": "float32",
}  # fmt: skip
# Two float32 programs of the same products in another order: see test_architectures.
FLOAT32 = 8 * 2048**0.5 * 2**-24


def mixture(folder: Path, model_type: str) -> Path:
    """A random model with the demo's tokenizer, and the keys that mlx-lm reads where transformers 5 has others."""
    vocabulary = read_facts(model_path()).vocabulary_size
    write_model(folder, model_type, vocab_size=vocabulary, max_position_embeddings=1024)
    for name in TOKENIZER_FILES:
        shutil.copyfile(model_path() / name, folder / name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"num_experts": 4, "rope_theta": 10000.0, **config}))
    return folder


def settings(base: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    own = {**SETTINGS, "model.name_or_path": str(base), "output_dir": str(folder)}
    return merged(SMALL, {**own, **changes})


def killed(config: dict[str, Any]) -> None:
    """A run that ends while it saves its second checkpoint: the first is safe."""
    program = f"import json\nfrom qlora_hal import train\ntrain(json.loads({json.dumps(config)!r}))"
    environment = {**os.environ, "QLORA_HAL_FAULTS": "ckpt.before_rename:kill@2"}
    subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=False)


@pytest.mark.slow
def test_a_run_writes_an_adapter_with_which_mlx_lm_has_the_same_logits(tmp_path: Path) -> None:
    base = mixture(tmp_path / "base", "qwen3_moe")
    result = train(settings(base, tmp_path / "run", **{"quantization.weight_format": "none"}))
    adapter = read_adapter(result.adapter_dir)
    stacks = [name for name, tensor in adapter.tensors.items() if tensor.ndim == 3]
    assert len(stacks) == 12
    assert all(adapter.tensors[name].any() for name in stacks)
    modules = read_facts(base).linear_modules
    facts: dict[str, Any] = {"base_name": str(base), "base_revision": None, "provenance": {}}
    write_mlx_adapter(tmp_path / "mlx", adapter, linear_modules=modules, **facts)
    tokens = np.array([[5, 17, 210, 33, 8, 150, 64]], np.int32)
    model = load_adapters(load_model(base)[0], str(tmp_path / "mlx"))
    model.eval()
    expected = np.array(model(mx.array(tokens)).astype(mx.float32))
    trainer = MLXLoRATrainer()
    trainer.load(ModelSource.in_folder(base), Quantization(WeightFormat.NONE), Compute("float32"))
    trainer.attach(adapter)
    places = np.arange(tokens.shape[1], dtype=np.int32)[None]
    found = trainer.logits(Batch(tokens, tokens, places, np.ones_like(tokens)))
    assert np.abs(found - expected).max() <= FLOAT32 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("backends", [("mlx_lora", "cpu_torch"), ("cpu_torch", "mlx_lora")], ids="-".join)
def test_a_run_on_packed_experts_goes_on_on_another_backend(backends: tuple[str, str], tmp_path: Path) -> None:
    """NF4 has the same bits on both, experts among them: nothing is inexact, and the predictions agree."""
    base, folder = mixture(tmp_path / "base", "qwen3_moe"), tmp_path / "run"
    packed = {"quantization.weight_format": "nf4", "quantization.double_quant": False}
    killed(settings(base, folder, **{**packed, "backend.name": backends[0]}))
    moved = resume(folder, backend=backends[1])
    assert (moved.backend, moved.steps, moved.weight_format) == (backends[1], 4, "nf4")
    (told,) = json.loads((folder / "run.json").read_text())["hand_overs"]
    assert (told["from_backend"], told["to_backend"], told["inexact"]) == (*backends, [])
    # The same weights, bit for bit: what is left is rounding. The random model's best tokens are nearly tied.
    assert told["gap"]["kl_max"] < 1e-9


def test_a_mixture_whose_experts_mlx_does_not_train_is_refused_in_a_dry_run(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "afmoe")
    with pytest.raises(UnsupportedFeatureError, match="mlx_lora does not train the experts") as refused:
        train(settings(base, tmp_path / "run"))
    assert refused.value.code == "QH-U25"
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.fault("C72")
def test_a_mixture_that_mlx_lm_quantized_is_refused_by_name(tmp_path: Path) -> None:
    """mlx-lm's own folder of it, made by mlx-lm."""
    source = mixture(tmp_path / "hub", "qwen3_moe")
    model, config = load_model(source)
    model, config = quantize_model(model, config, group_size=32, bits=4)
    save_model(tmp_path / "mlx", model)
    save_config(config, tmp_path / "mlx" / "config.json")
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, tmp_path / "mlx" / name)
    (tmp_path / "rows.jsonl").write_text("nothing that could be read")
    changes = {"backend.allow_cpu": True, "data.path": str(tmp_path / "rows.jsonl")}
    with pytest.raises(ModelError, match=r"as mlx-lm stacks it.*switch_mlp") as refusal:
        train(settings(tmp_path / "mlx", tmp_path / "run", **changes), dry_run=True)
    assert refusal.value.code == "QH-C72"
