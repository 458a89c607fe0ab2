"""State that comes back other than it left: resume, export, import, generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qlora_hal.contract.values import Adapter, Batch, Int32, OptimizerSnapshot, PendingStep, StepSettings
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer

from .registry import Mutant, with_trainer


class StaleOptimizer(ReferenceTrainer):
    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        pass


class AdapterInTheComputeDtype(ReferenceTrainer):
    """Nothing of it shows in float32."""

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        pending, parameters = super().train_step(window, settings), self.attached.parameters
        parameters.update({name: self.arithmetic.store(tensor) for name, tensor in parameters.items()})
        return pending


class SecondMomentsInTheComputeDtype(ReferenceTrainer):
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        pending, moments = super().train_step(window, settings), self.attached.state.exp_avg_sq
        moments.update({name: self.arithmetic.store(tensor) for name, tensor in moments.items()})
        return pending


class StepCountLost(ReferenceTrainer):
    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        super().import_optimizer(replace(snapshot, step=0))


class GeneratorRestarted(ReferenceTrainer):
    """Masks come from a count of steps in this process, not from the key."""

    steps = 0

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        self.steps += 1
        return super().train_step(window, replace(settings, dropout_key=self.steps))


class WindowRepeatedOnResume(ReferenceTrainer):
    """A prefetch buffer that is kept over a resume: its window is used again."""

    resumed = False
    buffered: Sequence[Batch] | None = None

    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        super().import_optimizer(snapshot)
        self.resumed = True

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        if self.resumed and self.buffered is None:
            self.buffered = window
            return super().train_step(window, settings)
        if self.resumed and self.buffered is not None:
            window, self.buffered = self.buffered, window
            settings = replace(settings, denominator=float(sum(batch.counted_tokens for batch in window)))
        return super().train_step(window, settings)


class MomentsKeptOnAttach(ReferenceTrainer):
    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        before = self._attached
        super().attach(adapter, optimizer)
        if before is not None:
            self.attached.state = before.state


class ExportedInBfloat16(ReferenceTrainer):
    def export_adapter(self) -> Adapter:
        exported = super().export_adapter()
        cut = {n: (t.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) for n, t in exported.tensors.items()}
        return Adapter(cut, exported.config)


class AdapterOfTheStepBefore(ReferenceTrainer):
    """Exports a copy that is refreshed before the update."""

    copied: Adapter | None = None

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        super().attach(adapter, optimizer)
        self.copied = super().export_adapter()

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        self.copied = super().export_adapter()
        return super().train_step(window, settings)

    def export_adapter(self) -> Adapter:
        assert self.copied is not None
        return self.copied


class ScaleFolded(ReferenceTrainer):
    """Exports B with alpha / r multiplied in."""

    def export_adapter(self) -> Adapter:
        exported = super().export_adapter()
        scale = np.float32(exported.config.scale)
        return Adapter({n: t * scale if "lora_B" in n else t for n, t in exported.tensors.items()}, exported.config)


class MomentsSwapped(ReferenceTrainer):
    def export_optimizer(self) -> OptimizerSnapshot:
        snapshot = super().export_optimizer()
        swapped = {
            name.removesuffix("_sq") if name.endswith("_sq") else f"{name}_sq": moment
            for name, moment in snapshot.moments.items()
        }
        return replace(snapshot, moments=swapped)


class ExportedTransposed(ReferenceTrainer):
    def export_adapter(self) -> Adapter:
        exported = super().export_adapter()
        turned = {n: np.ascontiguousarray(t.T).reshape(t.shape) for n, t in exported.tensors.items()}
        return Adapter(turned, exported.config)


class Aliasing(ReferenceTrainer):
    """Exports views of its own buffers, which the next step changes."""

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        super().attach(adapter, optimizer)
        self.buffers = dict(super().export_adapter().tensors)

    def export_adapter(self) -> Adapter:
        return Adapter(self.buffers, self.attached.adapter.config)

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        pending = super().train_step(window, settings)
        for name, tensor in self.attached.parameters.items():
            np.copyto(self.buffers[name], tensor, casting="same_kind")
        return pending


class CallersArraysKept(ReferenceTrainer):
    """Trains in the arrays that the caller gave to `attach`."""

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        super().attach(adapter, optimizer)
        self.given = adapter.tensors

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        pending = super().train_step(window, settings)
        for name, tensor in self.attached.parameters.items():
            np.copyto(self.given[name], tensor, casting="same_kind")
        return pending


class StopTokensIgnored(ReferenceTrainer):
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        return super().generate(prompt, max_new_tokens=max_new_tokens, adapter=adapter)


class AlwaysWithAdapter(ReferenceTrainer):
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        return super().generate(prompt, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens)


class PromptRepeated(ReferenceTrainer):
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        new = super().generate(prompt, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, adapter=adapter)
        return np.concatenate([prompt, new]).astype(np.int32)


MUTANTS = (
    Mutant(
        "stale_optimizer_on_resume",
        "Ignores the imported moments.",
        ("50", "52"),
        with_trainer(StaleOptimizer),
        recreates="ml-explore/mlx-lm#97",
    ),
    Mutant(
        "step_count_lost_on_resume",
        "Imports moments with the step counted from 0.",
        ("50", "52"),
        with_trainer(StepCountLost),
        recreates="sentence-transformers#3145",
    ),
    Mutant(
        "generator_restarted_on_resume",
        "Draws dropout masks from a generator that a new process starts over.",
        ("43", "50"),
        with_trainer(GeneratorRestarted),
    ),
    Mutant(
        "window_repeated_on_resume",
        "After a resume the first window is trained on twice.",
        ("50",),
        with_trainer(WindowRepeatedOnResume),
        recreates="unsloth#2802",
    ),
    Mutant(
        "moments_kept_on_attach",
        "A second attach keeps the old optimizer.",
        ("11", "40", "50", "51"),
        with_trainer(MomentsKeptOnAttach),
    ),
    Mutant(
        "exported_in_bfloat16",
        "Exports the adapter cut to bfloat16.",
        ("40", "51"),
        with_trainer(ExportedInBfloat16),
        may_fail=("11", "31"),
    ),
    Mutant(
        "exports_the_step_before",
        "Exports the adapter as it was before the last step.",
        ("40", "50", "51"),
        with_trainer(AdapterOfTheStepBefore),
        may_fail=("11", "31"),
    ),
    Mutant(
        "scale_folded_into_export",
        "Exports B multiplied by alpha / r, which is applied again on loading.",
        ("40", "51"),
        with_trainer(ScaleFolded),
        recreates="mlx-examples#832",
        may_fail=("11", "31"),
    ),
    Mutant(
        "exported_transposed",
        "Exports tensors in column order.",
        ("40", "51"),
        with_trainer(ExportedTransposed),
        recreates="ggml-org/llama.cpp#10551",
        may_fail=("11", "31"),
    ),
    Mutant(
        "moments_swapped",
        "Exports the first moments as the second and the second as the first.",
        ("40", "50", "52"),
        with_trainer(MomentsSwapped),
        may_fail=("31",),
    ),
    Mutant(
        "exports_views",
        "Exports views of its buffers: the next step changes what was exported.",
        ("11", "51"),
        with_trainer(Aliasing),
    ),
    Mutant(
        "trains_in_the_callers_arrays",
        "Writes the trained values into the arrays given to attach.",
        ("11", "40", "51"),
        with_trainer(CallersArraysKept),
    ),
    Mutant(
        "stop_tokens_ignored",
        "Generates past a stop token.",
        ("80",),
        with_trainer(StopTokensIgnored),
        recreates="unsloth#416",
    ),
    Mutant(
        "generates_with_the_adapter_always",
        "Answers with the adapter when the base is asked for.",
        ("80",),
        with_trainer(AlwaysWithAdapter),
    ),
    Mutant(
        "prompt_repeated",
        "Gives the prompt back with the new tokens.",
        ("80",),
        with_trainer(PromptRepeated),
        may_fail=("11", "31"),
    ),
    Mutant(
        "adapter_in_the_compute_dtype",
        "Keeps the adapter in the compute dtype: in float32 where that is asked for.",
        ("52",),
        with_trainer(AdapterInTheComputeDtype),
        may_fail=("40", "42", "44", "51"),
    ),
    Mutant(
        "second_moments_in_the_compute_dtype",
        "Keeps the second moments in the compute dtype: in float32 where that is asked for.",
        ("52",),
        with_trainer(SecondMomentsInTheComputeDtype),
        may_fail=("40", "42", "44", "50"),
    ),
)
