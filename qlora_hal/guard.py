"""The wall between core and backend: foreign exceptions become ours, and what comes back is checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from qlora_hal.backend import Compute, DeviceFacts, Quantization, QuantizedLoRATrainer
from qlora_hal.errors import BackendContractError, BackendError, QloraHalError
from qlora_hal.model.source import ModelSource
from qlora_hal.values import (
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


class GuardedTrainer:
    """A trainer behind the wall. Every method names the backend when it fails."""

    def __init__(self, trainer: QuantizedLoRATrainer) -> None:
        self._trainer = trainer
        self._name = trainer.spec.name
        self._expected: Mapping[str, tuple[int, ...]] = {}

    def proved_compute_dtypes(self) -> tuple[str, ...]:
        with self._wall("proved_compute_dtypes"):
            return tuple(self._trainer.proved_compute_dtypes())

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        with self._wall("load"):
            self._trainer.load(source, quantization, compute)

    def linear_modules(self) -> Mapping[str, tuple[int, int]]:
        with self._wall("linear_modules"):
            return dict(self._trainer.linear_modules())

    def attach(self, adapter: Adapter, optimizer: str) -> None:
        with self._wall("attach"):
            self._trainer.attach(adapter, optimizer)
        self._expected = {name: tensor.shape for name, tensor in adapter.tensors.items()}

    def device_facts(self) -> DeviceFacts:
        with self._wall("device_facts"):
            return self._trainer.device_facts()

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        with self._wall("train_step"):
            return _GuardedStep(self._trainer.train_step(window, settings), self)

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        with self._wall("evaluate"):
            result = self._trainer.evaluate(batches)
            counted = sum(batch.counted_tokens for batch in batches)
            if result.token_count != counted:
                raise self._broken(f"evaluate counted {result.token_count} tokens of {counted}")
            return result

    def export_adapter(self) -> Adapter:
        with self._wall("export_adapter"):
            adapter = self._trainer.export_adapter()
            self._check_tensors(adapter.tensors, self._expected, "export_adapter")
            return adapter

    def export_optimizer(self) -> OptimizerSnapshot:
        with self._wall("export_optimizer"):
            snapshot = self._trainer.export_optimizer()
            moments = {f"{n}.{k}": s for n, s in self._expected.items() for k in ("exp_avg", "exp_avg_sq")}
            self._check_tensors(snapshot.moments, moments, "export_optimizer")
            return snapshot

    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        with self._wall("import_optimizer"):
            self._trainer.import_optimizer(snapshot)

    def logits(self, batch: Batch) -> Float32:
        with self._wall("logits"):
            found = self._trainer.logits(batch)
            if not isinstance(found, np.ndarray) or found.ndim != 3 or found.shape[:2] != batch.input_ids.shape:
                raise self._broken(f"logits gave {_kind(found)} for a batch {list(batch.input_ids.shape)}")
            return found

    def dequantized_weight(self, module: str) -> Float32:
        with self._wall("dequantized_weight"):
            inputs, outputs = self._trainer.linear_modules()[module]
            found = self._trainer.dequantized_weight(module)
            if not isinstance(found, np.ndarray) or found.shape != (outputs, inputs) or found.dtype != np.float32:
                raise self._broken(f"dequantized_weight gave {_kind(found)} for {module}, [{outputs}, {inputs}]")
            return found

    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        with self._wall("generate"):
            return self._trainer.generate(
                prompt, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, adapter=adapter
            )

    def peak_memory_bytes(self) -> int:
        with self._wall("peak_memory_bytes"):
            return self._trainer.peak_memory_bytes()

    def close(self) -> None:
        with self._wall("close"):
            self._trainer.close()

    @contextmanager
    def _wall(self, method: str) -> Iterator[None]:
        try:
            yield
        except QloraHalError:
            raise
        except Exception as error:
            raise BackendError(
                "QH-B04",
                f"Backend {self._name} failed in {method}: {type(error).__name__}: {error}",
                fix="Run qlora-hal doctor; if it names no cause, report this with the traceback.",
            ) from error

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
            raise self._broken(f"{method} gave wrong, missing or extra tensors: {', '.join(wrong[:5])}")

    def _broken(self, what: str) -> BackendContractError:
        return BackendContractError(
            "QH-B02", f"Backend {self._name} broke the contract: {what}.", fix="Report this to the backend's author."
        )


def _kind(found: object) -> str:
    return f"{found.dtype}{list(found.shape)}" if isinstance(found, np.ndarray) else f"a {type(found).__name__}"


class _GuardedStep:
    def __init__(self, pending: PendingStep, guard: GuardedTrainer) -> None:
        self._pending = pending
        self._guard = guard

    def resolve(self) -> StepStats:
        with self._guard._wall("resolve"):
            stats = self._pending.resolve()
            if not isinstance(stats, StepStats):
                raise self._guard._broken(f"resolve gave a {type(stats).__name__}, not StepStats")
            return stats
