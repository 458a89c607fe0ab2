"""Convergence references as files: what was run, where each seed ended, and what made them.

A file holds one model in one weight format. It is refused where it does not belong to the code at hand: other weights,
other rows or other settings would be compared with numbers that they have nothing to do with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from qlora_hal.contract.backend import Quantization
from qlora_hal.errors import ConfigError
from qlora_hal.files import strict_json
from qlora_hal_conformance.convergence.training import Settings

FOLDER = Path(__file__).parent / "references"
VERSION = 1


@dataclass(frozen=True, slots=True)
class TaskReference:
    """A task's runs: seed -> final held-out loss in nats. `before` is the loss of the base alone; `data_sha256` is of
    the tokens."""

    settings: Settings
    data_sha256: str
    before: float
    losses: Mapping[int, float]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.losses.values())))

    @property
    def standard_deviation(self) -> float:
        return float(np.std(list(self.losses.values()), ddof=1))

    def as_json(self) -> dict[str, object]:
        return {
            "settings": self.settings.as_json(),
            "data_sha256": self.data_sha256,
            "before": self.before,
            "final_losses": {str(seed): loss for seed, loss in self.losses.items()},
            "mean": self.mean,
            "standard_deviation": self.standard_deviation,
        }


@dataclass(frozen=True, slots=True)
class References:
    """All tasks of a model in a weight format. `made_by` says with what, where and by which command."""

    model: str
    model_sha256: str
    quantization: Quantization
    tasks: Mapping[str, TaskReference]
    made_by: Mapping[str, object]

    def as_json(self) -> dict[str, object]:
        return {
            "version": VERSION,
            "model": self.model,
            "model_sha256": self.model_sha256,
            "quantization": described(self.quantization),
            "tasks": {name: task.as_json() for name, task in self.tasks.items()},
            "made_by": dict(self.made_by),
        }


def described(quantization: Quantization) -> dict[str, object]:
    return {
        "weight_format": quantization.weight_format.value,
        "block_size": quantization.block_size,
        "double_quant": quantization.double_quant,
    }


def path_of(model: str, quantization: Quantization) -> Path:
    """Where the references of a model in a weight format are kept."""
    return FOLDER / f"{model}_{quantization.weight_format.value}.json"


def write_references(references: References, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(strict_json.encode(references.as_json()))


def read_references(path: Path, quantization: Quantization) -> References:
    """Raises ConfigError QH-B52 where there are none, or where they are of another weight format or version."""
    try:
        document: Any = strict_json.decode(path.read_bytes())
    except FileNotFoundError:
        raise unusable(f"There are no convergence references in {path.name}.") from None
    except strict_json.JsonProblem as problem:
        raise unusable(f"{path.name} is not strict JSON: {problem}.") from problem
    try:
        if document["version"] != VERSION or document["quantization"] != described(quantization):
            raise unusable(
                f"{path.name} is of version {document['version']} and {document['quantization']}; "
                f"needed are version {VERSION} and {described(quantization)}."
            )
        tasks = {name: _task(task) for name, task in document["tasks"].items()}
        return References(
            str(document["model"]), str(document["model_sha256"]), quantization, tasks, document["made_by"]
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise unusable(f"{path.name} lacks what references hold: {error}.") from error


def _task(held: Mapping[str, Any]) -> TaskReference:
    settings = Settings(**{known.name: held["settings"][known.name] for known in fields(Settings)})
    losses = {int(seed): float(loss) for seed, loss in held["final_losses"].items()}
    return TaskReference(settings, str(held["data_sha256"]), float(held["before"]), dict(sorted(losses.items())))


def unusable(what: str) -> ConfigError:
    return ConfigError(
        "QH-B52",
        what,
        fix="Make them with: python -m qlora_hal_conformance.convergence --make-references --backend cpu_torch",
    )
