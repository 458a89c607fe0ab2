"""Backends that are right in one thread, one dtype, step by step, and with arrays that nobody touches again."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from qlora_hal.contract.backend import Compute, Quantization
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
    StepStats,
)
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.reference_backend.step import MasksOf, WindowResult, window_gradient
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle import Arithmetic, OracleLlama
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.loss import token_losses

from .registry import Mutant, with_rooms, with_trainer

EXP_OVERFLOWS = 88.7
SMALLEST_PROBABILITY = 1e-12


# threads and dtypes ---------------------------------------------------------------------------------------------------
class LoadingThreadOnly(ReferenceTrainer):
    """Holds its adapter's switch in a variable of the thread: elsewhere it is off."""

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        super().load(source, quantization, compute)
        self.at_home = threading.get_ident()

    def logits_of(self, batch: Batch, *, adapter: bool = True) -> Float64:
        return super().logits_of(batch, adapter=adapter and threading.get_ident() == self.at_home)


class GradientsOfTheLoadingThread(ReferenceTrainer):
    """Gradients are recorded in the loading thread alone, as by a switch that each thread has for itself."""

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        super().load(source, quantization, compute)
        self.at_home = threading.get_ident()

    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        found = super().gradient_of(window, divisor, masks_of)
        if threading.get_ident() == self.at_home:
            return found
        return replace(found, gradients={name: 0.0 * gradient for name, gradient in found.gradients.items()})


class DtypeOfTheLastLoaded(ReferenceTrainer):
    """One default dtype for the process."""

    last: ClassVar[Arithmetic | None] = None

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        super().load(source, quantization, compute)
        DtypeOfTheLastLoaded.last = self.arithmetic

    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        self.arithmetic = self.last or self.arithmetic
        return super().gradient_of(window, divisor, masks_of)

    def logits_of(self, batch: Batch, *, adapter: bool = True) -> Float64:
        self.arithmetic = self.last or self.arithmetic
        return super().logits_of(batch, adapter=adapter)


# figures read late ----------------------------------------------------------------------------------------------------
@dataclass(slots=True, eq=False)
class ReadFromTheTrainer:
    """A pending step that finds some of its figures where the last step left them."""

    own: StepStats
    trainer: LastFigures

    def resolve(self) -> StepStats:
        last = self.trainer.figures
        return replace(self.own, **{name: getattr(last, name) for name in self.trainer.shared})


class LastFigures(ReferenceTrainer):
    shared: ClassVar[tuple[str, ...]] = ("loss_sum",)
    figures: StepStats

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        self.figures = super().train_step(window, settings).resolve()
        return ReadFromTheTrainer(self.figures, self)


class LastNorm(LastFigures):
    shared = ("grad_norm",)


class LastApplied(LastFigures):
    shared = ("applied",)


@dataclass(slots=True, eq=False)
class Computed:
    """A step that is computed when it is first asked for."""

    trainer: LazySteps
    window: Sequence[Batch]
    settings: StepSettings
    stats: StepStats | None = None

    def resolve(self) -> StepStats:
        self.trainer.catch_up()
        assert self.stats is not None
        return self.stats


class LazySteps(ReferenceTrainer):
    """Keeps queued windows by reference, and computes them when a figure or the state is asked for."""

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        step = Computed(self, window, settings)
        self.__dict__.setdefault("queued", []).append(step)
        return step

    def catch_up(self) -> None:
        queued, self.__dict__["queued"] = self.__dict__.get("queued", []), []
        for step in queued:
            step.stats = super().train_step(step.window, step.settings).resolve()

    def export_adapter(self) -> Adapter:
        self.catch_up()
        return super().export_adapter()

    def export_optimizer(self) -> OptimizerSnapshot:
        self.catch_up()
        return super().export_optimizer()

    def logits(self, batch: Batch) -> Float32:
        self.catch_up()
        return super().logits(batch)

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        self.catch_up()
        super().attach(adapter, optimizer)


# the caller's arrays --------------------------------------------------------------------------------------------------
def by_reference(tensor: Float32) -> Float64:
    """The caller's own array: float64 appears with the first update."""
    return tensor  # type: ignore[return-value]


class RememberedByIdentity(ReferenceTrainer):
    """Gives the logits of an array of tokens again as long as it is the same array."""

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        super().attach(adapter, optimizer)
        self.remembered: dict[int, tuple[Int32, Float32]] = {}

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        self.remembered = {}
        return super().train_step(window, settings)

    def logits(self, batch: Batch) -> Float32:
        remembered = self.__dict__.setdefault("remembered", {})
        if id(batch.input_ids) not in remembered:
            # The array is kept too, so that no other can have its address.
            remembered[id(batch.input_ids)] = batch.input_ids, super().logits(batch)
        logits: Float32 = remembered[id(batch.input_ids)][1].copy()
        return logits


class MomentsInTheCallersArrays(ReferenceTrainer):
    """Goes on in the arrays of an imported snapshot."""

    imported: Mapping[str, Float32] | None = None

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        super().attach(adapter, optimizer)
        self.imported = None

    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        super().import_optimizer(snapshot)
        self.imported = snapshot.moments

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        stats = super().train_step(window, settings).resolve()
        if self.imported is not None:
            for name, moment in super().export_optimizer().moments.items():
                np.copyto(self.imported[name], moment)
        return Done(stats)


class PromptUsedAsBuffer(ReferenceTrainer):
    """Shifts the prompt by the new tokens, in place."""

    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        new = super().generate(prompt, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, adapter=adapter)
        prompt[:] = np.concatenate([prompt, new])[-len(prompt) :]
        return new


# loud logits ----------------------------------------------------------------------------------------------------------
def loss_without_the_largest_logit(
    model: OracleLlama, window: Sequence[Batch], divisor: float, masks_of: MasksOf, arithmetic: Arithmetic
) -> WindowResult:
    """log(sum(exp(z))) as it is written: infinite beyond 88."""
    found = window_gradient(model, window, divisor, masks_of, arithmetic)
    peak = max(float(model.forward(batch, arithmetic, masks_of(batch)).logits.max()) for batch in window)
    return replace(found, loss_sum=math.inf) if peak > EXP_OVERFLOWS else found


class LossOfAtLeastAProbability(ReferenceTrainer):
    """-log(p + 1e-12) in evaluation: no token has a loss of more than 27.6."""

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        found = super().evaluate(batches)
        most = -math.log(SMALLEST_PROBABILITY)
        losses = [
            np.minimum(token_losses(self.logits_of(batch), batch.labels), most).sum()
            for batch in batches
            if batch.counted_tokens
        ]
        return replace(found, loss_sum=min(found.loss_sum, float(sum(losses))))


class LogitsCut(ReferenceTrainer):
    """Shows logits between -100 and 100."""

    def logits(self, batch: Batch) -> Float32:
        return np.clip(super().logits(batch), -100.0, 100.0)


_ROOM = ("91",)
MUTANTS = (
    Mutant(
        "adapter_of_the_loading_thread",
        "Uses the adapter in the thread that loaded the model alone.",
        _ROOM,
        with_trainer(LoadingThreadOnly),
    ),
    Mutant(
        "gradients_of_the_loading_thread",
        "Finds gradients of zero in any thread but the one that loaded the model.",
        _ROOM,
        with_trainer(GradientsOfTheLoadingThread),
        recreates="torch.set_grad_enabled, which each thread has for itself",
    ),
    Mutant(
        "dtype_of_the_last_loaded",
        "Computes every trainer in the dtype of the one that was loaded last.",
        _ROOM,
        with_trainer(DtypeOfTheLastLoaded),
        recreates="torch.set_default_dtype, which a process has once",
    ),
    Mutant(
        "loss_of_the_last_step", "Tells the last step's loss for every pending one.", _ROOM, with_trainer(LastFigures)
    ),
    Mutant("norm_of_the_last_step", "Tells the last step's norm for every pending one.", _ROOM, with_trainer(LastNorm)),
    Mutant(
        "applied_of_the_last_step",
        "Tells for every pending step whether the last one was applied.",
        _ROOM,
        with_trainer(LastApplied),
    ),
    Mutant(
        "queued_windows_kept_by_reference",
        "Computes a queued step when it is asked for, from what the caller's arrays hold by then.",
        _ROOM,
        with_trainer(LazySteps),
    ),
    Mutant(
        "adapter_kept_by_reference",
        "Computes with the arrays given to attach until the first step.",
        _ROOM,
        with_rooms(adapter_in=by_reference),
    ),
    Mutant(
        "logits_remembered_by_identity",
        "Gives the same logits for the same array, whatever it holds by then.",
        _ROOM,
        with_trainer(RememberedByIdentity),
    ),
    Mutant(
        "moments_in_the_callers_arrays",
        "Writes later moments into the arrays of an imported snapshot.",
        _ROOM,
        with_trainer(MomentsInTheCallersArrays),
        may_fail=("50",),
    ),
    Mutant(
        "prompt_used_as_buffer",
        "Shifts the caller's prompt by the new tokens.",
        ("80", "91"),
        with_trainer(PromptUsedAsBuffer),
        may_fail=("31",),
    ),
    Mutant(
        "loss_overflows_beyond_88",
        "Sums exp(logit) as it is: the loss is infinite where a logit is above 88.",
        ("90",),
        with_rooms(window_gradient=loss_without_the_largest_logit),
    ),
    Mutant(
        "loss_of_at_least_a_probability",
        "Evaluates no probability below 1e-12.",
        ("90",),
        with_trainer(LossOfAtLeastAProbability),
    ),
    Mutant("logits_cut_at_100", "Cuts logits at -100 and 100.", ("90",), with_trainer(LogitsCut)),
)
