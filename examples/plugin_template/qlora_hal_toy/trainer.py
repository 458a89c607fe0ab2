"""The backend itself: one frozen model, one adapter, one optimizer step at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_hal.adapter import check_fits, lora_a_key, lora_b_key
from qlora_hal.contract.backend import Compute, DeviceFacts, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import OPTIMIZER_FEATURE, Feature, Requirements, WeightFormat, unmet_requirements
from qlora_hal.contract.values import (
    IGNORE_LABEL,
    Adapter,
    Batch,
    LinearShape,
    LossSum,
    OptimizerSnapshot,
    StepSettings,
    StepStats,
)
from qlora_hal.errors import (
    AdapterError,
    BackendContractError,
    ConfigError,
    ModelError,
    OutOfMemoryError,
    UnsupportedFeatureError,
)
from qlora_hal.model.source import ModelSource
from qlora_hal_toy import SPEC

MOMENTS = ("exp_avg", "exp_avg_sq")


class LoRALinear(nn.Module):
    """y = x W^T + bias + scale * x A^T B^T, with W frozen and perhaps stored as int8 with one absmax to a row."""

    def __init__(self, linear: nn.Linear, int8: bool) -> None:
        super().__init__()
        self.bias = linear.bias
        self.step_size = linear.weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127 if int8 else None
        self.stored = (
            linear.weight if self.step_size is None else (linear.weight / self.step_size).round().to(torch.int8)
        )
        self.a: nn.Parameter | None = None  # [r, in]
        self.b: nn.Parameter | None = None  # [out, r]
        self.scale = 0.0

    def dense(self) -> Tensor:
        return self.stored if self.step_size is None else self.stored * self.step_size

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.dense(), self.bias)
        return y if self.a is None or self.b is None else y + self.scale * ((x @ self.a.T) @ self.b.T)


@dataclass
class Done:
    """A CPU has nothing to wait for."""

    stats: StepStats

    def resolve(self) -> StepStats:
        return self.stats


class ToyTrainer(QuantizedLoRATrainer):
    spec = SPEC

    # life
    def proved_compute_dtypes(self) -> tuple[str, ...]:
        return ("float32",)

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        prequantized = source.facts.prequantized is not None
        refuse_undeclared(
            {
                Feature.DOUBLE_QUANT: quantization.double_quant,
                Feature.LOAD_PREQUANTIZED: prequantized,
                Feature.GRADIENT_CHECKPOINTING: compute.gradient_checkpointing,
            },
            weight_format=quantization.weight_format,
            block_size=quantization.block_size,
            compute_dtype=compute.dtype,
        )
        self.close()
        try:
            config = AutoConfig.from_pretrained(source.path)
            check_tensors(config, source)
            self.model = AutoModelForCausalLM.from_pretrained(source.path, config=config, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                "QH-TOY1", f"The weights cannot be loaded: {error}", where=source.name, fix="Get the model again."
            ) from error
        self.model.requires_grad_(False).eval()
        self.layers: dict[str, LoRALinear] = {}
        for module in source.facts.linear_modules:
            self.layers[module] = LoRALinear(
                self.model.get_submodule(module), quantization.weight_format is WeightFormat.INT8
            )
            self.model.set_submodule(module, self.layers[module])

    def linear_modules(self) -> Mapping[str, LinearShape]:
        return {module: (layer.stored.shape[1], layer.stored.shape[0]) for module, layer in self.layers.items()}

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        if optimizer not in OPTIMIZER_FEATURE:
            raise ConfigError("QH-TOY3", f"There is no optimizer {optimizer!r}.", fix="Use adamw.")
        wanted = OPTIMIZER_FEATURE[optimizer]
        refuse_undeclared({Feature.LORA_DROPOUT: bool(adapter.config.dropout), wanted: wanted is not None})
        with memory_named("attach"):
            check_fits(adapter, self.linear_modules(), where="attach")
        if len(adapter.tensors) != 2 * len(adapter.config.target_modules):
            raise AdapterError("QH-TOY4", "There are tensors that no target uses.", fix="Leave them out.")
        self.config = adapter.config
        with memory_named("attach"):
            self.parameters = {n: nn.Parameter(torch.tensor(t)) for n, t in sorted(adapter.tensors.items())}
        for module, layer in self.layers.items():
            layer.a = self.parameters.get(lora_a_key(module))
            layer.b = self.parameters.get(lora_b_key(module))
            layer.scale = adapter.config.scale
        self.optimizer = torch.optim.AdamW(self.parameters.values())

    def device_facts(self) -> DeviceFacts:
        return DeviceFacts("cpu", {"torch": torch.__version__}, kernel_path="torch float32")

    def close(self) -> None:
        self.__dict__.clear()

    def __getattr__(self, name: str) -> Any:
        """Only for what is not there: `load` and `attach` set it, `close` takes it away."""
        if name in ("model", "layers", "config", "parameters", "optimizer"):
            raise BackendContractError("QH-B02", f"There is no {name} yet.", fix="Call load(), then attach().")
        raise AttributeError(name)

    # training
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> Done:
        with memory_named("train_step"):
            loss_sum, gradients = self.window_gradient(window, settings.token_count)
        norm = float(torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients.values()])))
        applied = bool(np.isfinite([loss_sum, norm]).all())
        if applied:
            limit = settings.max_grad_norm
            factor = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
            self.optimizer.param_groups[0].update(
                lr=settings.learning_rate,
                betas=(settings.beta1, settings.beta2),
                eps=settings.epsilon,
                weight_decay=settings.weight_decay,
            )
            for name, parameter in self.parameters.items():
                parameter.grad = gradients[name] * factor
            self.optimizer.step()
        return Done(StepStats(loss_sum, settings.token_count, norm, applied))

    def window_gradient(self, window: Sequence[Batch], token_count: int) -> tuple[float, dict[str, Tensor]]:
        """Loss sum, and the gradient of loss sum / token_count: sums over the whole window, never means of means."""
        self.optimizer.zero_grad()
        losses = []
        for batch in window:
            loss = self.loss_sum(batch)
            (loss / max(token_count, 1)).backward()
            losses.append(float(loss.detach()))
        found = {name: parameter.grad for name, parameter in self.parameters.items()}
        return sum(losses), {n: torch.zeros_like(self.parameters[n]) if g is None else g for n, g in found.items()}

    def loss_sum(self, batch: Batch) -> Tensor:
        targets = torch.from_numpy(batch.labels[:, 1:]).long()
        predictions = self.forward(batch)[:, :-1]
        return functional.cross_entropy(
            predictions.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_LABEL, reduction="sum"
        )

    def forward(self, batch: Batch) -> Tensor:
        refuse_undeclared({Feature.PACKING: batch.is_packed})
        # Padding is on the right, where causal attention does not look: no mask is needed.
        logits: Tensor = self.model(input_ids=torch.from_numpy(batch.input_ids).long(), use_cache=False).logits
        return logits

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        return LossSum(sum(float(self.loss_sum(batch)) for batch in batches), sum(b.counted_tokens for b in batches))

    # state
    def export_adapter(self) -> Adapter:
        return Adapter({name: to_host(parameter) for name, parameter in self.parameters.items()}, self.config)

    def export_optimizer(self) -> OptimizerSnapshot:
        moments, step = {}, 0
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            step = int(state.get("step", 0))
            moments |= {f"{name}.{kind}": to_host(state.get(kind, torch.zeros_like(parameter))) for kind in MOMENTS}
        return OptimizerSnapshot(step, moments)

    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        expected = {f"{n}.{kind}": tuple(p.shape) for n, p in self.parameters.items() for kind in MOMENTS}
        if expected != {name: moment.shape for name, moment in snapshot.moments.items()}:
            raise AdapterError("QH-TOY5", "The moments do not fit the adapter.", fix="Resume with the saved adapter.")
        for name, parameter in self.parameters.items():
            moments: dict[str, Any] = {kind: torch.tensor(snapshot.moments[f"{name}.{kind}"]) for kind in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(snapshot.step)), **moments}

    # views
    @torch.no_grad()
    def logits(self, batch: Batch) -> np.ndarray:
        return to_host(self.forward(batch))

    def gradients(self, window: Sequence[Batch]) -> Mapping[str, np.ndarray]:
        _, gradients = self.window_gradient(window, sum(batch.counted_tokens for batch in window))
        return {name: to_host(gradient) for name, gradient in gradients.items()}

    def dequantized_weight(self, module: str) -> np.ndarray:
        if module not in self.layers:
            raise ModelError("QH-TOY6", f"There is no layer {module!r}.", fix="Ask linear_modules() for their names.")
        return to_host(self.layers[module].dense())


def check_tensors(config: Any, source: ModelSource) -> None:
    """transformers draws missing weights at random, and a config.json that says little means a model of 7 billion."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: facts.shape for name, facts in source.facts.tensors.items()}
    wrong = [name for name, shape in expected.items() if found.get(name) != shape] + sorted(found.keys() - expected)
    if config.tie_word_embeddings:
        wrong = [name for name in wrong if name != "lm_head.weight"]
    if wrong:
        raise ModelError(
            "QH-TOY2",
            f"Weights and config.json differ: {', '.join(wrong[:5])}.",
            where=source.name,
            fix="Get both again.",
        )


@contextmanager
def memory_named(method: str) -> Iterator[None]:
    """The core answers OutOfMemoryError with smaller micro-batches; torch has a RuntimeError for it, numpy another."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemoryError(
            "QH-N07", f"The memory is full in {method}.", fix="Lower training.per_device_train_batch_size."
        ) from error


def to_host(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().numpy().copy()


def refuse_undeclared(features: Mapping[Any, bool], **needs: Any) -> None:
    """What SPEC does not declare is refused by name, never left out in silence."""
    asked = frozenset(feature for feature, is_asked in features.items() if is_asked)
    lacks = unmet_requirements(Requirements(features=asked, **needs), SPEC.capabilities)
    if lacks:
        raise UnsupportedFeatureError(
            "QH-B01", f"Backend toy does not offer {'; '.join(lacks)}.", fix="Run qlora-hal backends to see who does."
        )
