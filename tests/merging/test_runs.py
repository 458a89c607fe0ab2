"""From a run's folder to a merged model with the command that people type."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import small_run
from transformers import AutoModelForCausalLM

from qlora_hal import TrainResult, merge
from qlora_hal.data import ChatTokenizer
from qlora_hal.demo import data_path
from qlora_hal.errors import AdapterError, ConfigError
from qlora_hal.inference.generate import open_generation

QUESTION = [{"role": "user", "content": "What does the command tail do?"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    rows = tmp_path_factory.mktemp("rows") / "validation.jsonl"
    rows.write_text("".join(data_path("validation").read_text().splitlines(keepends=True)[:12]))
    folder = tmp_path_factory.mktemp("runs") / "first"
    changes: dict[str, Any] = {"data.validation_path": str(rows), "training.max_steps": 8, "checkpoint.save_steps": 4}
    return small_run(folder, changes)


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "qlora_hal.cli", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd, timeout=600)


@pytest.mark.slow
def test_run_is_merged_with_one_command_and_answers_as_its_adapter_does(run: TrainResult, tmp_path: Path) -> None:
    done = command("merge", run.run_dir, tmp_path / "merged", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "merged/merge.json").read_text())
    assert record["base"]["merged_into"] == "dequantized"
    assert record["base"]["kl_mean"]["original"] > record["limits"]["max_kl"] > record["comparison"]["kl_mean"]
    assert record["rows"]["kind"] == "validation"
    assert record["comparison"]["adapter_loss"] == pytest.approx(run.eval_loss_after, abs=0.02)
    assert record["comparison"]["loss"] == pytest.approx(record["comparison"]["adapter_loss"], abs=0.01)
    assert record["compute"]["backend"] == record["compute"]["merged_backend"] == "cpu_torch"
    assert str(tmp_path) not in json.dumps(record)
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}

    pair = open_generation(run_dir=run.run_dir)
    base_answer, expected = pair.answer(QUESTION, max_new_tokens=12)
    pair.close()
    tokenizer = ChatTokenizer.from_folder(tmp_path / "merged")
    ids = tokenizer.encode_chat(QUESTION, add_generation_prompt=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        tokens = list(ids)
        for _ in range(12):
            best = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            if best in tokenizer.stop_ids:
                break
            tokens.append(best)
    assert tokenizer.decode(tokens[len(ids) :]).strip() == expected != base_answer


@pytest.mark.long
def test_figures_are_printed_with_what_was_allowed(run: TrainResult, tmp_path: Path) -> None:
    done = command("merge", run.run_dir, tmp_path / "merged", "--base", "dequantized", "--quiet", cwd=tmp_path)
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert "nats per token" in lines["KL to the adapter"]
    assert "rounding to bfloat16" in lines["KL allowed"]
    assert "allowed" in lines["top-1 agreement"]
    assert lines["merged model"].strip() == str(tmp_path / "merged")


@pytest.mark.long
@pytest.mark.fault("C21")
def test_threshold_that_is_exceeded_is_exit_status_6_and_leaves_nothing(run: TrainResult, tmp_path: Path) -> None:
    done = command("merge", run.run_dir, tmp_path / "merged", "--base=dequantized", "--max-kl=1e-9", cwd=tmp_path)
    assert done.returncode == 6
    assert "QH-C21" in done.stderr
    assert "Nothing was written" in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_unknown_dtype_is_a_usage_error(run: TrainResult, tmp_path: Path) -> None:
    done = command("merge", run.run_dir, tmp_path / "merged", "--dtype", "float8", cwd=tmp_path)
    assert done.returncode == 2
    assert "float8" in done.stderr


@pytest.mark.long
def test_checkpoint_of_a_run_is_judged_on_the_runs_rows(run: TrainResult, tmp_path: Path) -> None:
    result = merge(run.run_dir / "checkpoints/step-00000004", tmp_path / "merged", base="dequantized", row_limit=4)
    assert result.record["rows"]["kind"] == "validation"  # type: ignore[index]
    whole = merge(run.run_dir, tmp_path / "whole", base="dequantized", row_limit=4)
    assert result.record["adapter"] != whole.record["adapter"]
    assert result.record["rows"] == whole.record["rows"]


@pytest.mark.fault("C61")
def test_run_without_a_finished_adapter_names_its_checkpoint(run: TrainResult, tmp_path: Path) -> None:
    copy = tmp_path / "stopped"
    shutil.copytree(run.run_dir, copy)
    shutil.rmtree(copy / "adapter")
    with pytest.raises(AdapterError, match="no finished adapter") as caught:
        merge(copy, tmp_path / "merged")
    assert (caught.value.code, caught.value.exit_status) == ("QH-C61", 5)
    assert "step-00000008" in caught.value.fix


@pytest.mark.long
def test_run_that_held_nothing_out_is_compared_on_its_last_rows_with_a_note(tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text("".join(data_path("train").read_text().splitlines(keepends=True)[:24]))
    run = small_run(tmp_path / "run", {"data.path": str(rows), "training.max_steps": 2, "data.chat_template": "chatml"})
    result = merge(run.run_dir, tmp_path / "merged", base="dequantized", dtype="float32", row_limit=5)
    assert result.record["rows"]["kind"] == "training tail"  # type: ignore[index]
    numbers = result.record["rows"]["row_numbers"]  # type: ignore[index]
    assert len(numbers) == 5
    assert numbers[-1] == 24
    assert numbers[0] >= 15  # rows longer than max_seq_length were dropped in training
    assert any("held no rows out" in note for note in result.notes)
    # The run's template is not the tokenizer's own: the merged folder brings it along.
    rendered = ChatTokenizer.from_folder(tmp_path / "merged").render(QUESTION, add_generation_prompt=True)
    assert "<|im_start|>user" in rendered
    rows.unlink()
    with pytest.raises(ConfigError, match="can no longer be read") as caught:
        merge(run.run_dir, tmp_path / "second")
    assert caught.value.code == "QH-C64"


@pytest.mark.long
def test_unquantized_training_in_bfloat16_files_stays_the_original(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", {"training.max_steps": 2, "quantization.weight_format": "none"})
    result = merge(run.run_dir, tmp_path / "merged", row_limit=4)
    assert result.base == "original"
    assert np.isfinite(result.kl)
    assert result.kl <= result.max_kl
