"""What is wrong with a run is found before its model loads, or before it goes on, and is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, merged

from qlora_hal import resume, train
from qlora_hal.demo import model_path
from qlora_hal.errors import QloraHalError

pytestmark = pytest.mark.slow


def refused(changes: dict[str, Any], folder: Path) -> QloraHalError:
    with pytest.raises(QloraHalError) as caught:
        train(merged(SMALL, {**changes, "output_dir": str(folder / "run")}))
    return caught.value


@pytest.mark.fault("U10")
def test_double_quantization_needs_a_scale_for_each_block(tmp_path: Path) -> None:
    error = refused({"quantization.weight_format": "int8", "quantization.double_quant": True}, tmp_path)
    assert (error.code, error.exit_status) == ("QH-U10", 2)
    assert "int8" in error.message


@pytest.mark.fault("U13")
def test_unknown_options_of_a_backend_are_named_with_those_it_has(tmp_path: Path) -> None:
    error = refused({"backend.options": {"layers": "fast", "colour": "red"}}, tmp_path)
    assert (error.code, error.exit_status) == ("QH-U13", 2)
    assert "layers = 'fast' (one of 'auto', 'plain')" in error.message
    assert "colour = 'red' (unknown)" in error.message


@pytest.mark.fault("E19")
def test_unusual_paths_are_paths(tmp_path: Path) -> None:
    folder = tmp_path / "Übung 1 'quoted' $HOME" / "日本"
    folder.mkdir(parents=True)
    shutil.copytree(model_path(), folder / "mod el")
    rows = folder / "rows ;.jsonl"
    shutil.copy(SMALL["data"]["path"], rows)
    changes = {"model.name_or_path": str(folder / "mod el"), "data.path": str(rows), "training.max_steps": 1}
    result = train(merged(SMALL, {**changes, "output_dir": str(folder / "ru n")}))
    assert result.adapter_dir == folder / "ru n" / "adapter"
    assert (result.run_dir / "report.html").is_file()


@pytest.mark.fault("N20")
def test_seed_that_was_drawn_is_said_and_stored(tmp_path: Path) -> None:
    changes = {"training.seed": None, "training.max_steps": 1, "output_dir": str(tmp_path / "run")}
    result = train(merged(SMALL, changes))
    seed = json.loads((tmp_path / "run" / "run.json").read_text())["resolved"]["seed"]
    assert f"no seed was given; {seed} was drawn" in result.notes


@pytest.mark.fault("C14")
@pytest.mark.fault("E15")
@pytest.mark.parametrize(
    ("file", "code", "word"),
    [("tokenizer.json", "QH-C14", "tokenizer_hash"), ("model.safetensors", "QH-E15", "base_fingerprint")],
)
def test_run_does_not_go_on_with_another_base_or_tokenizer(file: str, code: str, word: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_path(), model)
    config = merged(SMALL, {"model.name_or_path": str(model), "output_dir": str(tmp_path / "run")})
    killed(config)
    change(model / file)
    with pytest.raises(QloraHalError, match=word) as caught:
        resume(tmp_path / "run")
    assert caught.value.code == code


def killed(config: dict[str, Any]) -> None:
    """Train in a child that dies after its first save."""
    program = f"import json\nfrom qlora_hal import train\ntrain(json.loads({json.dumps(config)!r}))"
    environment = {**os.environ, "QLORA_HAL_FAULTS": "ckpt.after_rename:kill@1"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()


def change(file: Path) -> None:
    """Another tokenizer, or other weights, that are as valid."""
    if file.suffix == ".json":
        content = json.loads(file.read_text())
        content["added_tokens"][-1]["lstrip"] = not content["added_tokens"][-1]["lstrip"]
        file.write_text(json.dumps(content))
        return
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(bytes(raw))
