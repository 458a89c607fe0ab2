"""The MLX trainer: rooms put together."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from qlora_hal.adapter.fitting import check_fits
from qlora_hal.adapter.naming import lora_a_key, lora_b_key
from qlora_hal.adapter.targets import require_no_dropout_on_experts
from qlora_hal.contract import dropout
from qlora_hal.contract.backend import BackendSpec, Compute, DeviceFacts, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import Feature, Requirements, WeightFormat
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
from qlora_hal_backends.mlx_lora import SPEC, device, loading, step
from qlora_hal_backends.mlx_lora.compiled_code import compiling_in_own_folder
from qlora_hal_backends.mlx_lora.generation import greedy
from qlora_hal_backends.mlx_lora.lora_linear import LoRAPlace, LoRASlots
from qlora_hal_backends.mlx_lora.nf4 import kernel_path as nf4_kernel_path
from qlora_hal_backends.mlx_lora.optimizer import AdamW, to_device, to_host
from qlora_hal_backends.mlx_lora.ranks import Ranks, device_of_rank

_OUT_OF_MEMORY = ("insufficient memory", "attempting to allocate", "unable to allocate", "out of memory", "bad_alloc")
"""How MLX's allocators on Metal, CUDA and CPU word it; they share no exception class."""


@dataclass(slots=True)
class _QueuedStep:
    """Figures `[loss sum, weighted, gradient norm, applied]` on their way to the host."""

    figures: mx.array
    counted: WindowCount
    ranks: Ranks

    def resolve(self) -> StepStats:
        self.ranks.wait_for(self.figures)
        loss_sum, weighted, grad_norm, applied = (float(figure) for figure in np.array(self.figures))
        return self.counted.stats(loss_sum, weighted, grad_norm, applied=applied > 0)


@dataclass(slots=True)
class _Attached:
    adapter: Adapter
    optimizer: AdamW
    gradient: step.WindowGradient


class MLXLoRATrainer(QuantizedLoRATrainer):
    """QLoRA on MLX's default device."""

    spec: ClassVar[BackendSpec] = SPEC

    def __init__(self) -> None:
        self._base: loading.BaseModel | None = None
        self._attached: _Attached | None = None
        self._compute = Compute()
        self._ranks = Ranks()
        self._kernel_path = "no base is loaded"
        # Streams of MLX belong to the thread that made them, and what is queued on one is seen from no other: a trainer
        # that is loaded here and stepped there needs one for all threads. Its condition is one caller at a time.
        self._stream = mx.new_thread_unsafe_stream(mx.default_device())
        self._one_caller = threading.RLock()

    # life ----------------------------------------------------------------------------------------------------------
    def join_ranks(self, world: World, timeout_seconds: float) -> None:
        require(self.spec, Requirements(features=frozenset({Feature.DATA_PARALLEL})))
        device_of_rank(world)
        self._stream = mx.new_thread_unsafe_stream(mx.default_device())
        self._ranks = Ranks.join(world, timeout_seconds)

    def sum_over_ranks(self, values: Float64) -> Float64:
        return self._ranks.sum_on_host(values)

    def rank_facts(self) -> RankFacts:
        return RankFacts(self._ranks.collectives, seconds=self._ranks.seconds)

    def proved_compute_dtypes(self) -> tuple[str, ...]:
        return device.proved_dtypes()

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        check_served(self.spec, quantization, compute, prequantized=source.facts.prequantized is not None)
        self.close()
        self._compute = compute
        device.respect_memory_limit()
        mx.reset_peak_memory()
        with self._device_for("loading the base"):
            self._base = loading.load_base(source, quantization, compute)
        self._kernel_path = kernel_path(quantization)

    def linear_modules(self) -> Mapping[str, LinearShape]:
        shapes = {name: linear.base.shape for name, linear in self._loaded.linears.items()}
        return {name: LinearShape(inputs, outputs, *experts) for name, (*experts, outputs, inputs) in shapes.items()}

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        check_optimizer(optimizer, self.spec)
        with self._device_for("attaching the adapter"):
            modules = self.linear_modules()
            check_fits(adapter, modules, where=f"the adapter for {self.spec.name}")
            targets = [modules[name] for name in adapter.config.target_modules]
            require_no_dropout_on_experts(adapter.config.dropout, targets)
            self._place(adapter)
            tensors = {name: to_device(tensor) for name, tensor in adapter.tensors.items()}
            mx.eval(*tensors.values())
            adamw = AdamW(tensors, self._compiled)
            gradient = step.WindowGradient(
                self._loaded,
                adamw.names,
                recompute=self._compute.gradient_checkpointing,
                compiled=self._compiled,
            )
            self._attached = _Attached(adapter, adamw, gradient)

    def device_facts(self) -> DeviceFacts:
        return device.describe_device(self._kernel_path)

    def close(self) -> None:
        self._base = self._attached = None
        gc.collect()
        mx.clear_cache()

    # training ------------------------------------------------------------------------------------------------------
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> PendingStep:
        at = self._at_work
        key = settings.dropout_key if at.adapter.config.dropout > 0.0 else None
        with self._device_for("a training step"):
            gradients, total, counted = self._window_gradient(window, settings.denominator, key)
            figures = at.optimizer.update(gradients, total, settings)
        return _QueuedStep(figures, counted, self._ranks)

    def _window_gradient(
        self, window: Sequence[Batch], denominator: float, dropout_key: int | None
    ) -> tuple[list[mx.array], mx.array, WindowCount]:
        """(gradient of all ranks' weighted loss sum / denominator, [loss sum, weighted], what counts), queued."""
        at = self._at_work

        def own_gradient() -> tuple[list[mx.array], mx.array]:
            with self._device_for("a training step"):
                return at.gradient.of_window(at.optimizer.tensors, window, denominator, dropout_key)

        return self._ranks.of_all(own_gradient, WindowCount.of(window))

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        at = self._at_work
        total = np.zeros(2)
        with self._device_for("evaluation"):
            for batch in batches:
                if batch.counted_tokens:
                    total += np.array(at.gradient.loss_of(at.optimizer.tensors, batch))
        return evaluated(batches, *total.tolist())

    # state ---------------------------------------------------------------------------------------------------------
    def export_adapter(self) -> Adapter:
        at = self._at_work
        with self._device_for("copying the adapter"):
            tensors = {name: to_host(array) for name, array in at.optimizer.tensors.items()}
        return Adapter(tensors, at.adapter.config)

    def export_optimizer(self) -> OptimizerSnapshot:
        with self._device_for("copying the optimizer"):
            return self._at_work.optimizer.snapshot()

    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        with self._device_for("restoring the optimizer"):
            self._at_work.optimizer.restore(snapshot)

    # views ---------------------------------------------------------------------------------------------------------
    def logits(self, batch: Batch) -> Float32:
        at = self._at_work
        with self._device_for("a forward pass"), self._loaded.slots.holding(at.optimizer.tensors):
            return to_host(step.logits(self._loaded, step.to_device(self._loaded, batch)))

    def gradients(self, window: Sequence[Batch]) -> Mapping[str, Float32]:
        [tokens] = self._ranks.sum_on_host(np.array([counted_tokens(window)], np.float64))
        with self._device_for("a backward pass"):
            gradients, _, _ = self._window_gradient(window, float(tokens), None)
            self._ranks.wait_for(*gradients)
            names = self._at_work.optimizer.names
            return {name: to_host(array) for name, array in zip(names, gradients, strict=True)}

    def token_losses(self, batch: Batch, *, adapter: bool = True) -> Float32:
        base = self._loaded
        tensors = self._attached.optimizer.tensors if self._attached is not None else {}
        with self._device_for("a forward pass"):
            on_device = step.to_device(base, batch)
        with self._device_for("a forward pass"), base.slots.holding(tensors), _switched(base.slots, on=adapter):
            logits = step.logits(base, on_device)
            rows = logits.reshape(-1, logits.shape[-1])
            losses = to_host(step.token_losses(rows[on_device.counted], on_device.targets, on_device.counts))
        return at_labels(batch, losses[: batch.counted_tokens])

    def dequantized_weight(self, module: str) -> Float32:
        linears = self._loaded.linears
        if module not in linears:
            raise unknown_module(module, linears)
        with self._device_for("decoding a weight"):
            return to_host(linears[module].base.dense())

    # optional ------------------------------------------------------------------------------------------------------
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        base = self._loaded
        tensors = self._attached.optimizer.tensors if self._attached is not None else {}
        with self._device_for("generation"), base.slots.holding(tensors), _switched(base.slots, on=adapter):
            tokens = greedy(base, prompt, max_new_tokens, frozenset(stop_tokens))
        return np.asarray(tokens, dtype=np.int32)

    def peak_memory_bytes(self) -> int:
        return int(mx.get_peak_memory())

    # inside --------------------------------------------------------------------------------------------------------
    @property
    def _loaded(self) -> loading.BaseModel:
        if self._base is None:
            raise out_of_order("load")
        return self._base

    @property
    def _at_work(self) -> _Attached:
        if self._attached is None:
            raise out_of_order("attach")
        return self._attached

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        wanted = self._compute.options.get("compile", "auto")
        compiled: Callable[..., Any] = mx.compile(function) if wanted == "auto" else function
        return compiled

    def _place(self, adapter: Adapter) -> None:
        config = adapter.config
        self._attached = None
        for name, linear in self._loaded.linears.items():
            linear.place = None
            if name in config.target_modules:
                a_name, b_name = lora_a_key(name), lora_b_key(name)
                words = _channel_words(name, linear.base.shape[-1]) if config.dropout else None
                linear.place = LoRAPlace(a_name, b_name, config.scale, config.dropout, words)

    @contextmanager
    def _device_for(self, phase: str) -> Iterator[None]:
        """The device, one caller at a time and from any thread; what runs out of memory is named."""
        try:
            with (
                memory_named("MLX", phase, words=_OUT_OF_MEMORY),
                self._ranks.others_present(),
                self._one_caller,
                mx.stream(self._stream),
                compiling_in_own_folder(),
            ):
                yield
        except OutOfMemoryError:
            gc.collect()
            mx.clear_cache()
            raise


def kernel_path(quantization: Quantization) -> str:
    """What multiplies, for device facts."""
    if quantization.weight_format is WeightFormat.NONE:
        return "MLX float32 products"
    if quantization.weight_format is WeightFormat.NF4:
        return f"NF4 {nf4_kernel_path()}, MLX float32 products"
    if device.is_cpu():
        return f"MLX {quantization.weight_format.value}: unpacked forward, packed backward, on the CPU"
    return f"MLX {quantization.weight_format.value}: quantized_matmul"


def _channel_words(module: str, channels: int) -> mx.array:
    return mx.array(dropout.channel_words(module, channels))


@contextmanager
def _switched(slots: LoRASlots, *, on: bool) -> Iterator[None]:
    """The adapter on or off, for one caller that has the device."""
    slots.enabled = on
    try:
        yield
    finally:
        slots.enabled = True
