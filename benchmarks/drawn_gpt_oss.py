"""gpt-oss as it is published, drawn where it is trained: experts in MXFP4, all else in bfloat16. For `moe_step.py`.

config.json is all that is written. Each tensor is drawn on the device when the loader asks for it by its name, so that
a model that fills a GPU needs neither a disk nor the host's memory.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.formats.gpt_oss import BLOCKS, SCALES
from qlora_hal.model.source import ModelSource, plan_model
from qlora_hal_backends.torch_family import loading

NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
PUBLISHED: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088, "sliding_window": 128,
    "max_position_embeddings": 131072, "rope_theta": 150000, "rope_scaling": YARN, "swiglu_limit": 7.0,
    "attention_bias": True, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED}, "dtype": "bfloat16",
}  # fmt: skip
"""openai/gpt-oss-20b."""
GPT_OSS_SHAPES: Mapping[str, dict[str, Any]] = {
    "gpt-oss-20b": PUBLISHED,
    "gpt-oss-120b": {**PUBLISHED, "num_hidden_layers": 36, "num_local_experts": 128},
    "gpt-oss-tiny": {
        **PUBLISHED, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 512,
        "sliding_window": 16,
    },
}  # fmt: skip
SCALE_CODES = (119, 121)
"""Of 2^-8 and 2^-7. Codes are drawn evenly, whose numbers are 2.9 in the root of their mean square: 0.018 together."""


def config_of(shape: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, with its layers' kinds written out as they are on the hub."""
    kinds = ("sliding_attention", "full_attention")
    return {**shape, "layer_types": [kinds[layer % 2] for layer in range(shape["num_hidden_layers"])]}


def drawn_source(folder: Path, shape: Mapping[str, Any]) -> ModelSource:
    """The folder with nothing but config.json, from which names and sizes of all tensors follow."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    return plan_model(str(folder), revision=None, trust_remote_code=False, config_is_enough=True)


class DrawnCheckpoint(loading.Checkpoint):
    """`Checkpoint` whose tensors are drawn, the same for the same name."""

    def take(self, name: str, device: torch.device) -> torch.Tensor:
        return self._drawn(name, self._tensors[self._stored[name] or name].shape, device)

    def take_bytes_of_part(self, name: str, number: int, device: torch.device) -> torch.Tensor:
        return self._drawn(name, self._tensors[self._stored[name] or name].shape[1:], device, number)

    def _drawn(self, name: str, sides: tuple[int, ...], device: torch.device, number: int = 0) -> torch.Tensor:
        seed = zlib.crc32(f"{name} {number}".encode())
        generator = torch.Generator(device=device).manual_seed(seed)
        if name.endswith((BLOCKS, SCALES)):
            codes = (0, 256) if name.endswith(BLOCKS) else SCALE_CODES
            return torch.randint(*codes, sides, generator=generator, dtype=torch.uint8, device=device)
        if name.endswith("norm.weight"):
            return torch.ones(sides, dtype=torch.bfloat16, device=device)
        return torch.randn(sides, generator=generator, dtype=torch.bfloat16, device=device).mul_(0.02)


def load_drawn(
    source: ModelSource, quantization: Quantization, compute: Compute, device: torch.device
) -> loading.BaseModel:
    """`load_base` of such a source, by the code that reads a published folder."""
    with patch.object(loading, "Checkpoint", DrawnCheckpoint):
        return loading.load_base(source, quantization, compute, device)
