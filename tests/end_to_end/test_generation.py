"""Answers come from the base that was trained on: its format, its block size, its backend."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_runs import SMALL, merged, small_run

from qlora_hal import TrainResult, resume, train
from qlora_hal.adapter.as_written import provenance_in
from qlora_hal.cli.__main__ import main
from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.checked_trainer import CheckedTrainer
from qlora_hal.demo import model_path
from qlora_hal.detect import discovery
from qlora_hal.errors import AdapterError, StoppedError
from qlora_hal.export.converting import convert_adapter
from qlora_hal.files.sealed_json import sealed
from qlora_hal.hooks import hookimpl
from qlora_hal.inference.generate import open_generation

pytestmark = pytest.mark.usefixtures("usual_signals")

SHORT = {"training.max_steps": 3, "data.max_seq_length": 64, "training.per_device_train_batch_size": 1}


class StopAfter:
    """Asks to stop when a step is known, which is one step late."""

    def __init__(self, last: int) -> None:
        self._last = last

    @hookimpl
    def qlora_hal_step_finished(self, step: int) -> None:
        if step == self._last:
            os.kill(os.getpid(), signal.SIGINT)


@dataclass
class Opened:
    """What trainers were asked to load, and by whom."""

    storages: list[Quantization] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    options: list[dict[str, object]] = field(default_factory=list)
    imported_with: list[dict[str, object]] = field(default_factory=list)
    closed: int = 0
    trainers: list[str] = field(default_factory=list)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    found, load, open_trainer, close = Opened(), CheckedTrainer.load, discovery.open_trainer, CheckedTrainer.close

    def watched(self: CheckedTrainer, source: Any, quantization: Quantization, compute: Any) -> None:
        found.storages.append(quantization)
        found.dtypes.append(compute.dtype)
        found.options.append(dict(compute.options))
        found.trainers.append(type(self._trainer).__module__.split(".")[1])
        load(self, source, quantization, compute)

    def watched_import(spec: Any, options: Any = None) -> Any:
        found.imported_with.append(dict(options or {}))
        return open_trainer(spec, options)

    def watched_close(self: CheckedTrainer) -> None:
        found.closed += 1
        close(self)

    monkeypatch.setattr(CheckedTrainer, "load", watched)
    monkeypatch.setattr(CheckedTrainer, "close", watched_close)
    monkeypatch.setattr(discovery, "open_trainer", watched_import)
    return found


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.raises(StoppedError):
        train(merged(SMALL, {**SHORT, "output_dir": str(folder)}), observers=[StopAfter(1)])
    return folder


@pytest.mark.parametrize(
    "asked",
    [
        {"quantization.weight_format": "none"},
        {"quantization.weight_format": "8bit"},
        {"quantization": {"weight_format": "fp4", "block_size": 128, "double_quant": False}},
        {"quantization.compute_dtype": "bfloat16", "backend.options": {"attention": "eager"}},
    ],
    ids=["none", "8bit", "fp4", "bfloat16"],
)
def test_base_is_opened_as_it_was_stored_in_training(
    asked: dict[str, object], opened: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(tmp_path / "run", {**SHORT, **asked})
    adapter = tmp_path / "adapter"
    shutil.copytree(run.adapter_dir, adapter)  # away from its run: only its own provenance tells
    capsys.readouterr()
    open_generation(run_dir=run.run_dir).close()
    open_generation(adapter_dir=adapter, model=str(model_path())).close()
    assert opened.storages[0] == opened.storages[1] == opened.storages[2]
    assert opened.dtypes[0] == opened.dtypes[1] == opened.dtypes[2]
    assert opened.options[0] == opened.options[1] == opened.options[2]
    assert opened.imported_with == opened.options  # they decide the environment of the import
    assert "note:" not in capsys.readouterr().err


def test_adapter_that_records_no_storage_is_opened_in_four_bits_with_a_note(
    opened: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(tmp_path / "run", SHORT)
    foreign = tmp_path / "foreign"
    run.adapter_dir.rename(foreign)
    (foreign / "qlora_hal.json").unlink()
    open_generation(adapter_dir=foreign, model=str(model_path()), backend="cpu_torch").close()
    assert opened.storages[-1].weight_format is WeightFormat.NF4
    assert "does not record how its base was stored" in " ".join(capsys.readouterr().err.split())


@pytest.mark.long
def test_run_that_moved_goes_on_and_is_opened_where_it_went(tmp_path: Path, opened: Opened) -> None:
    """FP4 on cpu_torch, with an option of its own, becomes int4_affine on mlx_lora, and is stopped once more there."""
    asked = {"quantization.weight_format": "fp4", "backend.options": {"attention": "eager"}, "training.max_steps": 5}
    run_dir = tmp_path / "run"
    with pytest.raises(StoppedError):
        train(merged(SMALL, {**SHORT, **asked, "output_dir": str(run_dir)}), observers=[StopAfter(1)])
    with pytest.raises(StoppedError):
        resume(run_dir, backend="mlx_lora", transfer=True, observers=[StopAfter(3)])
    moved = resume(run_dir)
    assert (moved.backend, moved.weight_format) == ("mlx_lora", "int4_affine")
    open_generation(run_dir=run_dir).close()
    assert opened.trainers == ["torch_family", "mlx_lora", "mlx_lora", "mlx_lora"]
    assert opened.storages[1] == opened.storages[2] == opened.storages[3]
    assert opened.options == opened.imported_with == [{"attention": "eager"}, {}, {}, {}]


def test_products_in_fp8_are_of_the_training_alone_and_that_is_said(
    opened: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(tmp_path / "run", SHORT)
    provenance = run.adapter_dir / "qlora_hal.json"
    provenance.write_text(json.dumps(sealed({**json.loads(provenance.read_text()), "fp8_products": True})))
    open_generation(run_dir=run.run_dir).close()
    told = " ".join(capsys.readouterr().err.split())
    assert "note: the adapter was trained with products in fp8" in told
    assert opened.storages[1] == opened.storages[0]


def test_other_backend_in_the_place_of_the_absent_one_is_said(
    opened: Opened, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(tmp_path / "run", SHORT)
    provenance = run.adapter_dir / "qlora_hal.json"
    provenance.write_text(json.dumps(sealed({**json.loads(provenance.read_text()), "backend": "cuda_bnb"})))
    open_generation(run_dir=run.run_dir).close()
    told = " ".join(capsys.readouterr().err.split())
    assert "note: cuda_bnb, which trained the adapter, cannot be used here" in told
    assert "cpu_torch is used instead" in told
    assert opened.storages[1] == opened.storages[0]


@pytest.mark.fault("C61")
def test_run_that_has_not_ended_names_the_checkpoint_that_can_be_asked(stopped: Path) -> None:
    (checkpoint,) = stopped.glob("checkpoints/step-*")
    with pytest.raises(AdapterError, match="no finished adapter; its status is stopped") as caught:
        open_generation(run_dir=stopped)
    assert (caught.value.code, caught.value.exit_status) == ("QH-C61", 5)
    assert f"--adapter {checkpoint}" in caught.value.fix
    pair = open_generation(run_dir=stopped, adapter_dir=checkpoint)
    base, _ = pair.answer([{"role": "user", "content": "What does tail do?"}], max_new_tokens=2)
    pair.close()
    assert isinstance(base, str)


@pytest.mark.fault("C61")
def test_run_that_has_not_ended_has_no_adapter_to_convert(stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no finished adapter") as caught:
        convert_adapter(stopped, tmp_path / "out", to="mlx")
    assert caught.value.code == "QH-C61"
    (checkpoint,) = stopped.glob("checkpoints/step-*")
    assert str(checkpoint) in caught.value.fix
    assert convert_adapter(checkpoint, tmp_path / "out", to="mlx").layout == "mlx"


def test_an_adapter_of_a_run_is_compared_with_the_runs_base(demo_run: TrainResult, tmp_path: Path) -> None:
    """Without being told which it is; where it is gone, that is said."""
    done = convert_adapter(demo_run.run_dir, tmp_path / "out", to="mlx")
    assert not any("were not compared with a model" in note for note in done.notes)
    moved = Path(shutil.copytree(demo_run.run_dir, tmp_path / "moved"))
    content = json.loads((moved / "run.json").read_text())
    content["config"]["model"]["name_or_path"] = str(tmp_path / "gone")
    (moved / "run.json").write_text(json.dumps(sealed(content)))
    [note] = [note for note in convert_adapter(moved, tmp_path / "other", to="mlx").notes if "not compared" in note]
    assert note.startswith(f"The base of the run, {tmp_path / 'gone'}, cannot be read here (QH-E70). Names and shapes")


@pytest.mark.fault("C09")
def test_trainer_is_closed_when_the_adapter_does_not_fit(stopped: Path, tmp_path: Path, opened: Opened) -> None:
    (checkpoint,) = stopped.glob("checkpoints/step-*")
    broken = tmp_path / "adapter"
    shutil.copytree(checkpoint, broken)
    told = json.loads((broken / "qlora_hal.json").read_text())
    (broken / "qlora_hal.json").write_text(json.dumps(provenance_in(told)))  # without hashes, as of an earlier release
    tensors = load_file(broken / "adapter_model.safetensors")
    last = max(name for name in tensors if "lora_B" in name)
    save_file({**tensors, last: np.concatenate([tensors[last]] * 2)}, broken / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as caught:
        open_generation(run_dir=stopped, adapter_dir=broken)
    assert caught.value.code == "QH-C09"
    assert opened.closed == len(opened.options) == 1


@pytest.mark.parametrize(("only", "asked"), [((), [False, True]), (("--base-only",), [False])])
def test_only_the_answers_that_are_shown_are_generated(
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only: tuple[str, ...],
    asked: list[bool],
) -> None:
    (checkpoint,) = stopped.glob("checkpoints/step-*")
    found, generate = [], CheckedTrainer.generate

    def watched(self: CheckedTrainer, prompt: Any, **more: Any) -> Any:
        found.append(more["adapter"])
        return generate(self, prompt, **more)

    monkeypatch.setattr(CheckedTrainer, "generate", watched)
    place = ("--run", str(stopped), "--adapter", str(checkpoint), "--max-new-tokens", "2")
    assert main(["generate", "--prompt", "ls", *place, *only, "--json"]) == 0
    assert found == asked
    assert len(json.loads(capsys.readouterr().out)) == 1 + len(asked)


def test_stopped_run_offers_only_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StoppedError):
        train(merged(SMALL, {**SHORT, "output_dir": str(tmp_path / "run")}), observers=[StopAfter(1)])
    shown = capsys.readouterr().err.splitlines()
    assert not any(line.startswith("adapter") for line in shown)
    assert not any("qlora-hal generate" in line for line in shown)
    assert f"  qlora-hal resume {tmp_path / 'run'}" in shown
