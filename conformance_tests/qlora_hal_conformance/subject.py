"""The backend under judgement: which one, what it declares, and how it is opened."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from qlora_hal.contract.backend import BackendSpec, ProbeReport, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import Capabilities, Feature, WeightFormat
from qlora_hal.errors import BackendContractError
from qlora_hal.formats.catalogue import record_of
from qlora_hal_conformance.combination import AUTO, Combination
from qlora_hal_conformance.verdicts import Claim
from qlora_hal_oracle import UNIT_ROUNDOFF


@dataclass(frozen=True, slots=True)
class Family:
    """Models of a `model_type`. With `varied` single keys of their config.json are unusual: no declaration covers them,
    so such a model may be refused by every backend."""

    model_type: str
    varied: bool = False


@dataclass(frozen=True, slots=True)
class Devices:
    """So many devices of this machine, where each rank has one of its own."""

    number: int


Need = Feature | WeightFormat | Family | Devices | str | tuple[WeightFormat, int]
"""A feature, a weight format, a family of models, devices, a compute dtype by name, or a block size of a format."""


@dataclass(frozen=True, slots=True)
class Reference:
    """How to find the backend: by its listed name, or by import paths while it is under development."""

    backend: str = ""
    trainer: str = ""
    spec: str = ""

    @property
    def is_listed(self) -> bool:
        return bool(self.backend) and not (self.trainer or self.spec)

    def as_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Subject:
    """An imported spec, and the compute dtypes its device proved. Where one run is judged, `combination` says how it
    opens trainers. `devices` is how many the probe found; 0 where ranks share one, as on a CPU, or where it cannot
    tell. `lacking` are declared features that this device does not have."""

    reference: Reference
    spec: BackendSpec
    distribution: str = ""
    proved_dtypes: tuple[str, ...] = ()
    combination: Combination | None = None
    devices: int = 0
    lacking: frozenset[Feature] = frozenset()

    @property
    def capabilities(self) -> Capabilities:
        return self.spec.capabilities

    @property
    def main_format(self) -> WeightFormat:
        """The format of cases that are about something else: the backend's 4-bit one, else its first."""
        if self.combination is not None:
            return self.combination.stored_as
        declared = self.capabilities.weight_formats
        chosen = self.capabilities.levels.get("4bit")
        return chosen if chosen in declared else min(declared, key=lambda f: f.value)

    @property
    def main_dtype(self) -> str:
        """The most exact compute dtype that is declared and proved: bounds are sharpest there. A run has its own."""
        if self.combination is not None:
            return self.combination.dtype if self.combination.dtype != AUTO else self.auto_dtype
        usable = [d for d in self.capabilities.compute_dtypes if d in self.proved_dtypes] or list(
            self.capabilities.compute_dtypes
        )
        return min(usable, key=lambda dtype: UNIT_ROUNDOFF.get(dtype, 1.0))

    @property
    def auto_dtype(self) -> str:
        """What `auto` takes on this device: the best that computing proved; empty before the proof."""
        return next(iter(self.proved_dtypes), "")

    def default_block(self, weight_format: WeightFormat) -> int | None:
        """The run's, else the first declared block size; the format's own where none is declared, None where it has no
        blocks."""
        if self.combination is not None and weight_format is self.combination.stored_as:
            return self.combination.block_size
        declared = self.capabilities.block_sizes.get(weight_format, ())
        return declared[0] if declared else record_of(weight_format).default_block

    def declares(self, need: Need) -> bool:
        match need:
            case Feature():
                return need in self.capabilities.features
            case WeightFormat():
                return need in self.capabilities.weight_formats
            case Devices():
                return True  # a matter of the machine, which `claim` asks
            case Family(model_type, varied):
                return model_type in self.capabilities.families and not varied
            case (weight_format, block_size):
                sizes = self.capabilities.block_sizes.get(weight_format, ())
                return weight_format in self.capabilities.weight_formats and block_size in sizes
            case _:
                return need in self.capabilities.compute_dtypes

    def claim(self, needs: tuple[Need, ...]) -> Claim:
        """Whether all of `needs` are declared, and proved where a device has a say."""
        if any(isinstance(need, Family) and not self.declares(need) for need in needs):
            return Claim.OPEN
        if not all(self.declares(need) for need in needs):
            return Claim.UNDECLARED
        if any(need in self.lacking for need in needs if isinstance(need, Feature)):
            return Claim.NARROWED
        dtypes = [need for need in needs if type(need) is str]
        if self.proved_dtypes and any(dtype not in self.proved_dtypes for dtype in dtypes):
            return Claim.NARROWED
        if any(isinstance(need, Devices) and self.is_short_of(need.number) for need in needs):
            return Claim.NARROWED
        return Claim.DECLARED

    def is_short_of(self, devices: int) -> bool:
        """Whether the probe found fewer."""
        return 0 < self.devices < devices

    def open(self) -> QuantizedLoRATrainer:
        """A fresh trainer. Raises BackendError, BackendContractError."""
        from qlora_hal.detect.discovery import open_trainer

        return open_trainer(self.spec, self.combination.options if self.combination is not None else None)

    def with_proof(self) -> Subject:
        """Ask the device which compute dtypes it has; the first heavy import."""
        trainer = self.open()
        try:
            return replace(self, proved_dtypes=tuple(trainer.proved_compute_dtypes()))
        finally:
            trainer.close()


def import_subject(reference: Reference) -> Subject:
    """Import the light module of a backend. Raises BackendNotFoundError, BackendConflictError, BackendContractError."""
    if reference.is_listed:
        from qlora_hal.detect.discovery import find, listed, load_spec

        entry = find(reference.backend, listed())
        return Subject(reference, load_spec(entry), entry.distribution)
    spec = _imported(reference.spec) if reference.spec else getattr(_imported(reference.trainer), "spec", None)
    if not isinstance(spec, BackendSpec):
        raise BackendContractError(
            "QH-B02",
            f"{reference.spec or reference.trainer} gave a {type(spec).__name__}, not a BackendSpec.",
            fix="Name it as --spec package.module:SPEC.",
        )
    if reference.trainer:
        spec = replace(spec, trainer=reference.trainer)
    return Subject(reference, spec, "under development")


def _imported(path: str) -> object:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def spec_record(subject: Subject) -> dict[str, object]:
    """The spec as a certificate keeps it."""
    spec = subject.spec
    return {
        "name": spec.name,
        "title": spec.title,
        "trainer": spec.trainer,
        "contract": spec.contract,
        "distribution": subject.distribution,
        "distribution_version": _version_of(subject.distribution),
        "listed": subject.reference.is_listed,
        "capabilities": spec.capabilities.as_json(),
        "proved_dtypes": list(subject.proved_dtypes),
    }


def probe_record(report: ProbeReport) -> Mapping[str, object]:
    return report.as_json()


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""
