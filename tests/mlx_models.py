"""mlx_lora's logits beside transformers'. Tests only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from trainers import OpenTrainer

from qlora_hal.contract.values import Batch, Float32

# Two float32 programs of the same products in another order differ by about sqrt(k) * 2^-24 relative to the largest
# entry; k is at most 128 terms times 2 layers of about 8 products. 8 * sqrt(2048) * 2^-24 = 2.2e-5.
FLOAT32 = 8 * 2048**0.5 * 2**-24


def transformers_logits(folder: Path, batch: Batch) -> Float32:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        tokens, mask = torch.from_numpy(batch.input_ids).long(), torch.from_numpy(batch.segment_ids)
        logits: Float32 = reference(tokens, attention_mask=mask, use_cache=False).logits.numpy()
    return logits


def check_base_logits(trainer: OpenTrainer, folder: Path, batch: Batch) -> None:
    for name, tensor in trainer.adapter.tensors.items():
        tensor *= "lora_A" in name  # B = 0: the base alone
    trainer.trainer.attach(trainer.adapter)
    expected, real = transformers_logits(folder, batch), batch.segment_ids > 0
    apart = np.abs(trainer.trainer.logits(batch) - expected)[real].max()
    assert apart <= FLOAT32 * np.abs(expected).max()
