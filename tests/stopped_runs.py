"""Small runs that end by themselves or are stopped between two steps, and ways to damage what they left. Tests only."""

from __future__ import annotations

import json
import shutil
import signal
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, merged

from qlora_hal import TrainResult, resume, train
from qlora_hal.adapter.as_written import provenance_in
from qlora_hal.checkpoint.manifest import encode_manifest, read_manifest
from qlora_hal.demo import data_path
from qlora_hal.errors import StoppedError
from qlora_hal.files.durable import hashed
from qlora_hal.files.sealed_json import sealed, unsealed
from qlora_hal.hooks import hookimpl

SHORT: dict[str, Any] = {
    "data.max_seq_length": 64,
    "training.max_steps": 4,
    "training.per_device_train_batch_size": 1,
    "training.gradient_accumulation_steps": 1,
    "training.eval_steps": 2,
    "lora.r": 4,
    "lora.target_modules": ["q_proj"],
    "checkpoint.save_steps": 1,
}


class StopAfter:
    """Asks the run to stop as a scheduler does; the step that is under way then, the next one, is saved."""

    def __init__(self, step: int) -> None:
        self._step = step

    @hookimpl
    def qlora_hal_step_finished(self, step: int) -> None:
        if step == self._step:
            signal.raise_signal(signal.SIGTERM)


def rows_in(folder: Path) -> dict[str, str]:
    """Forty rows to train on and eight to judge by, as settings."""
    for name, count in (("train", 40), ("validation", 8)):
        lines = data_path(name).read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    return {"data.path": str(folder / "train.jsonl"), "data.validation_path": str(folder / "validation.jsonl")}


def whole_run(folder: Path, rows: dict[str, str], changes: dict[str, Any] | None = None) -> TrainResult:
    return train(merged(SMALL, {**SHORT, **rows, **(changes or {}), "output_dir": str(folder)}))


def stopped_run(folder: Path, rows: dict[str, str], changes: dict[str, Any] | None = None, *, after: int = 1) -> Path:
    config = merged(SMALL, {**SHORT, **rows, **(changes or {}), "output_dir": str(folder)})
    with pytest.raises(StoppedError):
        train(config, observers=[StopAfter(after)])
    return folder


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to, symlinks=True))


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def flip(path: Path, at: int = -5) -> None:
    """One bit of one byte; the file is replaced, because it may be mapped."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.unlink()
    path.write_bytes(raw)


def record(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "run.json").read_text())
    return content


def rewritten(run: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = True) -> None:
    """run.json with a change; `seal` as the tool itself would have written it."""
    content = record(run)
    change(content)
    (run / "run.json").write_text(json.dumps(sealed(content) if seal else content))


NEW_STAMPS = ("run_id", "settings_hash", "token_hashes", "base_config_hash")


def as_of_an_earlier_release(run: Path) -> Path:
    """The folder as a release wrote it that knew no ids, no copies of run.json and no hashes but those of manifests."""
    content = unsealed(record(run))
    del content["run_id"]
    (run / "run.json").write_text(json.dumps(content))
    for provenance in run.rglob("qlora_hal.json"):
        provenance.write_text(json.dumps(without_stamps(provenance_in(json.loads(provenance.read_text())))))
    for checkpoint in (run / "checkpoints").glob("step-*"):
        (checkpoint / "run_record.json").unlink()
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        del state["loop"]["metrics"]
        state["provenance"] = without_stamps(state["provenance"])
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        manifest = read_manifest(checkpoint)
        files = {file.name: hashed(file) for file in checkpoint.iterdir() if file.name != "MANIFEST.json"}
        rewritten_manifest = encode_manifest(manifest.step, files, without_stamps(manifest.summary))
        (checkpoint / "MANIFEST.json").write_bytes(rewritten_manifest)
    for store in (run / "tokens").glob("*.safetensors"):
        raw = store.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8 : 8 + length])
        del entries["__metadata__"]["sha256"], entries["__metadata__"]["header_sha256"]
        header = json.dumps(entries, sort_keys=True).encode()
        header += b" " * (-len(header) % 8)
        store.unlink()
        store.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    return run


def without_stamps(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in provenance.items() if key not in NEW_STAMPS}


def resumed(run: Path, capsys: pytest.CaptureFixture[str], **more: Any) -> tuple[TrainResult, str]:
    """The result, and everything that was said, as one line."""
    capsys.readouterr()
    result = resume(run, **more)
    return result, " ".join(capsys.readouterr().err.split())
