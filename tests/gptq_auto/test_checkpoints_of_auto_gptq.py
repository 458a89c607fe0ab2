"""What auto-gptq quantized trains through the GPTQModel engine, as it lies."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from gptq_auto.checkpoints import DATA, KINDS, largest_gap_to_the_library, losses_of_training, opened, weights_of
from safetensors.numpy import load_file, save_file

from qlora_hal.errors import ModelError
from qlora_hal_oracle import GptqWeight, ZeroPointConvention, dequantize_gptq


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_the_stored_integers_decode_to(kind: str) -> None:
    """Exactly: a float16 scale times an integer below 32 has at most 16 significant bits, float32 holds 24."""
    folder = DATA / f"auto_gptq-{kind}"
    stored = load_file(folder / "gptq_model-4bit-32g.safetensors")
    with opened(folder) as trainer:
        found = weights_of(trainer)
    assert len(found) == 14
    for name, weight in found.items():
        parts = (stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
        assert np.array_equal(weight, dequantize_gptq(GptqWeight(*parts, bits=4, convention=ZeroPointConvention.V1)))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_auto_gptq_itself(kind: str) -> None:
    folder = DATA / f"auto_gptq-{kind}"
    with opened(folder) as trainer:
        gap, bound = largest_gap_to_the_library(folder, trainer)
    assert gap <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_of_auto_gptq_trains_on_gptqmodel(kind: str) -> None:
    with opened(DATA / f"auto_gptq-{kind}") as trainer:
        assert "gptqmodel" in trainer.device_facts().kernel_path
        before = weights_of(trainer)
        losses = losses_of_training(trainer)
        after = weights_of(trainer)
    assert losses[-1] < 0.8 * losses[0]
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_zero_biases_that_the_architecture_has_not_are_read_and_other_ones_refused(tmp_path: Path) -> None:
    """auto-gptq stores a bias for every layer it packs. Zeros change nothing; others would be dropped."""
    folder = tmp_path / "model"
    shutil.copytree(DATA / "auto_gptq-in_order", folder)
    file, bias = folder / "gptq_model-4bit-32g.safetensors", "model.layers.1.mlp.up_proj.bias"
    stored = load_file(file)
    assert not stored[bias].any()
    stored[bias][3] = 2.0**-10
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=re.escape(bias)) as refusal, opened(folder):
        pass
    assert refusal.value.code == "QH-M50"
