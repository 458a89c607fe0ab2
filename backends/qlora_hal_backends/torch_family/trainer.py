"""The trainer of the torch family: rooms put together, no vendor's name in it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qlora_hal.adapter.fitting import check_fits
from qlora_hal.adapter.targets import require_no_dropout_on_experts
from qlora_hal.contract import dropout
from qlora_hal.contract.backend import BackendSpec, Compute, DeviceFacts, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import Feature, Requirements
from qlora_hal.contract.toolkit import (
    WindowCount,
    at_labels,
    check_optimizer,
    check_served,
    counted_tokens,
    evaluated,
    memory_named,
    out_of_order,
    require,
    unknown_module,
)
from qlora_hal.contract.values import (
    IGNORE_LABEL,
    Adapter,
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
from qlora_hal.errors import OutOfMemoryError
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.torch_family import fused, loading, step
from qlora_hal_backends.torch_family.attention import sinks
from qlora_hal_backends.torch_family.device import (
    describe_device,
    first_device,
    forget_peak_memory,
    free_unused,
    has_queue,
    peak_memory_bytes,
)
from qlora_hal_backends.torch_family.experts import proved_products
from qlora_hal_backends.torch_family.flat_adapter import FlatAdapter
from qlora_hal_backends.torch_family.generation import greedy
from qlora_hal_backends.torch_family.links import links_between
from qlora_hal_backends.torch_family.lora_linear import LoRASwitches, words_on
from qlora_hal_backends.torch_family.microscaling import proved_decoder
from qlora_hal_backends.torch_family.optimizer import Optimizer, make_optimizer
from qlora_hal_backends.torch_family.own_state import in_own_state
from qlora_hal_backends.torch_family.platform import TorchPlatform
from qlora_hal_backends.torch_family.precision import proved_dtypes
from qlora_hal_backends.torch_family.ranks import Ranks, device_of_rank
from qlora_hal_backends.torch_family.sharded_base import GatherError

FIRST_LOSS_SCALE = 2.0**16
"""Where float16 loss scaling starts (Micikevicius et al. 2018); halved at each overflow, the step is redone."""
SMALLEST_LOSS_SCALE = 2.0**-4
"""Below this an overflow is no matter of scaling: the step is refused."""

WITHOUT_EFFECT = Batch(
    input_ids=np.zeros((1, 8), np.int32),
    labels=np.array([[IGNORE_LABEL] + [0] * 7], np.int32),
    position_ids=np.arange(8, dtype=np.int32)[None],
    segment_ids=np.ones((1, 8), np.int32),
    rows=np.zeros(1, np.int32),
)
"""What a rank computes, and drops, while another one has a micro-batch more or while it has no memory for its own."""

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")
"""How torch's CPU and MPS allocators and cuBLAS word it."""


@dataclass(slots=True)
class _QueuedStep:
    """Figures `[loss sum, weighted, norm, applied]` on their way to the host."""

    figures: Tensor
    counted: WindowCount
    arrived: Any = None

    def resolve(self) -> StepStats:
        if self.arrived is not None:
            self.arrived.synchronize()
        loss_sum, weighted, grad_norm, applied = self.figures.tolist()
        return self.counted.stats(loss_sum, weighted, grad_norm, applied=applied > 0)


class TorchLoRATrainer(QuantizedLoRATrainer):
    """QLoRA on one torch device. `platform` and `load_base` are all that differs between backends."""

    spec: ClassVar[BackendSpec]

    def __init__(self, spec: BackendSpec, platform: TorchPlatform, load_base: loading.LoadBase | None = None) -> None:
        self.spec = spec  # type: ignore[misc]  # one class serves four specs
        self._platform = platform
        self._load_base = load_base or loading.load_base
        self._device = first_device(platform)
        self._base: loading.BaseModel | None = None
        self._flat: FlatAdapter | None = None
        self._fused: fused.FusedBody | fused.Refusal = fused.Refusal("no adapter is attached")
        self._optimizer: Optimizer | None = None
        self._compute = Compute()
        self._ranks = Ranks()
        self._loss_scale = 1.0

    # life ----------------------------------------------------------------------------------------------------------
    def join_ranks(self, world: World, timeout_seconds: float) -> None:
        require(self.spec, Requirements(features=frozenset({Feature.DATA_PARALLEL})))
        self._device = device_of_rank(self._device, world)
        self._ranks = Ranks.join(world, self._device, timeout_seconds)

    def sum_over_ranks(self, values: Float64) -> Float64:
        return self._ranks.sum_on_host(values)

    def rank_facts(self) -> RankFacts:
        gathering = self._base.sharded.seconds if self._base is not None and self._base.sharded is not None else 0.0
        return RankFacts(self._ranks.collectives, links_between(self._device), self._ranks.seconds + gathering)

    @in_own_state
    def proved_compute_dtypes(self) -> tuple[str, ...]:
        return proved_dtypes(self._platform, self._device)

    @in_own_state
    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        check_served(self.spec, quantization, compute, prequantized=source.facts.prequantized is not None)
        if source.facts.has_routed_experts:
            require(self.spec, Requirements(features=frozenset({Feature.EXPERTS})))
        self._release()
        if compute.fp8_products:
            fused.check_fp8(source.facts, quantization, compute, self._device)
        self._compute = compute
        self._loss_scale = FIRST_LOSS_SCALE if compute.dtype == "float16" else 1.0
        forget_peak_memory(self._device)
        with self._memory_named("loading the base"), torch.no_grad():
            self._base = self._load_base(source, quantization, compute, self._device)
            for block in self._base.experts:
                block.products = proved_products(self._device, grouped=self._platform.grouped_products)
        self.load_notes = self._base.notes

    def linear_modules(self) -> Mapping[str, LinearShape]:
        return {name: linear.shape for name, linear in self._loaded.linears.items()}

    @in_own_state
    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        check_optimizer(optimizer, self.spec)
        with self._memory_named("attaching the adapter"):
            modules = self.linear_modules()
            check_fits(adapter, modules, where=f"the adapter for {self.spec.name}")
            targets = [modules[name] for name in adapter.config.target_modules]
            require_no_dropout_on_experts(adapter.config.dropout, targets)
            self._loaded_without_adapter()
            dtype = getattr(torch, self._compute.dtype)
            self._flat = FlatAdapter.place(adapter, self._loaded.linears, dtype, self._device)
            self._optimizer = make_optimizer(optimizer, self._flat)
            self._fused = fused.try_attach(self._loaded, self._flat, self._compute, self._device)
            if self._compute.fp8_products and isinstance(self._fused, fused.Refusal):
                reason = self._fused.reason
                self._loaded_without_adapter()
                raise fused.fp8_refused(reason)

    @in_own_state
    def device_facts(self) -> DeviceFacts:
        base = self._base
        facts = describe_device(self._platform, self._device, base.decoding if base else loading.BITSANDBYTES)
        versions = {**facts.versions, **(base.versions if base else {})}
        experts = [block.products.words for block in base.experts[:1]] if base else []
        formats = [proved_decoder(self._device).words] if base and base.is_microscaled else []
        update = [self._optimizer.words] if self._optimizer is not None and self._optimizer.words else []
        of_sinks = sinks.words_of(base.causal, self._device, getattr(torch, self._compute.dtype)) if base else ""
        attention = [of_sinks] if of_sinks else []
        path = "; ".join([facts.kernel_path, *formats, self._fused.words, *attention, *experts, *update])
        return replace(facts, versions=versions, kernel_path=path)

    def close(self) -> None:
        self._release()
        self._ranks.leave()

    def _release(self) -> None:
        self._base = self._flat = self._optimizer = None
        self._fused = fused.Refusal("no adapter is attached")
        gc.collect()
        free_unused(self._device)

    # training ------------------------------------------------------------------------------------------------------
    @in_own_state
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        total, norm, counted = self._window_gradient(window, settings.denominator, settings.dropout_key)
        with self._memory_named("a training step"):
            applied = self._attached_optimizer.update(settings, norm)
            return self._queue(torch.cat((total, torch.stack((norm, applied)))), counted)

    @in_own_state
    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        total = torch.zeros(2, dtype=torch.float64 if self._device.type != "mps" else torch.float32)
        lacking = self._lacking(batches)
        with self._memory_named("evaluation"):
            for batch in batches:
                if batch.counted_tokens:
                    loss = self._batch_loss(self._laid_out(batch), 1.0)
                    total += loss.cpu()
            for batch in (WITHOUT_EFFECT,) * lacking:
                self._batch_loss(self._placed(batch), 1.0)
        return evaluated(batches, *total.tolist())

    def _window_gradient(
        self, window: Sequence[Batch], denominator: float, dropout_key: int | None
    ) -> tuple[Tensor, Tensor, WindowCount]:
        """Leave the gradient of all ranks' weighted loss sum / denominator in the flat buffer; in float16 by the
        largest loss scale that does not overflow.

        Returns ([loss sum, weighted], norm, what counts), of all ranks, the norm NaN where anything is not finite.
        """
        found = self._scaled_gradient(window, denominator, dropout_key)
        while self._overflowed(found[1]):
            self._loss_scale /= 2
            found = self._scaled_gradient(window, denominator, dropout_key)
        return found

    def _scaled_gradient(
        self, window: Sequence[Batch], denominator: float, dropout_key: int | None
    ) -> tuple[Tensor, Tensor, WindowCount]:
        """One backward pass at the present loss scale, which is taken off again."""
        flat, ranks, own, short = self._attached, self._ranks, WindowCount(0, False), None
        total = torch.zeros(2, dtype=torch.float32, device=self._device)
        lacking = self._lacking(window)
        passes = self._passes
        try:
            with self._memory_named("a training step"):
                own = WindowCount.of(window)
                total = self._accumulated(flat, window, lacking, denominator, dropout_key)
        except OutOfMemoryError as problem:
            short = problem
            if self._loaded.sharded is not None:
                due = lacking + sum(1 for batch in window if batch.counted_tokens)
                self._catch_up(flat, passes, passes + due, dropout_key)
        ranks.agree(short)
        tokens, weighted = ranks.sum_on_host(np.array([own.tokens, own.has_weights], np.float64))
        ranks.sum_on_device(total)
        ranks.sum_on_device(flat.gradients)
        if self._loss_scale != 1.0:
            flat.gradients.div_(self._loss_scale)
        norm = torch.linalg.vector_norm(flat.gradients)
        norm = torch.where(torch.isfinite(total).all(), norm, torch.full_like(norm, float("nan")))
        return total, norm, WindowCount(int(tokens), bool(weighted))

    def _accumulated(
        self, flat: FlatAdapter, window: Sequence[Batch], lacking: int, denominator: float, dropout_key: int | None
    ) -> Tensor:
        """This rank's `[loss sum, weighted]`, its scaled gradient left in the flat buffer."""
        flat.gradients.zero_()
        with self._recomputed(), self._dropout(flat, dropout_key) as see:
            total = step.accumulate_gradients(
                self._batch_loss,
                window,
                self._device,
                gradient_scale=self._loss_scale / denominator if denominator else 0.0,
                see=see,
                placed=self._laid_out,
            )
            for _ in range(lacking):
                self._pass_without_effect(self._batch_loss, see)
            return total

    def _pass_without_effect(self, batch_loss: step.BatchLoss, see: Callable[[Batch], None]) -> None:
        see(WITHOUT_EFFECT)
        step.minimised(batch_loss(self._placed(WITHOUT_EFFECT), 0.0)).backward()

    def _recomputed(self) -> AbstractContextManager[None]:
        compute = self._compute
        if not compute.gradient_checkpointing:
            return nullcontext()
        return step.recomputed_layers(self._loaded, compute.recompute, self._device)

    def _lacking(self, batches: Sequence[Batch]) -> int:
        """How many micro-batches more another rank has, which holds parts of this one's base. Asked before the first
        of them: ranks that gather can answer nothing else."""
        if self._loaded.sharded is None:
            return 0
        with self._memory_named("a training step"):
            own = sum(1 for batch in batches if batch.counted_tokens)
        return int(max(self._ranks.of_each(own))) - own

    @property
    def _passes(self) -> int:
        return 0 if self._loaded.sharded is None else self._loaded.sharded.passes

    def _catch_up(self, flat: FlatAdapter, before: int, due: int, dropout_key: int | None) -> None:
        """Where ranks hold parts of one another's base: gather, without memory for the window, what the others gather
        up to its end, which is their pass number `due`; they come to no vote otherwise. `before` it began after."""
        sharded = self._loaded.sharded
        if sharded is None:
            return
        with (
            self._memory_named("catching up with the other ranks"),
            self._recomputed(),
            self._dropout(flat, dropout_key) as see,
        ):
            if sharded.passes > before:
                with sharded.broken_pass_again():
                    self._pass_without_effect(self._bare_batch_loss, see)
            while sharded.passes < due:
                self._pass_without_effect(self._batch_loss, see)

    @contextmanager
    def _dropout(self, flat: FlatAdapter, key: int | None) -> Iterator[Callable[[Batch], None]]:
        """Gives what must see each micro-batch before its forward pass."""

        def see(batch: Batch) -> None:
            if key is not None and flat.adapter.config.dropout > 0.0:
                words = dropout.token_words(key, dropout.rows_of(batch), batch.input_ids.shape[1])
                body = self._fused
                laid_out = body.laid_out_words(batch, words) if isinstance(body, fused.FusedBody) else words.reshape(-1)
                flat.switches.token_words = words_on(laid_out, self._device)

        try:
            yield see
        finally:
            flat.switches.token_words = None

    def _overflowed(self, norm: Tensor) -> bool:
        if self._compute.dtype != "float16" or self._loss_scale <= SMALLEST_LOSS_SCALE:
            return False
        return not bool(torch.isfinite(norm))

    def _queue(self, figures: Tensor, counted: WindowCount) -> _QueuedStep:
        if not has_queue(figures.device):
            return _QueuedStep(figures.detach(), counted)
        host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
        host.copy_(figures.detach(), non_blocking=True)
        arrived = torch.get_device_module(figures.device).Event()
        arrived.record()
        return _QueuedStep(host, counted, arrived)

    # state ---------------------------------------------------------------------------------------------------------
    @in_own_state
    def export_adapter(self) -> Adapter:
        flat = self._attached
        return Adapter(flat.to_host(flat.parameters), flat.adapter.config)

    @in_own_state
    def export_optimizer(self) -> OptimizerSnapshot:
        return self._attached_optimizer.snapshot()

    @in_own_state
    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        self._attached_optimizer.restore(snapshot)

    # views ---------------------------------------------------------------------------------------------------------
    @in_own_state
    @torch.no_grad()
    def logits(self, batch: Batch) -> Float32:
        with self._memory_named("a forward pass"):
            on_device = self._placed(batch)
            head = self._loaded.head
            if isinstance(self._fused, fused.FusedBody) and head is not None:
                return head.logits(self._fused.hidden_states(on_device)).cpu().numpy()
            return step.logits(self._loaded, on_device).cpu().numpy()

    @in_own_state
    def gradients(self, window: Sequence[Batch]) -> Mapping[str, Float32]:
        with self._memory_named("a backward pass"):
            own = counted_tokens(window)
        [tokens] = self._ranks.sum_on_host(np.array([own], np.float64))
        self._window_gradient(window, float(tokens), dropout_key=None)
        flat = self._attached
        named = flat.to_host(flat.gradients)
        flat.gradients.zero_()
        return named

    @in_own_state
    @torch.no_grad()
    def token_losses(self, batch: Batch, *, adapter: bool = True) -> Float32:
        with self._memory_named("a forward pass"), self._adapter_switched(on=adapter):
            return at_labels(batch, step.token_losses(self._loaded, self._placed(batch)).cpu().numpy())

    @in_own_state
    @torch.no_grad()
    def dequantized_weight(self, module: str) -> Float32:
        linears = self._loaded.linears
        if module not in linears:
            raise unknown_module(module, linears)
        base = linears[module].base
        assert base is not None
        return base.dense().float().cpu().numpy()

    # optional ------------------------------------------------------------------------------------------------------
    @in_own_state
    @torch.no_grad()
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        with self._memory_named("generation"), self._adapter_switched(on=adapter):
            tokens = greedy(self._loaded, prompt, max_new_tokens, frozenset(stop_tokens), self._device)
        return np.asarray(tokens, dtype=np.int32)

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self._device)

    # inside --------------------------------------------------------------------------------------------------------
    @contextmanager
    def _adapter_switched(self, *, on: bool) -> Iterator[None]:
        switches = self._flat.switches if self._flat is not None else LoRASwitches()
        switches.enabled = on
        try:
            yield
        finally:
            switches.enabled = True

    @property
    def _loaded(self) -> loading.BaseModel:
        if self._base is None:
            raise out_of_order("load")
        return self._base

    def _placed(self, batch: Batch) -> step.DeviceBatch:
        step.check_lengths(self._loaded, batch)
        placed = step.to_device(batch, self._device)
        if (table := self._loaded.host_embedding) is not None:
            table.announce(placed.input_ids, batch.input_ids)
        return placed

    def _laid_out(self, batch: Batch) -> step.DeviceBatch:
        """A batch for `_batch_loss`, without padding where the layers need none."""
        if not isinstance(self._fused, fused.FusedBody):
            return self._placed(batch)
        step.check_lengths(self._loaded, batch)
        return step.to_device(self._fused.laid_out(batch), self._device)

    @property
    def _batch_loss(self) -> step.BatchLoss:
        sharded, batch_loss = self._loaded.sharded, self._bare_batch_loss
        if sharded is None:
            return batch_loss

        def begun(batch: step.DeviceBatch, gradient_scale: float) -> Tensor:
            sharded.begin_pass()
            return batch_loss(batch, gradient_scale)

        return begun

    @property
    def _bare_batch_loss(self) -> step.BatchLoss:
        if isinstance(self._fused, fused.FusedBody):
            return self._fused.batch_loss
        return partial(step.batch_loss, self._loaded)

    @property
    def _attached(self) -> FlatAdapter:
        if self._flat is None:
            raise out_of_order("attach")
        return self._flat

    @property
    def _attached_optimizer(self) -> Optimizer:
        if self._optimizer is None:
            raise out_of_order("attach")
        return self._optimizer

    def _loaded_without_adapter(self) -> None:
        if self._flat is not None:
            self._flat.detach_from(self._loaded.linears)
        self._flat = self._optimizer = None
        self._fused = fused.Refusal("no adapter is attached")

    @contextmanager
    def _memory_named(self, phase: str) -> Iterator[None]:
        try:
            with memory_named(str(self._device), phase, kinds=(torch.OutOfMemoryError,), words=_OUT_OF_MEMORY):
                yield
        except GatherError as error:
            self._ranks.failed(error.__cause__ or error, error.waited_seconds)
        except OutOfMemoryError:
            if self._flat is not None:
                self._flat.gradients.zero_()
            gc.collect()
            free_unused(self._device)
            raise
