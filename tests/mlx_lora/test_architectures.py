"""mlx-lm's models, loaded from what transformers writes, against transformers itself, in float32."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlx_models import FLOAT32, check_base_logits, transformers_logits
from tiny_models import FAMILIES, edit_config, write_model
from trainers import OpenTrainer, packed, random_batch, source_of

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import IGNORE_LABEL
from qlora_hal.errors import ModelError, UnsupportedFeatureError
from qlora_hal_backends.mlx_lora.trainer import MLXLoRATrainer

Opened = Callable[..., OpenTrainer]


# mlx-lm leaves out Gemma 2's window, which only every second layer has: rows as long as the window at most.
# mlx-lm's Gemma 3 needs as many layers as its pattern of windows is long.
CHANGES = {"gemma2": {"sliding_window": 32}, "gemma3_text": {"num_hidden_layers": 6}}


@pytest.mark.parametrize("family", FAMILIES)
def test_unquantized_logits_equal_those_of_transformers(family: str, tmp_path: Path, opened: Opened) -> None:
    folder = write_model(tmp_path, family, **CHANGES.get(family, {}))
    check_base_logits(opened(folder), folder, random_batch(0, padding=4))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_rotary_settings_of_transformers_5_are_not_lost(family: str, tmp_path: Path, opened: Opened) -> None:
    """mlx-lm knows no `rope_parameters`: it would take its own theta of 10000 without a word."""
    folder = write_model(tmp_path, family, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    check_base_logits(opened(folder), folder, random_batch(1))


def test_scaled_rotary_positions_of_llama_3_are_those_of_transformers(tmp_path: Path, opened: Opened) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = write_model(tmp_path, "llama", rope_parameters=scaling)
    check_base_logits(opened(folder), folder, random_batch(1))


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_head_is_tied_only_where_the_checkpoint_has_none(is_tied: bool, tmp_path: Path, opened: Opened) -> None:
    """Without the word in config.json mlx-lm ties, and would drop the head's own weights."""
    folder = write_model(tmp_path, "llama", tie_word_embeddings=is_tied)
    reference = transformers_logits(folder, random_batch(2))
    import json

    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    trainer = opened(folder)
    for name, tensor in trainer.adapter.tensors.items():
        tensor *= "lora_A" in name
    trainer.trainer.attach(trainer.adapter)
    apart = np.abs(trainer.trainer.logits(random_batch(2)) - reference).max()
    assert apart <= FLOAT32 * np.abs(reference).max()


def test_rows_beyond_a_window_that_mlx_lm_leaves_out_are_refused(tmp_path: Path, opened: Opened) -> None:
    trainer = opened(write_model(tmp_path, "gemma2")).trainer
    with pytest.raises(UnsupportedFeatureError, match="sliding window of 8 tokens") as caught:
        trainer.logits(random_batch(0, time=20))
    assert caught.value.code == "QH-B61"
    assert trainer.logits(random_batch(0, time=8)).shape == (2, 8, 320)


def test_samples_count_and_neither_padding_nor_rows_where_mlx_lm_leaves_out_a_window(
    tmp_path: Path, opened: Opened
) -> None:
    trainer = opened(write_model(tmp_path, "gemma2", sliding_window=12)).trainer
    batch = random_batch(0, time=10)
    expected = trainer.logits(batch)
    longer = {
        name: np.pad(getattr(batch, name), ((0, 0), (0, 6)), constant_values=IGNORE_LABEL if name == "labels" else 0)
        for name in ("input_ids", "labels", "position_ids", "segment_ids")
    }
    largest = FLOAT32 * np.abs(expected).max()
    assert np.abs(trainer.logits(replace(batch, **longer))[:, :10] - expected).max() <= largest
    assert np.abs(trainer.logits(packed([batch])) - expected.reshape(1, 20, -1)).max() <= largest


@pytest.mark.parametrize(
    "model_type", ["no_such_model", "base", "cache", "..utils", "os.path", "mlx_lm.lora"], ids=lambda name: name
)
def test_an_architecture_that_mlx_lm_lacks_is_refused_by_name(model_type: str, llama: Path, tmp_path: Path) -> None:
    """The name comes from a file; nothing outside mlx_lm.models is imported for it."""
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    edit_config(folder, model_type=model_type)
    with pytest.raises(ModelError, match="mlx-lm cannot build LlamaForCausalLM") as caught:
        MLXLoRATrainer().load(source_of(folder), Quantization(WeightFormat.NONE), Compute())
    assert caught.value.code == "QH-M51"
    assert "model_type" in str(caught.value.cause)
    assert "update mlx-lm" in caught.value.fix


@pytest.mark.parametrize(
    "changes",
    [{"num_attention_heads": 0}, {"hidden_size": "64"}, {"rms_norm_eps": None}],
    ids=["no heads", "a width in text", "no epsilon"],
)
def test_of_a_family_that_is_known_config_json_is_to_be_corrected(
    changes: dict[str, object], llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match="mlx-lm cannot build LlamaForCausalLM") as caught:
        MLXLoRATrainer().load(source_of(folder), Quantization(WeightFormat.NONE), Compute())
    assert caught.value.code == "QH-M51"
    assert caught.value.fix.startswith("Correct config.json")
    assert not caught.value.cause.endswith(":"), "the line that says what is wrong with it follows"
