"""Train a LoRA adapter on from a checkpoint, and keep the result beside it."""

from __future__ import annotations

import faulthandler
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qlora_hal.checkpoint import load_checkpoint, save_checkpoint
from qlora_hal.contract.backend import BackendSpec, Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Batch, StepSettings
from qlora_hal.detect.discovery import find, listed, load_spec, open_trainer
from qlora_hal.model.source import ModelSource

FIELDS = ("input_ids", "labels", "position_ids", "segment_ids", "rows")


def main(folder: Path) -> None:
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    faulthandler.dump_traceback_later(run["seconds"], exit=True)
    state = load_checkpoint(folder / run["checkpoint"])
    windows = read_windows(folder / "data.npz")
    with open_trainer(backend_of(run["backend"]), run["options"]) as trainer:
        weight_format, block_size, double_quant = run["quantization"]
        quantization = Quantization(WeightFormat(weight_format), block_size, double_quant)
        compute = Compute(run["dtype"], run["checkpointing"], run["options"])
        trainer.load(ModelSource.in_folder(folder / run["model"]), quantization, compute)
        trainer.attach(state.adapter)
        trainer.import_optimizer(state.optimizer)
        for number, window in enumerate(windows):
            settings = StepSettings(
                run["learning_rate"],
                sum(batch.counted_tokens for batch in window),
                dropout_key=1000 + state.step + number,
                weight_decay=run["weight_decay"],
            )
            trainer.train_step(window, settings).resolve()
        after = replace(
            state,
            step=state.step + len(windows),
            adapter=trainer.export_adapter(),
            optimizer=trainer.export_optimizer(),
        )
        (folder / "out").mkdir()
        save_checkpoint(folder / "out", after, keep=2)
        np.save(folder / "logits.npy", trainer.logits(windows[0][0]), allow_pickle=False)


def backend_of(named: dict[str, str]) -> BackendSpec:
    """A backend by its name, or by the import path of its spec or trainer while it is under development."""
    if named["backend"] and not (named["spec"] or named["trainer"]):
        return load_spec(find(named["backend"], listed()))
    spec = imported(named["spec"]) if named["spec"] else imported(named["trainer"]).spec
    assert isinstance(spec, BackendSpec)
    return replace(spec, trainer=named["trainer"]) if named["trainer"] else spec


def imported(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def read_windows(path: Path) -> list[list[Batch]]:
    with np.load(path, allow_pickle=False) as arrays:
        places = sorted({tuple(int(part) for part in name.split("/")[:2]) for name in arrays.files})
        windows: dict[int, list[Batch]] = {}
        for n, m in places:
            windows.setdefault(n, []).append(Batch(*(arrays[f"{n}/{m}/{name}"] for name in FIELDS)))
    return [windows[n] for n in sorted(windows)]


if __name__ == "__main__":
    main(Path(sys.argv[0]).resolve().parent)
