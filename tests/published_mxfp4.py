"""A tiny gpt-oss as gpt-oss is published: experts in MXFP4, two tensors of bytes to each projection. Tests only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from drawn_models import write_drawn_model
from safetensors.torch import load_file, save_file

from qlora_hal_oracle.microscaling import MicroscalingFormat, quantize_microscaling

NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def write_published_gpt_oss(folder: Path, **settings: object) -> None:
    """Weights that a 4-bit model can hold, as it is on the hub."""
    write_drawn_model(folder, "gpt_oss", settings)
    stored = load_file(folder / "model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith((".gate_up_proj", ".down_proj")):
            parts = [quantize_microscaling(one.T.float().numpy(), MicroscalingFormat.MXFP4) for one in tensor]
            codes = np.stack([part.packed.view(np.uint8) for part in parts])
            experts, outputs, width = codes.shape
            tensors[f"{name}_blocks"] = torch.from_numpy(codes.reshape(experts, outputs, width // 16, 16))
            tensors[f"{name}_scales"] = torch.from_numpy(np.stack([part.scale_codes for part in parts]))
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED}}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
