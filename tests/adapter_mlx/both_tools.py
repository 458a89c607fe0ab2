"""The same base and adapter in transformers with PEFT and in mlx-lm, both in float32."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import peft
import torch
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, save_config
from transformers import AutoModelForCausalLM

from qlora_hal.adapter import initial_adapter, resolve_targets, write_adapter
from qlora_hal.contract.values import Adapter, AdapterConfig
from qlora_hal.model.facts import read_facts

Float64 = npt.NDArray[np.float64]
TOKENS = np.array([[5, 17, 210, 33, 8, 150, 64]])  # shorter than the sliding windows: the tools cut them differently


def random_adapter(base: Path, targets: str | tuple[str, ...] = "all-linear", **choices: Any) -> Adapter:
    """An adapter whose B is not zero."""
    modules = read_facts(base).linear_modules
    settings = {"r": 6, "alpha": 9.0, "dropout": 0.1, **choices}
    config = AdapterConfig(target_modules=resolve_targets(targets, modules), **settings)
    random = np.random.default_rng(1)
    start = initial_adapter(config, modules, seed=0).tensors
    drawn = {key: random.normal(size=t.shape).astype(np.float32) * np.float32(0.1) for key, t in start.items()}
    return Adapter(drawn, config)


def save_for_peft(folder: Path, adapter: Adapter, base: Path) -> Path:
    modules = read_facts(base).linear_modules
    write_adapter(
        folder, adapter, base_name=str(base), base_revision=None, provenance={"step": 3}, linear_modules=modules
    )
    return folder


def train_in_mlx(base: Path, folder: Path, *, num_layers: int, rank: int = 6, scale: float = 3.3, **more: Any) -> Path:
    """What `mlx_lm.lora` leaves behind, with random numbers for trained ones."""
    model, _ = load_model(base)
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, **more}
    model.freeze()
    linear_to_lora_layers(model, num_layers, parameters)
    random = np.random.default_rng(2)
    trained = _trainable(model)
    drawn = {name: mx.array(random.normal(size=t.shape).astype(np.float32) * 0.1) for name, t in trained.items()}
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), drawn)
    settings = {"model": str(base), "fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}
    save_config({**settings, "learning_rate": 1e-5, "seed": 0}, folder / "adapter_config.json")
    return folder


def _trainable(model: Any) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(model.trainable_parameters()))


def logits_in_mlx(base: Path, adapter: Path | None) -> Float64:
    model, _ = load_model(base)
    if adapter is not None:
        model = load_adapters(model, str(adapter))
    model.eval()
    return np.array(model(mx.array(TOKENS)).astype(mx.float32)).astype(np.float64)


def logits_in_peft(base: Path, adapter: Path | None, dtype: torch.dtype = torch.float32) -> Float64:
    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter))
    model = model.to(dtype).eval()
    with torch.no_grad():
        found: Float64 = model(torch.from_numpy(TOKENS)).logits.double().numpy()
    return found


def rounding_bound(base: Path, adapter: Path) -> tuple[Float64, float]:
    """(logits in float64, how far from them a float32 run of this model may be).

    transformers' own float32 run shows what rounding does to this model. Another order of summation changes the error
    of a dot product of k terms by at most its worst case over its typical case, (k u) / (sqrt(k) u) = sqrt(k), 12 for
    the longest here (k = 128 or less); cos and sin of the positions add as much again at most.
    """
    exact = logits_in_peft(base, adapter, torch.float64)
    rounded = logits_in_peft(base, adapter, torch.float32)
    return exact, 24.0 * float(np.abs(rounded - exact).max())
