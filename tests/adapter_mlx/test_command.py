"""`qlora-hal adapter convert` as people type it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_hal.adapter import read_adapter, read_mlx_adapter
from tests.adapter_mlx.both_tools import random_adapter, save_for_peft, train_in_mlx


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qlora_hal.cli", "adapter", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_a_run_folder_becomes_an_adapter_for_mlx_lm(tmp_path: Path, llama: Path) -> None:
    adapter = random_adapter(llama, use_rslora=True)
    save_for_peft(tmp_path / "run" / "adapter", adapter, llama)
    done = convert(tmp_path / "run", tmp_path / "mlx", "--to", "mlx", "--model", llama, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["source"] == str(tmp_path / "run" / "adapter")
    assert result["layout"] == "mlx"
    assert result["use_rslora"] is True
    assert result["scale"] == adapter.config.scale
    assert result["layers"] == [0, 1, 2]
    assert (result["modules"], result["tensors"]) == (21, 42)
    assert read_mlx_adapter(tmp_path / "mlx").config == adapter.config


def test_without_json_it_says_what_opens_the_result_and_notes_go_to_stderr(tmp_path: Path, llama: Path) -> None:
    trained = train_in_mlx(llama, tmp_path / "mlx", num_layers=1)
    done = convert(trained, tmp_path / "peft", "--to", "peft")
    assert done.returncode == 0, done.stderr
    assert "7 modules, rank 6, alpha 19.8, scale 3.3" in done.stdout
    assert "PeftModel.from_pretrained" in done.stdout
    assert "note: The adapter covers 1 layers, 2; layers 0-1 have none." in done.stderr
    assert "--model BASE" in done.stderr
    assert len(read_adapter(tmp_path / "peft").config.target_modules) == 7


@pytest.mark.parametrize(("more", "status", "code"), [((), 8, "QH-S14"), (("--to", "gguf"), 2, "QH-U04")])
def test_failures_have_their_exit_status_and_json(
    tmp_path: Path, llama: Path, more: tuple[str, ...], status: int, code: str
) -> None:
    save_for_peft(tmp_path / "peft", random_adapter(llama), llama)
    (tmp_path / "taken").mkdir()
    done = convert(tmp_path / "peft", tmp_path / "taken", *(more or ("--to", "mlx")), "--json")
    assert done.returncode == status
    assert json.loads(done.stdout)["code"] == code


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    done = convert(tmp_path, tmp_path / "out", "--to", "mlx")
    assert done.returncode == 5
    assert "error[QH-C50]" in done.stderr
    assert "Name a run's folder" in done.stderr
