"""gpt-oss as it is published, from its folder to an adapter that PEFT opens, a resume, and a merged model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_mxfp4 import write_published_gpt_oss
from safetensors.numpy import load_file
from small_runs import SMALL, merged
from trainers import random_batch

from qlora_hal import merge, resume, train
from qlora_hal.adapter import read_adapter
from qlora_hal.demo import data_path, model_path
from qlora_hal.errors import ConfigError, ModelError
from qlora_hal.model.facts import read_facts

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SETTINGS = {"training.max_steps": 4, "checkpoint.save_steps": 2, "data.max_seq_length": 64, "lora.r": 4}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt_oss")
    vocabulary = read_facts(model_path()).vocabulary_size
    write_published_gpt_oss(folder, vocab_size=vocabulary, max_position_embeddings=1024)
    for name in TOKENIZER_FILES:
        shutil.copyfile(model_path() / name, folder / name)
    return folder


def settings(published: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    base = {**SETTINGS, "model.name_or_path": str(published), "output_dir": str(folder), "data.packing": False}
    return merged(SMALL, {**base, **changes})


def logits_of(model: Any) -> Any:
    ids = torch.from_numpy(random_batch(0, vocabulary=4096).input_ids).long()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float().numpy()


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)
def test_a_run_writes_an_adapter_that_peft_opens_and_a_merge_that_transformers_opens(
    published: Path, tmp_path: Path
) -> None:
    """The merged folder has the adapter model's logits, in the 16-bit layout of the hub."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = train(settings(published, tmp_path / "run", **{"quantization.compute_dtype": "float32"}))
    assert any("MXFP4" in note for note in result.notes)
    adapter = read_adapter(result.adapter_dir)
    assert sum(tensor.ndim == 3 and tensor.any() for tensor in adapter.tensors.values()) == 12
    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32).eval()
    base = logits_of(model)
    expected = logits_of(PeftModel.from_pretrained(model, result.adapter_dir).eval())
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(data_path("validation").read_text().splitlines(keepends=True)[:8]))
    done = merge(result.adapter_dir, tmp_path / "merged", rows=rows, backend="cpu_torch", row_limit=8, dtype="float32")
    assert done.kl <= done.max_kl < 1e-8
    assert any("no longer" in note for note in done.notes)
    found = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval())
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(found - base).max() > 1e-3 * np.abs(base).max(), "the adapter moves the logits"
    after = load_file(tmp_path / "merged" / "model.safetensors")
    block = "model.layers.0.mlp.experts"
    assert after[f"{block}.gate_up_proj"].shape == (4, 64, 192)
    assert after[f"{block}.down_proj"].shape == (4, 96, 64)
    assert not any(name.endswith(("_blocks", "_scales")) for name in after)


@pytest.mark.parametrize("packing", [False, True], ids=["row by row", "packed"])
def test_a_resumed_run_ends_with_the_same_bits(packing: bool, published: Path, tmp_path: Path) -> None:
    whole = train(settings(published, tmp_path / "whole", **{"data.packing": packing}))
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for newer in (tmp_path / "broken").glob("checkpoints/*4"):
        shutil.rmtree(newer)
    shutil.rmtree(tmp_path / "broken" / "adapter")
    resumed = resume(tmp_path / "broken")
    expected, found = (load_file(run.adapter_dir / "adapter_model.safetensors") for run in (whole, resumed))
    assert all(np.array_equal(found[name], tensor) for name, tensor in expected.items())


def test_a_packed_run_evaluates_to_what_its_rows_have_apart(published: Path, tmp_path: Path) -> None:
    rows = tmp_path / "validation.jsonl"
    rows.write_text("".join(data_path("validation").read_text().splitlines(keepends=True)[:16]))
    changes = {"quantization.compute_dtype": "float32", "data.validation_path": str(rows)}
    packed, apart = (
        train(settings(published, tmp_path / name, **{**changes, "data.packing": packing}))
        for name, packing in (("packed", True), ("apart", False))
    )
    assert packed.eval_loss_before == pytest.approx(apart.eval_loss_before, rel=1e-5)
    assert (packed.eval_loss_after or np.inf) < (packed.eval_loss_before or 0.0)


@pytest.mark.parametrize("asked", ["auto", "4bit", "mxfp4"])
def test_what_the_checkpoint_has_may_be_asked_for(asked: str, published: Path, tmp_path: Path) -> None:
    train(settings(published, tmp_path / "run", **{"quantization.weight_format": asked}), dry_run=True)


@pytest.mark.fault("U11")
@pytest.mark.parametrize("asked", ["nf4", "8bit", "none"])
def test_another_format_is_refused_before_data_are_read(asked: str, published: Path, tmp_path: Path) -> None:
    """Neither its experts nor its attention are packed anew."""
    (tmp_path / "rows.jsonl").write_text("nothing that could be read")
    changes = {"quantization.weight_format": asked, "data.path": str(tmp_path / "rows.jsonl")}
    with pytest.raises(ConfigError) as refusal:
        train(settings(published, tmp_path / "run", **changes), dry_run=True)
    assert refusal.value.code == "QH-U11"


@pytest.mark.fault("M51")
def test_mlx_refuses_it_by_name(published: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    (tmp_path / "rows.jsonl").write_text("nothing that could be read")
    changes = {"backend.name": "mlx_lora", "backend.allow_cpu": True, "data.path": str(tmp_path / "rows.jsonl")}
    with pytest.raises(ModelError, match="gpt_oss") as refusal:
        train(settings(published, tmp_path / "run", **changes), dry_run=True)
    assert refusal.value.code == "QH-M51"
