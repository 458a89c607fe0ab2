"""The state of a run between two steps, and the folder names under which it is kept."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_hal.contract.values import Adapter, AdapterConfig, OptimizerSnapshot
from qlora_hal.errors import StorageError
from qlora_hal.files.safetensors_file import Array

CHECKPOINTS_FOLDER = "checkpoints"
OPTIMIZER_FILE = "optimizer.safetensors"
ANSWERS_FILE = "answers.safetensors"
STATE_FILE = "trainer_state.json"
RECORD_FILE = "run_record.json"
"""The copy of run.json. Not under its name: a folder with a run.json is a run's."""
NATIVE_PREFIX = "native."

STAGING = ".staging-"
PRUNING = ".pruning-"
REPLACED = ".replaced-"
CORRUPT = ".corrupt-"

_STEP_NAME = re.compile(r"step-([0-9]{8,15})")


@dataclass(frozen=True, slots=True, eq=False)
class TrainingState:
    """Everything a resume needs; taken between steps, so there are no gradients.

    `epoch` is how many epochs the steps make. `loop` is JSON of the training loop (best evaluation, patience); tuples
    come back as lists.
    `provenance` is JSON too: `base_name`, `base_revision`, `base_fingerprint`, `config_hash`, `tokenizer_hash`,
    `data_fingerprint`, `weight_format`, `block_size`, `double_quant`, `backend`, `device`, `versions`.
    `answers` are the reference logits of the model when it was saved (`run.transfer`); empty where none were taken.
    """

    step: int
    epoch: float
    tokens_seen: int
    adapter: Adapter
    optimizer: OptimizerSnapshot
    loop: Mapping[str, object] = field(default_factory=dict)
    provenance: Mapping[str, object] = field(default_factory=dict)
    answers: Mapping[str, Array] = field(default_factory=dict)


def state_document(state: TrainingState) -> dict[str, object]:
    """The JSON half of a state; the tensors go beside it."""
    config, optimizer = state.adapter.config, state.optimizer
    return {
        "step": state.step,
        "epoch": state.epoch,
        "tokens_seen": state.tokens_seen,
        "adapter": {**asdict(config), "target_modules": list(config.target_modules)},
        "optimizer": {"step": optimizer.step, "exact": optimizer.exact, "native_kind": optimizer.native_kind},
        "loop": dict(state.loop),
        "provenance": dict(state.provenance),
    }


def optimizer_arrays(optimizer: OptimizerSnapshot) -> dict[str, Array]:
    """Moments under their own names, the backend's native arrays under `native.`."""
    return {**optimizer.moments, **{NATIVE_PREFIX + name: array for name, array in optimizer.native.items()}}


def state_from(
    document: Mapping[str, object],
    adapter: Mapping[str, Array],
    optimizer: Mapping[str, Array],
    answers: Mapping[str, Array],
) -> TrainingState:
    """The inverse of `state_document` and `optimizer_arrays`. Raises ValueError naming the field that is wrong."""
    settings, counters = _field(document, "adapter", dict), _field(document, "optimizer", dict)
    modules = _field(settings, "target_modules", list)
    if not all(isinstance(module, str) for module in modules):
        raise ValueError("target_modules holds something other than names")
    config = AdapterConfig(
        r=_field(settings, "r", int),
        alpha=float(_field(settings, "alpha", float, int)),
        dropout=float(_field(settings, "dropout", float, int)),
        use_rslora=_field(settings, "use_rslora", bool),
        target_modules=tuple(modules),
    )
    snapshot = OptimizerSnapshot(
        step=_field(counters, "step", int),
        moments={name: array for name, array in optimizer.items() if not name.startswith(NATIVE_PREFIX)},
        exact=_field(counters, "exact", bool),
        native_kind=_field(counters, "native_kind", str),
        native={n.removeprefix(NATIVE_PREFIX): a for n, a in optimizer.items() if n.startswith(NATIVE_PREFIX)},
    )
    return TrainingState(
        step=_field(document, "step", int),
        epoch=float(_field(document, "epoch", float, int)),
        tokens_seen=_field(document, "tokens_seen", int),
        adapter=Adapter({name: adapter[name] for name in sorted(adapter)}, config),
        optimizer=snapshot,
        loop=_field(document, "loop", dict),
        provenance=_field(document, "provenance", dict),
        answers=dict(answers),
    )


def _field(document: Mapping[str, object], name: str, *kinds: type) -> Any:
    # By exact type, because to isinstance a bool is an int.
    value = document.get(name)
    if type(value) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{STATE_FILE} has {name} = {ascii(value)[:60]}, a value of type {expected} is expected")
    return value


def step_name(step: int) -> str:
    """Folder name of a step, of equal length so that names sort as steps do."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step a folder name stands for, or None."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match and name == step_name(int(match[1])) else None


def checkpoints_folder(run_dir: Path) -> Path:
    """The folder that holds a run's checkpoints. Raises StorageError QH-S14 when a link leads elsewhere."""
    folder = run_dir / CHECKPOINTS_FOLDER
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        raise StorageError(
            "QH-S14",
            f"{folder} is {'a symbolic link' if folder.is_symlink() else 'no folder'}; a folder is expected.",
            where=str(folder),
            cause="Checkpoints are written and removed only inside the run's own folder.",
            fix="Remove it, or choose another output folder.",
        )
    return folder


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted by name; nothing when there is no folder."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
