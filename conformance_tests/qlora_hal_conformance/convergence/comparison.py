"""Making references, and judging a backend by them: both train the same plan on one loaded base."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qlora_hal.contract.backend import Compute, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.contract.checked_trainer import CheckedTrainer
from qlora_hal.contract.values import Float32
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal.formats.catalogue import record_of
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.convergence.judging import Judgement, Power, Verdict, check_seeds, judge
from qlora_hal_conformance.convergence.models import Pretrained, read_model
from qlora_hal_conformance.convergence.references import (
    References,
    TaskReference,
    described,
    path_of,
    read_references,
    unusable,
)
from qlora_hal_conformance.convergence.tasks import TASKS, tokenized
from qlora_hal_conformance.convergence.training import Plan, Run, Settings, run_seeds
from qlora_hal_conformance.machine import machine_record
from qlora_hal_conformance.subject import Subject

SETTINGS: Mapping[tuple[str, str], Settings] = {
    ("demo", "records"): Settings(steps=24, learning_rate=4e-4),
    ("demo", "answers"): Settings(steps=24, learning_rate=4e-4),
    ("smollm2", "records"): Settings(steps=24, learning_rate=2e-4),
    ("smollm2", "answers"): Settings(steps=24, learning_rate=2e-4),
}
"""What references are made with. A backend is judged with the settings that its references hold."""

QLORA = Quantization(WeightFormat.NF4, 64)
"""The format of Dettmers et al. 2023, without double quantization: every format has references of its own, and most
backends have this one."""

Told = Callable[[str], None]
Alter = Callable[[QuantizedLoRATrainer], QuantizedLoRATrainer]


def unaltered(trainer: QuantizedLoRATrainer) -> QuantizedLoRATrainer:
    return trainer


@dataclass(frozen=True, slots=True)
class Chosen:
    """Model, tasks, storage, dtype and seeds. `quantization` None is the subject's: NF4 where it has it, else its 4-bit
    format; `dtype` empty is what `auto` takes on its device."""

    model: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    quantization: Quantization | None = None
    dtype: str = ""


def quantization_of(subject: Subject) -> Quantization:
    """NF4 in blocks of 64 where it is declared, else the backend's main format with its first block size."""
    if subject.declares((QLORA.weight_format, QLORA.block_size or 0)):
        return QLORA
    return Quantization(subject.main_format, subject.default_block(subject.main_format))


def read_quantization(subject: Subject, text: str) -> Quantization:
    """`nf4` or `int4_affine:32`; without a size, the format's first declared one."""
    name, _, size = text.partition(":")
    weight_format = WeightFormat(name)
    if weight_format is WeightFormat.NONE:
        return Quantization(weight_format)
    default = 64 if weight_format is WeightFormat.NF4 else subject.default_block(weight_format)
    return Quantization(weight_format, int(size) if size else default or record_of(weight_format).default_block)


# references -----------------------------------------------------------------------------------------------------------
def make_references(subject: Subject, chosen: Chosen, command: str, told: Told) -> References:
    """Train every seed in float32 on exactly the contract's weights.

    Raises UnsupportedFeatureError QH-B01 for a backend that cannot, ModelError where the model is not installed.
    """
    quantization = chosen.quantization or quantization_of(subject)
    with tempfile.TemporaryDirectory() as place:
        model = read_model(chosen.model, Path(place) / "model")
        weights = model.contract_weights(quantization)
        model.write_contract(Path(place) / "contract", weights)
        started = time.monotonic()
        with opened(subject, Path(place) / "contract", Quantization(WeightFormat.NONE), "float32") as trainer:
            check_exact(trainer, weights)
            tasks = {}
            for name in chosen.tasks:
                plan = _plan(model, name, SETTINGS[chosen.model, name])
                before, runs = _trained(trainer, plan, chosen.seeds, f"{chosen.model}, {name}", told)
                losses = {run.seed: run.loss for run in runs}
                tasks[name] = TaskReference(plan.settings, plan.sha256(), before, losses)
            made_by = {
                "command": command,
                "compute_dtype": "float32",
                "weights": "the contract's codec's, held unquantized in float32; equal bit for bit",
                "seconds": round(time.monotonic() - started, 1),
                **_ran_on(subject, trainer),
            }
        return References(chosen.model, model.sha256, quantization, tasks, made_by)


def check_exact(trainer: CheckedTrainer, weights: Mapping[str, Float32]) -> None:
    """Raises UnsupportedFeatureError QH-B01 where a product would see another weight than the contract's."""
    for module, weight in weights.items():
        if not np.array_equal(trainer.dequantized_weight(module), weight):
            raise UnsupportedFeatureError(
                "QH-B01",
                f"{module} is not what was stored: the backend does not keep unquantized float32 weights as they are.",
                fix="Make references with a backend that does, as cpu_torch.",
            )


# judging --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a backend's runs of a task came to, beside the reference."""

    runs: tuple[Run, ...]
    reference: TaskReference
    judgement: Judgement
    power: Power

    def as_json(self) -> dict[str, object]:
        return {
            "final_losses": {str(run.seed): run.loss if math.isfinite(run.loss) else None for run in self.runs},
            "reference": {
                "mean": self.reference.mean,
                "standard_deviation": self.reference.standard_deviation,
                "seeds": len(self.reference.losses),
            },
            "judgement": self.judgement.as_json(),
            "shifts_caught": self.power.as_json(),
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """All tasks of one backend. `weights_apart` is |its base - the contract's| / |the contract's|."""

    model: str
    quantization: Quantization
    dtype: str
    tasks: Mapping[str, TaskResult]
    weights_apart: float
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def passes(self) -> bool:
        return all(task.judgement.verdict is Verdict.INDISTINGUISHABLE for task in self.tasks.values())

    def as_json(self) -> dict[str, object]:
        return {
            "passes": self.passes,
            "model": self.model,
            "quantization": described(self.quantization),
            "compute_dtype": self.dtype,
            "weights_apart": self.weights_apart,
            "tasks": {name: task.as_json() for name, task in self.tasks.items()},
            **self.facts,
        }


def compare(
    subject: Subject, chosen: Chosen, told: Told, *, references: Path | None = None, alter: Alter = unaltered
) -> Comparison:
    """Train the chosen seeds on the backend and judge them by the references.

    Raises SeedsError, ConfigError QH-B52 where there are no references that fit, ModelError QH-B53 where the model is
    not installed, and what the backend raises.
    """
    quantization = chosen.quantization or quantization_of(subject)
    kept = read_references(references or path_of(chosen.model, quantization), quantization)
    for name in chosen.tasks:
        check_seeds(chosen.seeds, _reference_of(kept, name).losses)
    dtype = chosen.dtype or subject.with_proof().auto_dtype
    with tempfile.TemporaryDirectory() as place:
        model = read_model(chosen.model, Path(place) / "model")
        if kept.model_sha256 != model.sha256:
            raise unusable(f"The references of {kept.model} are of other weights than {chosen.model} has here.")
        folder = _as_loaded(subject, model, quantization, Path(place) / "packed")
        started = time.monotonic()
        with opened(subject, folder, quantization, dtype, alter) as trainer:
            apart = _weights_apart(trainer, model, quantization)
            tasks = {}
            for name in chosen.tasks:
                reference = _reference_of(kept, name)
                plan = _plan(model, name, reference.settings)
                if plan.sha256() != reference.data_sha256:
                    raise unusable(f"The references of {name} were made with other rows than {name} has here.")
                _, runs = _trained(trainer, plan, chosen.seeds, f"{chosen.model}, {name}", told)
                judgement = judge({run.seed: run.loss for run in runs}, reference.losses)
                power = Power(reference.standard_deviation, len(reference.losses), len(runs))
                tasks[name] = TaskResult(tuple(runs), reference, judgement, power)
            facts = {"seconds": round(time.monotonic() - started, 1), **_ran_on(subject, trainer)}
    return Comparison(chosen.model, quantization, dtype, tasks, apart, facts)


def _reference_of(kept: References, name: str) -> TaskReference:
    if name not in kept.tasks:
        raise unusable(f"The references of {kept.model} hold no task {name}; they hold {', '.join(kept.tasks)}.")
    return kept.tasks[name]


def _as_loaded(subject: Subject, model: Pretrained, quantization: Quantization, folder: Path) -> Path:
    """The model as published where the backend quantizes it, else packed by the format's codec."""
    if quantization.weight_format is WeightFormat.NONE or subject.declares(Feature.QUANTIZE_ON_LOAD):
        return model.folder
    model.write_packed(folder, quantization)
    return folder


def _weights_apart(trainer: CheckedTrainer, model: Pretrained, quantization: Quantization) -> float:
    squares, whole = 0.0, 0.0
    for module, weight in model.contract_weights(quantization).items():
        exact = weight.astype(np.float64)
        squares += float(((trainer.dequantized_weight(module) - exact) ** 2).sum())
        whole += float((exact**2).sum())
    return float(np.sqrt(squares / whole))


# both -----------------------------------------------------------------------------------------------------------------
@contextmanager
def opened(
    subject: Subject, folder: Path, quantization: Quantization, dtype: str, alter: Alter = unaltered
) -> Iterator[CheckedTrainer]:
    """A checked trainer with a base. Raises UnsupportedFeatureError for what the backend does not declare."""
    trainer = CheckedTrainer(alter(subject.open()))
    try:
        trainer.load(ModelSource.in_folder(folder), quantization, Compute(dtype))  # type: ignore[arg-type]
        yield trainer
    finally:
        trainer.close()


def _plan(model: Pretrained, task: str, settings: Settings) -> Plan:
    return Plan(tokenized(TASKS[task](), model.folder), settings)


def _trained(
    trainer: CheckedTrainer, plan: Plan, seeds: Sequence[int], name: str, told: Told
) -> tuple[float, list[Run]]:
    """The held-out loss of the base alone, and the runs. B is 0 at the start, so the first is any seed's."""
    before, runs = run_seeds(trainer, plan, seeds, lambda run: told(f"{name}, seed {run.seed}: {run.loss:.5f} nats"))
    return before, runs


def _ran_on(subject: Subject, trainer: CheckedTrainer) -> dict[str, object]:
    facts = trainer.device_facts()
    return {
        "backend": subject.spec.name,
        "device": facts.device,
        "kernel_path": facts.kernel_path,
        "driver": facts.driver,
        "versions": dict(facts.versions),
        "machine": machine_record(),
    }
