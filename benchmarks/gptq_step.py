"""Step time of a GPTQ base against NF4 on the same model, in turns; prints one JSON line.

    python benchmarks/gptq_step.py                              the demo model on the CPU
    python benchmarks/gptq_step.py --shape 1b --batch 4 --time 1024     on a GPU: a drawn model of that shape

The 4-bit GPTQ base runs on `gptq_int4`, NF4 on the device's own backend. Same adapter (rank 16, all linear layers),
same tokens, same AdamW. `ratio` is the GPTQ step over the NF4 step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qlora_hal.adapter.initial import initial_adapter
from qlora_hal.contract.backend import Compute, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import AdapterConfig, Batch, StepSettings
from qlora_hal.demo import model_path
from qlora_hal.detect.discovery import find, listed, load_spec, open_trainer
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.gptq_int4.trainer import present_platform

GROUP, RANK, VOCABULARY = 128, 16, 32000
NATIVE = {"cuda": "cuda_bnb", "rocm": "rocm_bnb", "cpu": "cpu_torch"}
SHAPES = {  # hidden, feed-forward, layers, heads, key heads
    "tiny": (256, 768, 2, 4, 2),
    "1b": (2048, 8192, 16, 32, 8),
    "8b": (4096, 14336, 32, 32, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("demo", *SHAPES), default="demo")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--time", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", choices=("auto", "plain"), default="auto")
    arguments = parser.parse_args()
    device = present_platform().device
    with TemporaryDirectory() as folder:
        plain, packed = models(Path(folder), arguments.shape)
        runs = {
            "gptq": ("gptq_int4", packed, Quantization(WeightFormat.INT4_GPTQ, GROUP)),
            "nf4": (NATIVE[device], plain, Quantization(WeightFormat.NF4, 64, True)),
        }
        found: dict[str, list[dict[str, object]]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, (backend, model, stored) in runs.items():
                found[name].append(measured(backend, model, stored, arguments))
    answer: dict[str, object] = {"shape": arguments.shape, "batch": arguments.batch, "time": arguments.time}
    for name, rounds in found.items():
        best = min(rounds, key=lambda run: float(str(run["seconds"])))
        answer[name] = {**best, "seconds_by_round": [run["seconds"] for run in rounds]}
    seconds = {name: statistics.median(float(str(run["seconds"])) for run in rounds) for name, rounds in found.items()}
    print(json.dumps({**answer, "ratio": round(seconds["gptq"] / seconds["nf4"], 3)}))


def measured(backend: str, model: Path, stored: Quantization, arguments: argparse.Namespace) -> dict[str, object]:
    """Median seconds of a step, the first left out, and what ran."""
    with open_trainer(load_spec(find(backend, listed()))) as trainer:
        dtype = trainer.proved_compute_dtypes()[0]
        compute = Compute(dtype, options={"layers": arguments.layers})  # type: ignore[arg-type]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.load(ModelSource("drawn", model, read_facts(model)), stored, compute)
        loaded = torch.cuda.memory_allocated() if torch.cuda.is_available() else None
        modules = trainer.linear_modules()
        config = AdapterConfig(RANK, 2.0 * RANK, 0.0, False, tuple(sorted(modules)))
        trainer.attach(initial_adapter(config, modules, 0))
        seconds, loss = steps(trainer, arguments)
        return {
            "seconds": round(statistics.median(seconds[1:]), 5),
            "loss": round(loss, 4),
            "dtype": dtype,
            "kernel_path": trainer.device_facts().kernel_path,
            "device": trainer.device_facts().device,
            "loaded_bytes": loaded,
            "peak_memory_bytes": trainer.peak_memory_bytes(),
        }


def steps(trainer: QuantizedLoRATrainer, arguments: argparse.Namespace) -> tuple[list[float], float]:
    batch = tokens(arguments.batch, arguments.time)
    seconds, loss = [], 0.0
    for _ in range(arguments.steps):
        start = time.perf_counter()
        loss = trainer.train_step([batch], StepSettings(1e-4, batch.counted_tokens)).resolve().loss
        seconds.append(time.perf_counter() - start)
    return seconds, loss


def tokens(rows: int, length: int) -> Batch:
    ids = np.random.default_rng(0).integers(3, 4000, (rows, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return Batch(ids, ids, positions, np.ones_like(ids))


def models(folder: Path, shape: str) -> tuple[Path, Path]:
    """(16-bit model, the same one packed): drawn, or the demo rounded to nearest."""
    plain = model_path() if shape == "demo" else drawn(folder / "plain", *SHAPES[shape])
    tensors = load_file(plain / "model.safetensors")
    linears = read_facts(plain).linear_modules
    packed = {name: t for name, t in tensors.items() if name.removesuffix(".weight") not in linears}
    for module in linears:
        packed |= {f"{module}.{part}": t for part, t in rounded(tensors[f"{module}.weight"]).items()}
    (folder / "packed").mkdir()
    save_file(packed, folder / "packed" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    told = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
    (folder / "packed" / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    return plain, folder / "packed"


def rounded(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Symmetric round to nearest in format v1, packed with torch: the drawn models are too large for the oracle."""
    outputs, inputs = weight.shape
    weight = weight.to("cuda" if torch.cuda.is_available() else "cpu")
    groups = weight.float().reshape(outputs, -1, GROUP)
    scales = (groups.abs().amax(dim=2) * 2 / 15).clamp_min(1e-6)
    codes = (groups / scales[..., None] + 8).round().clamp(0, 15).to(torch.int64).reshape(outputs, inputs).t()
    shifts = torch.arange(0, 32, 4, device=weight.device)
    words = (codes.reshape(inputs // 8, 8, outputs) << shifts[None, :, None]).sum(dim=1)
    return {
        "qweight": _as_int32(words),
        "qzeros": torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32),
        "scales": scales.t().half().contiguous().cpu(),
        "g_idx": (torch.arange(inputs) // GROUP).to(torch.int32),
    }


def _as_int32(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous().cpu()


def drawn(folder: Path, hidden: int, inner: int, layers: int, heads: int, key_heads: int) -> Path:
    """A random Llama in bfloat16."""
    folder.mkdir()
    width = hidden // heads
    sides = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (width * key_heads, hidden),
        "self_attn.v_proj": (width * key_heads, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    torch.manual_seed(0)
    tensors = {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(VOCABULARY, hidden, dtype=torch.bfloat16) * 0.02
    for layer in range(layers):
        start = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{start}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for name, (outputs, inputs) in sides.items():
            tensors[f"{start}{name}.weight"] = torch.randn(outputs, inputs, dtype=torch.bfloat16) * inputs**-0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": width,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
