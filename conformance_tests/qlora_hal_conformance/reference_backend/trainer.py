"""The reference trainer: the contract's verbs, put together from the rooms of `rooms.py`."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from qlora_hal.adapter.fitting import check_fits
from qlora_hal.adapter.targets import require_no_dropout_on_experts
from qlora_hal.contract.backend import BackendSpec, Compute, DeviceFacts, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import Feature, Requirements
from qlora_hal.contract.dropout import rows_of
from qlora_hal.contract.toolkit import (
    MOMENTS,
    Done,
    check_attached,
    check_batches,
    check_moments,
    memory_named,
    out_of_order,
    require,
    unknown_module,
)
from qlora_hal.contract.values import (
    IGNORE_LABEL,
    Adapter,
    AdapterConfig,
    Batch,
    Float32,
    Int32,
    LinearShape,
    LossSum,
    OptimizerSnapshot,
    PendingStep,
    StepSettings,
    StepStats,
)
from qlora_hal.contract.world import World
from qlora_hal.model.source import ModelSource
from qlora_hal_oracle import DropoutMasks, OracleLlama
from qlora_hal_oracle.adamw import AdamWState, global_norm
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.loss import token_loss_sum, token_losses

from . import SPEC
from .loading import LoadedBase, load_base
from .ranks import Ranks, WholeWindow
from .refusals import refuse_load, refuse_untargeted
from .rooms import HONEST, Rooms
from .rounding import ROUNDINGS, to_float32
from .spreading import spread_and_gathered
from .step import MasksOf, WindowResult, weighted_sum
from .storage import Stored

FIRST_LOSS_SCALE, LOSS_SCALE_FALL = 2.0**16, 2.0**4
"""float16 ends at 6e-8, above many a gradient: a loss is scaled up (Micikevicius et al. 2018), less where it then
overflows."""


@dataclass(slots=True, eq=False)
class Attached:
    """An adapter on the base, and its optimizer. `parameters` are the tensors that `model` reads."""

    adapter: Adapter
    parameters: dict[str, Float64]
    model: OracleLlama
    state: AdamWState


class ReferenceTrainer(QuantizedLoRATrainer):
    """Trains one adapter in NumPy. `rooms` are all that a mutant changes."""

    spec: ClassVar[BackendSpec] = SPEC

    def __init__(self, rooms: Rooms = HONEST, spec: BackendSpec = SPEC) -> None:
        self.spec = spec  # type: ignore[misc]  # one class serves the mutants' specs too
        self.rooms = rooms
        self.arithmetic = rooms.arithmetic("float32")
        self.compute = Compute()
        self._base: LoadedBase | None = None
        self._attached: Attached | None = None
        self.ranks = Ranks()

    # life ----------------------------------------------------------------------------------------------------------
    def join_ranks(self, world: World, timeout_seconds: float) -> None:
        require(self.spec, Requirements(features=frozenset({Feature.DATA_PARALLEL})))
        self.ranks = Ranks.join(world, timeout_seconds)

    def sum_over_ranks(self, values: Float64) -> Float64:
        return self.rooms.votes(self.ranks, values)

    def proved_compute_dtypes(self) -> tuple[str, ...]:
        return tuple(dtype for dtype in ROUNDINGS if dtype in self.spec.capabilities.compute_dtypes)

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        refuse_load(self.spec, source, quantization, compute)
        self._base = self._attached = None
        self.compute = compute
        self.arithmetic = self.rooms.arithmetic(compute.dtype)
        with _quiet():
            unpack = self._unpack_spread if compute.shard_base else self.rooms.unpack
            # What is rounded to 8 bits is the weight itself, not its bfloat16.
            decoded = to_float32 if compute.fp8_products else self.arithmetic.store
            self._base = load_base(source, quantization, self.arithmetic.store, decoded, self.rooms.pack, unpack)

    def linear_modules(self) -> Mapping[str, LinearShape]:
        return dict(self.base.linear_modules)

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        check_attached(self.spec, adapter.config, optimizer)
        with self.memory_named("attaching the adapter"):
            check_fits(adapter, self.base.linear_modules, where="attach")
            refuse_untargeted(adapter)
            targets = [self.base.linear_modules[module] for module in adapter.config.target_modules]
            require_no_dropout_on_experts(adapter.config.dropout, targets)
            parameters = {name: self.rooms.adapter_in(tensor) for name, tensor in sorted(adapter.tensors.items())}
        self._attached = Attached(adapter, parameters, self._model(parameters, adapter.config), AdamWState())

    def device_facts(self) -> DeviceFacts:
        versions = {"numpy": np.__version__, "python": platform.python_version()}
        path = "NumPy float64, rounded when stored"
        path += ", products with the base in fp8" if self.compute.fp8_products else ""
        return DeviceFacts(f"NumPy on {platform.machine()}", versions, kernel_path=path)

    def close(self) -> None:
        self._base = self._attached = None
        self.ranks.leave()
        self.ranks = Ranks()

    # training ------------------------------------------------------------------------------------------------------
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        attached = self.attached
        whole = self.whole_gradient(window, settings.denominator, self._masks_of(settings.dropout_key))
        found = whole.found
        norm = global_norm(found.gradients) if math.isfinite(found.loss_sum) else math.nan
        applied = math.isfinite(norm)
        if applied:
            with _quiet():
                clipped = self.rooms.clip(found.gradients, norm, settings.max_grad_norm)
                self.rooms.update(attached.parameters, clipped, attached.state, settings, self.arithmetic)
        return Done(StepStats(found.loss_sum, whole.tokens, norm, applied, found.weighted_loss_sum))

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        check_batches(self.spec, batches)
        counted = [self.rooms.read_batch(batch) for batch in batches if batch.counted_tokens]
        with _quiet():
            logits = [self.logits_of(batch) for batch in counted]
            losses = [
                token_loss_sum(found, batch.labels, self.arithmetic)
                for found, batch in zip(logits, counted, strict=True)
            ]
            weighted = [weighted_sum(*given) for given in zip(logits, counted, losses, strict=True)]
        has_weights = any(batch.weights is not None for batch in batches)
        tokens = sum(batch.counted_tokens for batch in batches)
        return LossSum(math.fsum(losses), tokens, math.fsum(weighted) if has_weights else None)

    def whole_gradient(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WholeWindow:
        """That of all ranks, of which each has its share of the window."""
        with self.memory_named("a training step"), _quiet():
            counted = sum(batch.counted_tokens for batch in window)
            return self.rooms.over_ranks(self.ranks, self.gradient_of(window, divisor, masks_of), counted, divisor)

    def gradient_of(self, window: Sequence[Batch], divisor: float, masks_of: MasksOf) -> WindowResult:
        """What both `train_step` and `gradients` are made of, of this rank's share."""
        with self.memory_named("a training step"), _quiet():
            check_batches(self.spec, window)
            read = [self.rooms.read_batch(batch) for batch in window]
            scale = FIRST_LOSS_SCALE if self.compute.dtype == "float16" else 1.0
            while True:
                found = self._scaled_gradient(read, divisor or 1, masks_of, scale)
                if scale == 1.0 or math.isfinite(global_norm(found.gradients)):
                    return found
                scale /= LOSS_SCALE_FALL

    def _scaled_gradient(
        self, window: Sequence[Batch], divisor: float, masks_of: MasksOf, scale: float
    ) -> WindowResult:
        """The gradient of a loss that is `scale` times as large, divided by it in float64."""
        found = self.rooms.window_gradient(self.attached.model, window, divisor / scale, masks_of, self.arithmetic)
        return replace(found, gradients={name: gradient / scale for name, gradient in found.gradients.items()})

    def _masks_of(self, key: int) -> MasksOf:
        config = self.attached.adapter.config

        def masks_of(batch: Batch) -> DropoutMasks:
            if config.dropout == 0.0:
                return {}
            return self.rooms.masks(config, self.base.linear_modules, rows_of(batch), batch.input_ids.shape[1], key)

        return masks_of

    # state ---------------------------------------------------------------------------------------------------------
    def export_adapter(self) -> Adapter:
        tensors = {name: self.rooms.adapter_out(tensor) for name, tensor in self.attached.parameters.items()}
        return Adapter(tensors, self.attached.adapter.config)

    def export_optimizer(self) -> OptimizerSnapshot:
        state, moments = self.attached.state, {}
        for name, tensor in self.attached.parameters.items():
            for kind, held in zip(MOMENTS, (state.exp_avg, state.exp_avg_sq), strict=True):
                moments[f"{name}.{kind}"] = self.rooms.adapter_out(held.get(name, np.zeros_like(tensor)))
        return OptimizerSnapshot(state.step, moments)

    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        parameters = self.attached.parameters
        check_moments(snapshot, {name: tensor.shape for name, tensor in parameters.items()})
        first, second = (
            {name: self.rooms.adapter_in(snapshot.moments[f"{name}.{kind}"]) for name in parameters} for kind in MOMENTS
        )
        self.attached.state = AdamWState(snapshot.step, first, second)

    # views ---------------------------------------------------------------------------------------------------------
    def logits(self, batch: Batch) -> Float32:
        check_batches(self.spec, [batch])
        with _quiet():
            return self.logits_of(self.rooms.read_batch(batch)).astype(np.float32)

    def logits_of(self, batch: Batch, *, adapter: bool = True) -> Float64:
        """`[batch, time, vocabulary]` without dropout; before `attach`, those of the base."""
        if adapter and self._attached is not None:
            return self._attached.model.forward(batch, self.arithmetic).logits
        return self._model({}, _NO_ADAPTER).forward(batch, self.arithmetic).logits

    def token_losses(self, batch: Batch, *, adapter: bool = True) -> Float32:
        check_batches(self.spec, [batch])
        with _quiet():
            logits = self.logits_of(self.rooms.read_batch(batch), adapter=adapter)
            return token_losses(logits, batch.labels).astype(np.float32)

    def gradients(self, window: Sequence[Batch]) -> Mapping[str, Float32]:
        [divisor] = self.ranks.sum(np.array([sum(batch.counted_tokens for batch in window)], np.float64))
        found = self.whole_gradient(window, float(divisor), lambda batch: {}).found
        return {name: self.rooms.adapter_out(gradient) for name, gradient in found.gradients.items()}

    def dequantized_weight(self, module: str) -> Float32:
        if module not in self.base.linear_modules:
            raise unknown_module(module, self.base.linear_modules)
        return self.base.weights[f"{module}.weight"].astype(np.float32)

    # optional ------------------------------------------------------------------------------------------------------
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        tokens = [int(token) for token in prompt]
        while len(tokens) < len(prompt) + max_new_tokens:
            with _quiet():
                token = int(self.logits_of(_one_row(tokens), adapter=adapter)[0, -1].argmax())
            if token in stop_tokens:
                break
            tokens.append(token)
        return np.array(tokens[len(prompt) :], dtype=np.int32)

    # inside --------------------------------------------------------------------------------------------------------
    def _model(self, parameters: dict[str, Float64], config: AdapterConfig) -> OracleLlama:
        model = self.rooms.model(self.base.shape, self.base.weights, parameters, self.rooms.scale(config))
        if self.compute.fp8_products:
            model.use_fp8(self.rooms.fp8)
        return model

    def _unpack_spread(self, stored: Stored) -> Float64:
        """The weight of a module of which each rank keeps every so many-th byte, gathered from all of them."""
        whole: Float64 = self.rooms.unpack(spread_and_gathered(stored, self.ranks, self.rooms.gather))
        return whole

    def memory_named(self, phase: str) -> AbstractContextManager[None]:
        """Raises OutOfMemoryError for NumPy's MemoryError."""
        return memory_named("NumPy", phase)

    @property
    def base(self) -> LoadedBase:
        """Raises BackendContractError before `load`."""
        if self._base is None:
            raise out_of_order("load")
        return self._base

    @property
    def attached(self) -> Attached:
        """Raises BackendContractError before `attach`."""
        if self._attached is None:
            raise out_of_order("attach")
        return self._attached


def open_trainer() -> ReferenceTrainer:
    return ReferenceTrainer()


_NO_ADAPTER = AdapterConfig(r=1, alpha=1.0)


def _one_row(tokens: Sequence[int]) -> Batch:
    input_ids = np.array([tokens], dtype=np.int32)
    positions = np.arange(len(tokens), dtype=np.int32)[None]
    return Batch(input_ids, np.full_like(input_ids, IGNORE_LABEL), positions, np.ones_like(input_ids))


@contextmanager
def _quiet() -> Iterator[None]:
    """Non-finite values are answered by `StepStats.applied`, not by NumPy's warnings."""
    with np.errstate(all="ignore"):
        yield
