"""Plugins that misbehave: they raise, hang, print, exit, crash, lie about themselves or hand over the wrong kind."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
import time
import types
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qlora_hal.contract.backend import Availability, BackendSpec, Compute, ProbeReport, Quantization
from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.toolkit import Done
from qlora_hal.contract.values import (
    Adapter,
    Batch,
    Float32,
    Int32,
    LossSum,
    OptimizerSnapshot,
    PendingStep,
    StepSettings,
)
from qlora_hal.errors import AdapterError, ModelError, UnsupportedFeatureError
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.reference_backend import CAPABILITIES, probe
from qlora_hal_conformance.reference_backend.rooms import HONEST
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle.adamw import AdamWState
from qlora_hal_oracle.llama import ForwardPass

from .registry import ChangeSpec, Mutant, with_trainer

STUB_LIBRARIES = str(Path(__file__).parent / "stub_libraries")


class RaisesInLoad(ReferenceTrainer):
    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        raise KeyError("model.layers.0.self_attn.q_proj.weight_scale_inv")


class HangsInTrainStep(ReferenceTrainer):
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        threading.Event().wait()
        raise AssertionError("never reached")


class Prints(ReferenceTrainer):
    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        print(f"Loading {source.name} ... done")
        super().load(source, quantization, compute)


class Incomplete(ReferenceTrainer):
    """`evaluate` was forgotten."""

    @abstractmethod
    def evaluate(self, batches: Sequence[Batch]) -> LossSum: ...


class NotATrainer:
    """Looks like one from afar."""

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        pass


class ExitsInEvaluate(ReferenceTrainer):
    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        sys.exit(0)


class CrashesInGradients(ReferenceTrainer):
    def gradients(self, window: Sequence[Batch]) -> Mapping[str, Float32]:
        os.abort()


class Float64Out(ReferenceTrainer):
    def logits(self, batch: Batch) -> Float32:
        return super().logits(batch).astype(np.float64)


class LastPositionOnly(ReferenceTrainer):
    def logits(self, batch: Batch) -> Float32:
        return super().logits(batch)[:, -1:]


class PaddingInTheCount(ReferenceTrainer):
    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        return replace(super().evaluate(batches), token_count=sum(batch.input_ids.size for batch in batches))


class TensorsLeftOut(ReferenceTrainer):
    def export_adapter(self) -> Adapter:
        exported = super().export_adapter()
        first = min(exported.tensors)
        return Adapter({n: t for n, t in exported.tensors.items() if n != first}, exported.config)


class ClosesOnce(ReferenceTrainer):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise RuntimeError("handle is closed")
        self.closed = self._base is not None
        super().close()


class KeepsEveryStep(ReferenceTrainer):
    """Keeps every activation of every step, as a loss does that still holds its graph."""

    def __init__(self, *, spec: BackendSpec) -> None:
        super().__init__(HONEST, spec)
        self.kept: list[ForwardPass] = []

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        self.kept.extend(self.attached.model.forward(batch) for batch in window)
        return super().train_step(window, settings)


class ForeignErrors(ReferenceTrainer):
    """Refuses in its own words: nothing typed, nothing to do about it."""

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        try:
            super().load(source, quantization, compute)
        except ModelError as error:
            raise RuntimeError("load failed") from error

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        try:
            super().attach(adapter, optimizer)
        except AdapterError as error:
            raise RuntimeError("attach failed") from error


class AnyMomentsWillDo(ReferenceTrainer):
    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        fitting = {n: m for n, m in snapshot.moments.items() if n.rpartition(".")[0] in self.attached.parameters}
        if len(fitting) == 2 * len(self.attached.parameters):
            super().import_optimizer(snapshot)
        else:
            self.attached.state = AdamWState(snapshot.step)


class RefusesGeneration(ReferenceTrainer):
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        raise UnsupportedFeatureError("QH-B01", "Generation is not offered here.", fix="Use another backend.")


class AnyModuleWillDo(ReferenceTrainer):
    """Tensors for modules that the model does not have are left out without a word."""

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        modules = self.linear_modules()
        kept = tuple(module for module in adapter.config.target_modules if module in modules)
        tensors = {n: t for n, t in adapter.tensors.items() if any(f".{m}.lora_" in n for m in kept)}
        super().attach(Adapter(tensors, replace(adapter.config, target_modules=kept)), optimizer)


class StatsAsTuple(ReferenceTrainer):
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        stats = super().train_step(window, settings).resolve()
        return Done((stats.loss_sum, stats.token_count, stats.grad_norm))  # type: ignore[arg-type]


# specs ---------------------------------------------------------------------------------------------------------------
def without(*features: Feature) -> ChangeSpec:
    def change(spec: BackendSpec) -> BackendSpec:
        kept = spec.capabilities.features - set(features)
        return replace(spec, capabilities=replace(spec.capabilities, features=kept))

    return change


def with_features(*features: Feature) -> ChangeSpec:
    def change(spec: BackendSpec) -> BackendSpec:
        more = spec.capabilities.features | set(features)
        return replace(spec, capabilities=replace(spec.capabilities, features=more))

    return change


def with_probe(wrong: Callable[[], ProbeReport]) -> ChangeSpec:
    return lambda spec: replace(spec, probe=lambda: replace(wrong(), backend=spec.name))


def accepts_everything(spec: BackendSpec) -> ReferenceTrainer:
    """Its trainer looks at wider capabilities than its spec shows."""
    return ReferenceTrainer(HONEST, replace(spec, capabilities=CAPABILITIES))


class RefusesInItsOwnWords(ReferenceTrainer):
    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        if adapter.config.dropout:
            raise NotImplementedError("dropout")
        super().attach(adapter, optimizer)


def probe_that_imports_torch() -> ProbeReport:
    try:
        importlib.import_module("torch")
    except ImportError:
        sys.modules["torch"] = types.ModuleType("torch")
    return probe()


def slow_probe() -> ProbeReport:
    time.sleep(0.3)
    return probe()


def probe_without_fix() -> ProbeReport:
    sys.path.append(STUB_LIBRARIES)
    try:
        found = importlib.util.find_spec("tinygrad")
    finally:
        sys.path.remove(STUB_LIBRARIES)
    return probe() if found else ProbeReport("", Availability.MISSING_PACKAGE, "tinygrad is not installed.")


def probe_that_raises() -> ProbeReport:
    raise OSError("libaccelerator.so.2: cannot open shared object file")


def open_not_a_trainer(spec: BackendSpec) -> object:
    return NotATrainer()


def honest(spec: BackendSpec) -> ReferenceTrainer:
    return ReferenceTrainer(HONEST, spec)


MUTANTS = (
    Mutant(
        "probe_imports_torch",
        "Imports torch to answer a probe.",
        ("10",),
        honest,
        "",
        with_probe(probe_that_imports_torch),
    ),
    Mutant("probe_is_slow", "Takes 0.3 s to answer a probe.", ("10",), honest, "", with_probe(slow_probe)),
    Mutant(
        "probe_without_fix",
        "Says that something is missing, not what to do.",
        ("10",),
        honest,
        "amd/playbooks#250",
        with_probe(probe_without_fix),
    ),
    Mutant(
        "probe_raises",
        "Raises in its probe.",
        ("10",),
        honest,
        "unslothai/unsloth#10273",
        with_probe(probe_that_raises),
    ),
    Mutant(
        "written_for_another_contract",
        "Was written for contract 3.",
        ("10", "11"),
        honest,
        change_spec=lambda spec: replace(spec, contract=3),
    ),
    Mutant("raises_in_load", "Raises KeyError in load.", ("11", "20"), with_trainer(RaisesInLoad), "unsloth#9466"),
    Mutant("lacks_a_method", "Has no evaluate.", ("11",), with_trainer(Incomplete), may_fail=("10",)),
    Mutant("is_no_trainer", "Gives an object of another class.", ("11",), open_not_a_trainer, may_fail=("10",)),
    Mutant("prints_to_stdout", "Prints progress to standard output.", ("11",), with_trainer(Prints)),
    Mutant("gives_float64", "Gives logits in float64.", ("11", "30"), with_trainer(Float64Out)),
    Mutant(
        "gives_the_last_logits_only", "Gives logits of the last position.", ("11", "30"), with_trainer(LastPositionOnly)
    ),
    Mutant("counts_padding", "Counts padding in evaluate.", ("11", "30", "31"), with_trainer(PaddingInTheCount)),
    Mutant(
        "leaves_a_tensor_out", "Exports an adapter with a tensor missing.", ("11", "51"), with_trainer(TensorsLeftOut)
    ),
    Mutant("closes_once", "Raises when closed twice.", ("11",), with_trainer(ClosesOnce)),
    Mutant("stats_as_tuple", "Gives a tuple where StepStats are due.", ("11", "40"), with_trainer(StatsAsTuple)),
    Mutant(
        "crashes_in_gradients",
        "Ends the process by a signal in gradients.",
        ("11", "31"),
        with_trainer(CrashesInGradients),
        "unslothai/unsloth#10273",
    ),
    Mutant(
        "exits_in_evaluate",
        "Calls sys.exit(0) in evaluate.",
        ("11", "30"),
        with_trainer(ExitsInEvaluate),
        "ml-explore/mlx-lm#236",
    ),
    Mutant(
        "hangs_in_train_step",
        "Never returns from train_step.",
        ("11", "40"),
        with_trainer(HangsInTrainStep),
        case_seconds=6.0,
    ),
    Mutant(
        "declares_too_little",
        "Does double quantization that it does not declare.",
        ("20",),
        accepts_everything,
        change_spec=without(Feature.DOUBLE_QUANT),
    ),
    Mutant(
        "refuses_in_its_own_words",
        "Refuses undeclared dropout with NotImplementedError.",
        ("31", "43"),
        with_trainer(RefusesInItsOwnWords),
        change_spec=without(Feature.LORA_DROPOUT),
        may_fail=("30",),
    ),
    Mutant(
        "declares_generation_but_refuses",
        "Declares generation and refuses it.",
        ("80",),
        with_trainer(RefusesGeneration),
        "GPTQModel#1534",
        may_fail=("11", "31"),
    ),
    Mutant(
        "declares_peak_memory_without_a_method",
        "Declares a peak memory figure and has none.",
        ("60",),
        honest,
        change_spec=with_features(Feature.PEAK_MEMORY),
        may_fail=("11",),
    ),
    Mutant(
        "keeps_every_step",
        "Keeps the activations of every step alive.",
        ("60",),
        with_trainer(KeepsEveryStep),
        "bitsandbytes#1569",
    ),
    Mutant("foreign_errors", "Answers bad input with untyped errors.", ("70",), with_trainer(ForeignErrors)),
    Mutant(
        "unknown_modules_left_out",
        "Leaves out adapter tensors whose module the model does not have.",
        ("51", "70"),
        with_trainer(AnyModuleWillDo),
        "ml-explore/mlx-lm#1120",
    ),
    Mutant(
        "any_moments_will_do",
        "Starts afresh when imported moments do not fit.",
        ("50", "70"),
        with_trainer(AnyMomentsWillDo),
    ),
)
