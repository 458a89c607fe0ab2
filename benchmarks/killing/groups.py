"""What is trained: a model of two small layers with the demo's tokenizer, few short rows, and groups of options."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.demo import data_path, model_path
from qlora_hal_oracle import LlamaShape
from qlora_hal_oracle.random_models import draw_tensors, write_model, write_quantized

Settings = Mapping[str, Any]

SHAPE = LlamaShape(
    vocab_size=4096,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
)
_SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_TRAINED_ROWS, _HELD_OUT_ROWS, _LONGEST = 48, 6, 220

BASE: Settings = {
    "data.max_seq_length": 64,
    "data.truncation": "drop",
    "lora.r": 4,
    "lora.alpha": 8,
    "training.learning_rate": 5e-3,
    "training.max_steps": 9,
    "training.per_device_train_batch_size": 2,
    "training.seed": 7,
    "checkpoint.save_steps": 2,
}

EVALUATED: Settings = {"data.validation_path": "validation.jsonl", "training.eval_steps": 3}

GROUPS: Mapping[str, Settings] = {
    "plain": {},
    "packing and accumulation": {"data.packing": True, "training.gradient_accumulation_steps": 3},
    "dropout, decay, rsLoRA": {
        "lora.dropout": 0.3,
        "lora.use_rslora": True,
        "training.weight_decay": 0.1,
        "training.lr_scheduler_type": "cosine",
    },
    "8-bit optimizer": {"training.optim": "adamw_8bit", **EVALUATED},
    "paged optimizer": {"training.optim": "paged_adamw", "training.gradient_accumulation_steps": 2},
    "paged 8-bit optimizer": {"training.optim": "paged_adamw_8bit", "data.packing": True},
    "evaluation and samples": {**EVALUATED, "training.sample_prompts": ["What does tail do?"]},
    "best adapter": {**EVALUATED, "training.learning_rate": 0.1, "training.eval_steps": 1},
    "best adapter not kept": {**EVALUATED, "training.learning_rate": 0.1, "training.load_best_adapter_at_end": False},
    "early stopping": {
        **EVALUATED,
        "training.learning_rate": 0.2,
        "training.eval_steps": 1,
        "training.early_stopping_patience": 2,
        "training.max_steps": 30,
    },
    "a save each step": {"checkpoint.save_steps": 1, "checkpoint.save_total_limit": 2},
    "four checkpoints kept": {"checkpoint.save_steps": 1, "checkpoint.save_total_limit": 4, **EVALUATED},
    "a save at the end only": {"checkpoint.save_steps": 0, "training.max_steps": 6},
    "recomputed layers, own split": {
        "training.gradient_checkpointing": True,
        "data.validation_fraction": 0.1,
        "training.eval_steps": 4,
    },
    "epochs, rows split": {
        "training.max_steps": None,
        "training.num_train_epochs": 0.4,
        "data.truncation": "split",
        "data.max_seq_length": 24,
        "data.group_by_length": False,
        "training.warmup_steps": 3,
    },
    "unquantized": {"quantization.weight_format": "none", "lora.dropout": 0.1, **EVALUATED},
    "8-bit base": {"quantization.weight_format": "8bit", "training.gradient_accumulation_steps": 2},
}
"""Name -> settings in dotted keys, laid over `BASE`. Groups that a backend does not serve are left out."""

_NOT_SERVED: Mapping[str, frozenset[str]] = {
    "cpu_torch": frozenset(),
    "mlx_lora": frozenset({"8-bit optimizer", "paged optimizer", "paged 8-bit optimizer", "8-bit base"}),
    "gptq_int4": frozenset({"unquantized", "8-bit base"}),
}

BACKENDS = tuple(_NOT_SERVED)

_OF_BACKEND: Mapping[str, Settings] = {
    # Compiled functions are made by a C++ compiler in seconds; what is compiled computes the same.
    "mlx_lora": {"backend.options": {"compile": "off"}, "training.max_steps": 6, "data.max_seq_length": 40},
}


def groups_of(backend: str) -> Mapping[str, Settings]:
    """The groups that a backend serves, each with all its settings but for the places."""
    own = {"backend.name": backend, **_OF_BACKEND.get(backend, {})}
    left_out = _NOT_SERVED[backend]
    return {name: {**BASE, **own, **changes} for name, changes in GROUPS.items() if name not in left_out}


def write_inputs(folder: Path, backend: str) -> None:
    """`model/`, `train.jsonl` and `validation.jsonl`, equal each time."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = draw_tensors(SHAPE, np.random.default_rng(11))
    if backend == "gptq_int4":
        write_quantized(folder / "model", SHAPE, tensors, Quantization(WeightFormat.INT4_GPTQ, 32))
    else:
        write_model(folder / "model", SHAPE, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(model_path() / name, folder / "model" / name)
    config = folder / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **_SPECIAL_TOKENS}))
    for split, count in (("train", _TRAINED_ROWS), ("validation", _HELD_OUT_ROWS)):
        rows = [row for row in data_path(split).read_text().splitlines(keepends=True) if len(row) < _LONGEST]
        (folder / f"{split}.jsonl").write_text("".join(rows[:count]))


def settings_file(path: Path, settings: Settings, inputs: Path, run_dir: Path) -> Path:
    """The settings as a file for `qlora-hal train`."""
    tree: dict[str, Any] = {"output_dir": str(run_dir)}
    places = {"model.name_or_path": str(inputs / "model"), "data.path": str(inputs / "train.jsonl")}
    if "data.validation_path" in settings:
        places["data.validation_path"] = str(inputs / str(settings["data.validation_path"]))
    for key, value in {**settings, **places}.items():
        group, _, name = key.partition(".")
        tree.setdefault(group, {})[name] = value
    path.write_text(json.dumps(tree, indent=1))
    return path
