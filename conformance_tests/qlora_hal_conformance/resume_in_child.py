"""A training run that goes on in a process of its own, from a checkpoint on disk.

    python -m qlora_hal_conformance.resume_in_child WORK.json

Nothing of a test runs there: a backend that looked its answers up in the suite would have nothing to look at.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from qlora_hal.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Batch, Float32, StepSettings
from qlora_hal.detect.discovery import open_trainer
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.subject import Reference, import_subject

CHILD_SECONDS = 240.0
FIELDS = ("input_ids", "labels", "position_ids", "segment_ids")


@dataclass(frozen=True, slots=True)
class Continuation:
    """Which backend goes on, on which base, from which checkpoint, at which rate, and how it computes."""

    reference: Reference
    model: Path
    quantization: Quantization
    dtype: str
    checkpoint: Path
    learning_rate: float
    weight_decay: float = 0.1
    checkpointing: bool = False
    options: Mapping[str, object] = field(default_factory=dict)


def continue_in_child(
    work: Continuation, windows: Sequence[Sequence[Batch]], folder: Path
) -> tuple[TrainingState, Float32]:
    """Train on `windows` in a fresh process; the state it ends in, and its logits of the first batch it was given."""
    arrays = {
        f"{n}/{m}/{name}": getattr(batch, name)
        for n, window in enumerate(windows)
        for m, batch in enumerate(window)
        for name in FIELDS
    }
    # Only object arrays would be pickled, and these are none; numpy 1 takes `allow_pickle` for the name of an array.
    np.savez(folder / "windows.npz", **arrays)
    quantization = work.quantization
    record = {
        "reference": work.reference.as_json(),
        "model": str(work.model),
        "quantization": [quantization.weight_format.value, quantization.block_size, quantization.double_quant],
        "dtype": work.dtype,
        "checkpoint": str(work.checkpoint),
        "learning_rate": work.learning_rate,
        "weight_decay": work.weight_decay,
        "checkpointing": work.checkpointing,
        "options": dict(work.options),
        "folder": str(folder),
    }
    path = folder / "work.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    command = [sys.executable, "-m", "qlora_hal_conformance.resume_in_child", str(path)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"the continuing process did not end within {CHILD_SECONDS:.0f} s") from error
    reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
    assert child.returncode == 0, f"the continuing process ended with status {child.returncode}: {reason}"
    final = folder / "continued"
    return load_checkpoint(next((final / "checkpoints").glob("step-*"))), np.load(folder / "logits.npy")


def carry_on(record: dict[str, object]) -> None:
    """What the child does."""
    folder, model = Path(str(record["folder"])), Path(str(record["model"]))
    reference, options = record["reference"], record["options"]
    stored = record["quantization"]
    assert isinstance(reference, dict)
    assert isinstance(stored, list)
    assert isinstance(options, dict)
    state = load_checkpoint(Path(str(record["checkpoint"])))
    windows = _read_windows(folder / "windows.npz")
    with open_trainer(import_subject(Reference(**reference)).spec, options) as trainer:
        source = ModelSource(str(model), model, read_facts(model))
        quantization = Quantization(WeightFormat(stored[0]), stored[1], stored[2])
        compute = Compute(str(record["dtype"]), record["checkpointing"] is True, options)  # type: ignore[arg-type]
        trainer.load(source, quantization, compute)
        trainer.attach(state.adapter)
        trainer.import_optimizer(state.optimizer)
        for number, window in enumerate(windows):
            settings = StepSettings(
                float(str(record["learning_rate"])),
                sum(batch.counted_tokens for batch in window),
                dropout_key=1000 + state.step + number,
                weight_decay=float(str(record["weight_decay"])),
            )
            trainer.train_step(window, settings).resolve()
        after = replace(
            state,
            step=state.step + len(windows),
            adapter=trainer.export_adapter(),
            optimizer=trainer.export_optimizer(),
        )
        (folder / "continued").mkdir()
        save_checkpoint(folder / "continued", after, keep=2)
        np.save(folder / "logits.npy", trainer.logits(windows[0][0]), allow_pickle=False)


def _read_windows(path: Path) -> list[list[Batch]]:
    with np.load(path, allow_pickle=False) as arrays:
        places = sorted({tuple(int(part) for part in name.split("/")[:2]) for name in arrays.files})
        windows: dict[int, list[Batch]] = {}
        for n, m in places:
            windows.setdefault(n, []).append(Batch(*(arrays[f"{n}/{m}/{name}"] for name in FIELDS)))
    return [windows[n] for n in sorted(windows)]


if __name__ == "__main__":
    carry_on(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
