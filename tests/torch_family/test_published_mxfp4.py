"""gpt-oss as it is published: its bytes are kept, and mean what they mean in transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from against_transformers import compare, reference_of
from published_mxfp4 import write_published_gpt_oss
from safetensors.torch import load_file
from trainers import open_cpu_trainer
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

BLOCK = "model.layers.1.mlp.experts"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoded_weights_are_those_of_transformers_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    write_published_gpt_oss(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    trainer = open_cpu_trainer(tmp_path, weight_format="mxfp4", dtype=dtype).trainer
    both, down = (
        convert_moe_packed_tensors(
            stored[f"{BLOCK}.{name}_blocks"], stored[f"{BLOCK}.{name}_scales"], dtype=getattr(torch, dtype)
        ).float()
        for name in ("gate_up_proj", "down_proj")
    )
    expected = {"gate_proj": both[..., ::2], "up_proj": both[..., 1::2], "down_proj": down}
    for name, weight in expected.items():
        found = trainer.dequantized_weight(f"{BLOCK}.{name}")
        np.testing.assert_array_equal(found, weight.transpose(1, 2).numpy())


def test_logits_loss_and_gradients_are_those_of_transformers_and_peft(tmp_path: Path) -> None:
    write_published_gpt_oss(tmp_path)
    found = compare(tmp_path, reference_of(tmp_path))
    assert found["result"] == "equal", found
