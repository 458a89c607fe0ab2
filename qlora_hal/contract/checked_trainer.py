"""The checks between core and backend: foreign exceptions become ours, and what comes back is checked."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np

from qlora_hal.contract.backend import Compute, DeviceFacts, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.gates import check_gates
from qlora_hal.contract.toolkit import MOMENTS, WindowCount, has_weights
from qlora_hal.contract.type_checks import wrong_fields
from qlora_hal.contract.values import (
    Adapter,
    AdapterConfig,
    Batch,
    Float32,
    Float64,
    Int32,
    LinearShape,
    LossSum,
    OptimizerSnapshot,
    PendingStep,
    StepSettings,
    StepStats,
)
from qlora_hal.contract.world import RankFacts, World
from qlora_hal.errors import BackendContractError, BackendError, QloraHalError
from qlora_hal.errors.foreign import told
from qlora_hal.errors.terminal_text import show
from qlora_hal.processes.turns import alone_in_process

if TYPE_CHECKING:
    from qlora_hal.model.source import ModelSource


def _to_stderr(note: str) -> None:
    show(f"note: {note}", stream=sys.stderr)


class CheckedTrainer:
    """A trainer whose answers are checked. Every failure names the backend and the method; `note` gets what is none.

    It is asked one thing at a time, whatever threads ask: whether the adapter counts is a switch of the whole model, so
    of two answers at once one would be that of the other model."""

    def __init__(self, trainer: QuantizedLoRATrainer, note: Callable[[str], None] = _to_stderr) -> None:
        self._trainer = trainer
        self._note = note
        self._name = trainer.spec.name
        self._config: AdapterConfig | None = None
        self._expected: Mapping[str, tuple[int, ...]] = {}
        self._steps_applied = 0
        self._ranks = 1
        self._turn = threading.RLock()

    def join_ranks(self, world: World, timeout_seconds: float) -> None:
        with self._checked("join_ranks"):
            self._trainer.join_ranks(world, timeout_seconds)
        self._ranks = world.size

    def sum_over_ranks(self, values: Float64) -> Float64:
        with self._checked("sum_over_ranks"):
            found = self._trainer.sum_over_ranks(values)
            if not isinstance(found, np.ndarray) or found.shape != values.shape or found.dtype != np.float64:
                raise self._broken(f"sum_over_ranks returned {_kind(found)} for float64 {list(values.shape)}")
            return found

    def rank_facts(self) -> RankFacts:
        with self._checked("rank_facts"):
            facts = self._trainer.rank_facts()
            self._require(RankFacts, facts, "rank_facts")
            return facts

    def proved_compute_dtypes(self) -> tuple[str, ...]:
        with self._checked("proved_compute_dtypes"):
            found, declared = self._trainer.proved_compute_dtypes(), self._trainer.spec.capabilities.compute_dtypes
            if not found or isinstance(found, str) or not declared.issuperset(found):
                raise self._broken(
                    f"proved_compute_dtypes returned {found!r}; it declares {', '.join(sorted(declared))}"
                )
            return tuple(found)

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        with alone_in_process(), self._checked("load"):
            check_gates(self._trainer.spec, compute)
            self._trainer.load(source, quantization, compute)
        for note in self._trainer.load_notes:
            self._note(note)

    def linear_modules(self) -> Mapping[str, LinearShape]:
        with self._checked("linear_modules"):
            return dict(self._trainer.linear_modules())

    def attach(self, adapter: Adapter, optimizer: str) -> None:
        with alone_in_process(), self._checked("attach"):
            check_gates(self._trainer.spec, adapter.config)
            self._trainer.attach(adapter, optimizer)
        self._config = adapter.config
        self._expected = {name: tensor.shape for name, tensor in adapter.tensors.items()}
        self._steps_applied = 0

    def device_facts(self) -> DeviceFacts:
        with self._checked("device_facts"):
            facts = self._trainer.device_facts()
            self._require(DeviceFacts, facts, "device_facts")
            return facts

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        with self._checked("train_step"):
            for given in (settings, *window):
                check_gates(self._trainer.spec, given)
            return _CheckedStep(self._trainer.train_step(window, settings), window, self)

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        with self._checked("evaluate"):
            for batch in batches:
                check_gates(self._trainer.spec, batch)
            result = self._trainer.evaluate(batches)
            self._require(LossSum, result, "evaluate")
            counted = sum(batch.counted_tokens for batch in batches)
            if result.token_count != counted:
                raise self._broken(f"evaluate counted {result.token_count} tokens of {counted}")
            self._require_weighted(result.weighted_loss_sum, has_weights(batches), "evaluate")
            return result

    def export_adapter(self) -> Adapter:
        with self._checked("export_adapter"):
            adapter = self._trainer.export_adapter()
            self._require(Adapter, adapter, "export_adapter")
            self._check_tensors(adapter.tensors, self._expected, "export_adapter")
            if adapter.config != self._config:
                names = [f.name for f in fields(AdapterConfig)]
                other = [name for name in names if getattr(adapter.config, name) != getattr(self._config, name, None)]
                raise self._broken(f"export_adapter returned another {', '.join(other)} than was attached")
            if strange := [name for name, tensor in adapter.tensors.items() if not np.isfinite(tensor).all()]:
                raise self._broken(f"export_adapter returned numbers that are not finite in {', '.join(strange[:5])}")
            return adapter

    def export_optimizer(self) -> OptimizerSnapshot:
        with self._checked("export_optimizer"):
            snapshot = self._trainer.export_optimizer()
            self._require(OptimizerSnapshot, snapshot, "export_optimizer")
            if snapshot.step != self._steps_applied:
                raise self._broken(
                    f"export_optimizer returned step {snapshot.step} after {self._steps_applied} updates"
                )
            moments = {f"{n}.{k}": s for n, s in self._expected.items() for k in MOMENTS}
            self._check_tensors(snapshot.moments, moments, "export_optimizer")
            return snapshot

    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        with self._checked("import_optimizer"):
            self._trainer.import_optimizer(snapshot)
        self._steps_applied = snapshot.step

    def gradients(self, window: Sequence[Batch]) -> Mapping[str, Float32]:
        with self._checked("gradients"):
            for batch in window:
                check_gates(self._trainer.spec, batch)
            found = self._trainer.gradients(window)
            self._check_tensors(found, self._expected, "gradients")
            return found

    def logits(self, batch: Batch) -> Float32:
        with self._checked("logits"):
            found = self._trainer.logits(batch)
            if not isinstance(found, np.ndarray) or found.ndim != 3 or found.shape[:2] != batch.input_ids.shape:
                raise self._broken(f"logits returned {_kind(found)} for a batch {list(batch.input_ids.shape)}")
            return found

    def dequantized_weight(self, module: str) -> Float32:
        with self._checked("dequantized_weight"):
            expected = self._trainer.linear_modules()[module].weight
            found = self._trainer.dequantized_weight(module)
            if not isinstance(found, np.ndarray) or found.shape != expected or found.dtype != np.float32:
                raise self._broken(f"dequantized_weight returned {_kind(found)} for {module}, {list(expected)}")
            return found

    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        with self._checked("generate"):
            found = self._trainer.generate(
                prompt, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, adapter=adapter
            )
            if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype != np.int32:
                raise self._broken(f"generate returned {_kind(found)}, int32 tokens [new] are expected")
            return found

    def peak_memory_bytes(self) -> int:
        with self._checked("peak_memory_bytes"):
            return self._trainer.peak_memory_bytes()

    def close(self) -> None:
        """A failure is told and not raised: it would fail what is done, or stand before the error that ended it."""
        try:
            with self._checked("close"):
                self._trainer.close()
        except QloraHalError as failure:
            self._note(f"the device may not be free yet: {failure.message}")

    @contextmanager
    def _checked(self, method: str) -> Iterator[None]:
        try:
            with self._turn:
                yield
        except QloraHalError:
            raise
        except (Exception, SystemExit) as error:  # a backend that leaves has not done what it was asked for
            raise BackendError(
                "QH-B04",
                f"Backend {self._name} failed in {method}: {told(error)}",
                fix="Run qlora-hal doctor; if it names no cause, report this with the traceback.",
            ) from error

    def _require(self, kind: type, found: object, method: str) -> None:
        if not isinstance(found, kind):
            raise self._broken(f"{method} returned a {type(found).__name__}, not {kind.__name__}")
        if wrong := wrong_fields(found):
            raise self._broken(f"{method} returned {kind.__name__} with wrong fields: {'; '.join(wrong)}")

    def _require_weighted(self, weighted: float | None, due: bool, method: str) -> None:
        if due and weighted is None:
            raise self._broken(f"{method} returned no weighted sum of a loss with weights")

    def _check_tensors(self, found: Mapping[str, object], expected: Mapping[str, tuple[int, ...]], method: str) -> None:
        wrong = [
            name
            for name, shape in expected.items()
            if not isinstance(tensor := found.get(name), np.ndarray)
            or tensor.shape != tuple(shape)
            or tensor.dtype != np.float32
        ]
        wrong += sorted(set(found) - set(expected))
        if wrong:
            raise self._broken(f"{method} returned wrong, missing or extra tensors: {', '.join(wrong[:5])}")

    def _broken(self, what: str) -> BackendContractError:
        return BackendContractError(
            "QH-B02", f"Backend {self._name} broke the contract: {what}.", fix="Report this to the backend's author."
        )


def _kind(found: object) -> str:
    return f"{found.dtype}{list(found.shape)}" if isinstance(found, np.ndarray) else f"a {type(found).__name__}"


class _CheckedStep:
    def __init__(self, pending: PendingStep, window: Sequence[Batch], trainer: CheckedTrainer) -> None:
        self._pending = pending
        self._counted = WindowCount.of(window)
        self._trainer = trainer

    def resolve(self) -> StepStats:
        trainer = self._trainer
        with trainer._checked("resolve"):
            stats = self._pending.resolve()
            trainer._require(StepStats, stats, "resolve")
            # With several ranks the step tells of the whole window, of which this one knows its own part alone.
            if stats.token_count < self._counted.tokens or (
                trainer._ranks == 1 and stats.token_count != self._counted.tokens
            ):
                raise trainer._broken(f"resolve counted {stats.token_count} tokens of {self._counted.tokens}")
            trainer._require_weighted(stats.weighted_loss_sum, self._counted.has_weights, "resolve")
            if stats.grad_norm < 0:
                raise trainer._broken(f"resolve returned the gradient norm {stats.grad_norm}")
            trainer._steps_applied += stats.applied
            return stats
