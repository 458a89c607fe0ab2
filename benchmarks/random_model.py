"""Models of published shapes with random weights, and what every measurement on them has in common.

The weights are N(0, 0.02), in NF4 with double quantization in blocks of 64, written once as a pre-quantized checkpoint
that every system loads. The adapter is on all projections and has the same first values everywhere. The data are two
batches of random tokens; every position is a label.
"""

from __future__ import annotations

import gc
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Adapter, AdapterConfig, Batch
from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer


def _llama(
    hidden: int, layers: int, heads: tuple[int, int], inner: int, vocabulary: int, **other: Any
) -> dict[str, Any]:
    """Keys of a config.json. `heads` are those of queries and of keys."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": hidden // heads[0],
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **other,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _llama(256, 2, (4, 2), 512, 1024),
    "1b": _llama(2048, 16, (32, 8), 8192, 128256, tie_word_embeddings=True),  # Llama 3.2
    "7b": _llama(4096, 32, (32, 32), 11008, 32000),  # Llama
    "8b": _llama(4096, 32, (32, 8), 14336, 128256),  # Llama 3.1
    "gemma3-4b": _llama(  # its text model
        2560,
        34,
        (8, 4),
        10240,
        262208,
        model_type="gemma3_text",
        head_dim=256,
        sliding_window=1024,
        query_pre_attn_scalar=256,
        tie_word_embeddings=True,
    ),
    "phi3-mini": _llama(3072, 32, (32, 32), 8192, 32064, model_type="phi3", sliding_window=2047),  # its 4k
    "65b": _llama(8192, 80, (64, 64), 22016, 32000),  # Llama
    "70b": _llama(8192, 80, (64, 8), 28672, 128256),  # Llama 3.1
}
RANK, ALPHA, CLIP = 16, 16.0, 1.0
WARM_UP_STEPS = 3
QUANTIZATION = Quantization(WeightFormat.NF4, 64, True)


def write_checkpoint(folder: Path, shape: Mapping[str, Any], device: torch.device) -> None:
    """Random weights N(0, 0.02), the projections packed by bitsandbytes, in transformers' pre-quantized layout."""
    from bitsandbytes import functional
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, generator=generator).mul_(0.02).bfloat16()

    tensors: dict[str, torch.Tensor] = {}
    hidden = shape["hidden_size"]
    for layer in range(shape["num_hidden_layers"]):
        for module, (rows, columns) in projections(shape).items():
            name = f"model.layers.{layer}.{module}.weight"
            packed, state = functional.quantize_4bit(
                random(rows, columns), blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            tensors[name] = packed.cpu()
            tensors |= {f"{name}.{part}": value.cpu() for part, value in state.as_dict(packed=True).items()}
    tensors["model.embed_tokens.weight"] = random(shape["vocab_size"], hidden).cpu()
    if not shape["tie_word_embeddings"]:
        tensors["lm_head.weight"] = random(shape["vocab_size"], hidden).cpu()
    config = config_of(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    one = 0.0 if config.model_type.startswith("gemma") else 1.0  # Gemma's norms count from 1
    tensors |= {
        name: torch.full(parameter.shape, one, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.quantization_config = dict(
        quant_method="bitsandbytes",
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_storage="uint8",
        llm_int8_skip_modules=["lm_head"],
    )
    config.save_pretrained(folder)


def config_of(shape: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    rotary = {"rope_type": "default", "rope_theta": 500000.0}
    named = dict(shape)
    model_type = named.pop("model_type", "llama")
    if model_type != "gemma3_text":  # which has two, of its own
        named["rope_parameters"] = rotary
    return AutoConfig.for_model(
        model_type,
        **named,
        max_position_embeddings=4096 if model_type == "phi3" else 8192,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def projections(shape: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Module below a layer -> (out, in)."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    size = shape.get("head_dim", hidden // shape["num_attention_heads"])
    query, key = shape["num_attention_heads"] * size, shape["num_key_value_heads"] * size
    if shape.get("model_type") == "phi3":
        return {
            "self_attn.qkv_proj": (query + 2 * key, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_up_proj": (2 * inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
    return {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def first_adapter(shape: Mapping[str, Any], random_b: float = 0.0, dropout: float = 0.0) -> Adapter:
    """A uniform with PEFT's bound, seeded by the tensor's name; B zero, or normal for the gradient check."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    modules = []
    for layer in range(shape["num_hidden_layers"]):
        for module, (rows, columns) in projections(shape).items():
            path = f"model.layers.{layer}.{module}"
            modules.append(path)
            name = f"base_model.model.{path}.lora_A.weight"
            random = np.random.default_rng(zlib.crc32(name.encode()))
            bound = columns**-0.5
            tensors[name] = random.uniform(-bound, bound, (RANK, columns)).astype(np.float32)
            b = random.standard_normal((rows, RANK), dtype=np.float32) * random_b
            tensors[f"base_model.model.{path}.lora_B.weight"] = b.astype(np.float32)
    return Adapter(tensors, AdapterConfig(RANK, ALPHA, dropout, False, tuple(sorted(modules))))


def token_batches(shape: Mapping[str, Any], micro_batch: int, length: int) -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(1234)
    return [random.integers(10, shape["vocab_size"], (micro_batch, length), dtype=np.int32) for _ in range(2)]


def as_batch(tokens: np.ndarray[Any, Any]) -> Batch:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape).copy()
    return Batch(tokens, tokens.copy(), positions, np.ones_like(tokens))


def open_trainer() -> TorchLoRATrainer:
    if torch.cuda.is_available():
        from qlora_hal_backends.cuda_bnb import SPEC
        from qlora_hal_backends.torch_family.platform import CUDA

        return TorchLoRATrainer(SPEC, CUDA)
    from qlora_hal_backends.cpu_torch import SPEC
    from qlora_hal_backends.torch_family.platform import CPU

    return TorchLoRATrainer(SPEC, CPU)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def empty_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def allocated_gb(device: torch.device, figure: str) -> float:
    return getattr(torch.cuda, figure)(device) / 1e9 if device.type == "cuda" else 0.0
