"""`train()` on MLX: the same call, data, start and files as on torch; and the limits that Metal recommends."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from small_runs import SMALL, merged
from tiny_models import write_model

from qlora_hal import TrainResult, resume, train
from qlora_hal.demo import data_path, model_path
from qlora_hal.detect.discovery import open_trainer
from qlora_hal.errors import ModelError, UnsupportedFeatureError
from qlora_hal.report.console import RunConsole
from qlora_hal_backends.mlx_lora import SPEC, device
from qlora_hal_backends.mlx_lora.capabilities import MLX_ENVIRONMENT, set_environment


def run(folder: Path, backend: str, *, dry_run: bool = False, **changes: Any) -> TrainResult:
    rows = folder.parent / "rows.jsonl"
    rows.write_text("".join(data_path("train").read_text().splitlines(keepends=True)[:60]))
    small = {"training.per_device_train_batch_size": 1, "data.max_seq_length": 64, "training.max_steps": 2}
    # Uncompiled: the compiled functions are what the conformance suite runs.
    options = {"compile": "off"} if backend == "mlx_lora" else {}
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    places = {"output_dir": str(folder), "data.path": str(rows), "backend.name": backend, "backend.options": options}
    return train(merged(SMALL, {**places, **small, **dotted}), console=RunConsole(quiet=True), dry_run=dry_run)


def adapter_bytes(result: TrainResult) -> bytes:
    return (result.adapter_dir / "adapter_model.safetensors").read_bytes()


def test_the_same_call_gives_the_losses_of_torch(tmp_path: Path) -> None:
    """Unquantized in float32, where both store the same numbers: the same rows, order, LoRA start and steps."""
    ours, theirs = (
        run(tmp_path / name, name, quantization__weight_format="none") for name in ("mlx_lora", "cpu_torch")
    )
    assert ours.tokens == theirs.tokens
    assert [path.name for path in sorted(ours.adapter_dir.iterdir())] == [
        path.name for path in sorted(theirs.adapter_dir.iterdir())
    ]
    # A loss is a mean of some 60 differences of logits, each off by at most 2.2e-5 of the largest, which is about 10
    # (test_architectures); their errors are of either sign.
    assert np.allclose([loss for _, loss in ours.losses], [loss for _, loss in theirs.losses], rtol=0, atol=1e-4)


def test_rows_beyond_a_window_that_mlx_lm_ignores_are_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    """Else the run would end at the step in which the first of them comes."""
    model = write_model(tmp_path / "model", "gemma2", vocab_size=4096, sliding_window=16)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_path() / name, model / name)
    for dry_run in (True, False):
        with pytest.raises(UnsupportedFeatureError, match="longer than the sliding window of 16 tokens") as caught:
            run(tmp_path / "run", "mlx_lora", dry_run=dry_run, model__name_or_path=str(model))
        assert caught.value.code == "QH-B61"
        assert caught.value.where == "data.max_seq_length"


@pytest.mark.parametrize(
    ("weight_format", "way"),
    [("int4_affine", "block_size to 32, or"), ("mxfp4", "Set quantization.weight_format to another format")],
)
def test_rows_that_groups_do_not_divide_are_refused_before_data_are_read(
    weight_format: str, way: str, tmp_path: Path
) -> None:
    """A size is named that divides them, where the format has one."""
    width = 96 if weight_format == "int4_affine" else 48
    model = write_model(tmp_path / "model", "llama", hidden_size=width, head_dim=16)
    rows = tmp_path / "unreadable.jsonl"
    rows.write_text("nothing that could be read")
    changes = {"model__name_or_path": str(model), "quantization__weight_format": weight_format}
    with pytest.raises(ModelError, match=f"has rows of {width} weights") as caught:
        run(tmp_path / "run", "mlx_lora", dry_run=True, data__path=str(rows), **changes)
    assert caught.value.code == "QH-M53"
    assert way in caught.value.fix


def test_a_model_that_mlx_lm_computes_otherwise_is_refused_before_data_are_read(tmp_path: Path) -> None:
    model, rows = write_model(tmp_path / "model", "jamba"), tmp_path / "rows.jsonl"
    rows.write_text("nothing that could be read")
    with pytest.raises(ModelError, match="does not compute what this config") as caught:
        run(tmp_path / "run", "mlx_lora", dry_run=True, model__name_or_path=str(model), data__path=str(rows))
    assert caught.value.code == "QH-M51"


@pytest.mark.long
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    """With dropout and recomputed layers; the second half is trained by a trainer that never saw the first."""
    settings = {"lora__dropout": 0.2, "training__gradient_checkpointing": True, "checkpoint__save_steps": 1}
    through = run(tmp_path / "through", "mlx_lora", **settings)
    stopped = run(tmp_path / "stopped", "mlx_lora", **settings)
    last = stopped.run_dir / "checkpoints" / "step-00000002"
    for file in sorted(last.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    last.rmdir()
    (stopped.run_dir / "latest").unlink(missing_ok=True)
    resumed = resume(stopped.run_dir, console=RunConsole(quiet=True))
    assert resumed.losses[-1] == through.losses[-1]
    assert adapter_bytes(resumed) == adapter_bytes(through)


def test_bfloat16_asked_for_on_a_cpu_is_said_to_be_slow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", "mlx_lora", dry_run=True, quantization__compute_dtype="bfloat16")
    assert re.search(r"mlx_lora: MLX emulates bfloat16 on a CPU", " ".join(capsys.readouterr().err.split()))


def test_auto_takes_float32_where_bfloat16_is_emulated() -> None:
    assert device.proved_dtypes() == ("float32", "bfloat16")


def test_what_metal_recommends_is_kept_to_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that a Mac would see; only its answers are made up here."""
    asked: dict[str, int] = {}
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "M4", "max_recommended_working_set_size": 12_000})
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: asked.update(wired=limit))
    monkeypatch.setattr(mx, "set_memory_limit", lambda limit: asked.update(memory=limit))
    device.respect_memory_limit()
    assert asked == {"wired": 12_000, "memory": 12_000}
    assert device.describe_device("products").memory_limit_bytes == 12_000


def test_without_a_gpu_auto_prefers_torch_and_never_takes_a_cpu_silently() -> None:
    assert not SPEC.uses_accelerator
    assert SPEC.priority < 0


def test_small_command_buffers_are_variables_that_mlx_reads_at_its_start() -> None:
    small = MLX_ENVIRONMENT["command_buffers"]["small"]
    assert set(small) == {"MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"}
    assert "small" in SPEC.option_choices["command_buffers"]


def test_float32_products_are_float32_unless_tf32_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's own default on a GPU is TF32, 10 bits of mantissa. A variable set by the user wins over a default only."""
    monkeypatch.setenv("MLX_ENABLE_TF32", "for monkeypatch to restore")
    monkeypatch.setenv("_QLORA_HAL_SET_FOR_MLX", "")
    for options, before, after in (
        ({}, None, "0"), ({"tf32": "on"}, None, "1"), ({}, "1", "1"), ({"tf32": "off"}, "1", "0"),
    ):  # fmt: skip
        monkeypatch.delenv("MLX_ENABLE_TF32")
        monkeypatch.delenv("_QLORA_HAL_SET_FOR_MLX")
        if before is not None:
            os.environ["MLX_ENABLE_TF32"] = before
        open_trainer(SPEC, options).close()
        assert os.environ["MLX_ENABLE_TF32"] == after


def test_a_variable_set_for_one_trainer_is_taken_back_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER", "_QLORA_HAL_SET_FOR_MLX"):
        monkeypatch.setenv(name, "for monkeypatch to restore")
        monkeypatch.delenv(name)
    set_environment({"command_buffers": "small"})
    assert "MLX_MAX_MB_PER_BUFFER" in os.environ
    os.environ["MLX_MAX_OPS_PER_BUFFER"] = "7"  # the user's own now
    set_environment({})
    assert "MLX_MAX_MB_PER_BUFFER" not in os.environ
    assert os.environ["MLX_MAX_OPS_PER_BUFFER"] == "7"
