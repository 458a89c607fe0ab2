"""The backend itself: one frozen model, one adapter, one optimizer step at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_hal.adapter import check_fits, lora_a_key, lora_b_key
from qlora_hal.contract import toolkit, values
from qlora_hal.contract.backend import Compute, DeviceFacts, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.toolkit import MOMENTS
from qlora_hal.contract.values import IGNORE_LABEL, Adapter, Batch, LinearShape, OptimizerSnapshot, StepSettings
from qlora_hal.errors import ModelError
from qlora_hal.model.source import ModelSource
from qlora_hal_toy import SPEC

memory_named = partial(toolkit.memory_named, "The CPU", words=("can't allocate memory",))


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


class ToyTrainer(QuantizedLoRATrainer):
    spec = SPEC

    # life
    def proved_compute_dtypes(self) -> tuple[str, ...]:
        return ("float32",)

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        toolkit.check_served(self.spec, quantization, compute, prequantized=source.facts.prequantized is not None)
        self.close()
        try:
            config = AutoConfig.from_pretrained(source.path)
            check_tensors(config, source)
            self.model = AutoModelForCausalLM.from_pretrained(source.path, config=config, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError("QH-TOY1", f"It does not load: {error}", where=source.name, fix="Get it again.") from error
        self.model.requires_grad_(False).eval()
        self.layers: dict[str, LoRALinear] = {}
        int8 = quantization.weight_format is WeightFormat.INT8
        for module in source.facts.linear_modules:
            self.layers[module] = LoRALinear(self.model.get_submodule(module), int8)
            self.model.set_submodule(module, self.layers[module])

    def linear_modules(self) -> Mapping[str, LinearShape]:
        return {module: LinearShape(*reversed(layer.stored.shape)) for module, layer in self.layers.items()}

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        toolkit.check_attached(self.spec, adapter.config, optimizer)
        self.config = adapter.config
        with memory_named("attach"):
            check_fits(adapter, self.linear_modules(), where="attach")
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
            raise toolkit.out_of_order("load" if name in ("model", "layers") else "attach")
        raise AttributeError(name)

    # training
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> toolkit.Done:
        with memory_named("train_step"):
            loss_sum, gradients = self.window_gradient(window, settings.denominator)
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
        return toolkit.Done(toolkit.step_stats(window, loss_sum, loss_sum, norm, applied=applied))

    def window_gradient(self, window: Sequence[Batch], denominator: float) -> tuple[float, dict[str, Tensor]]:
        """Loss sum, and the gradient of loss sum / denominator: sums over the whole window, never means of means."""
        self.optimizer.zero_grad()
        losses = []
        for batch in window:
            loss = self.loss_sum(batch)
            (loss / (denominator or 1)).backward()
            losses.append(float(loss.detach()))
        found = {name: parameter.grad for name, parameter in self.parameters.items()}
        return sum(losses), {n: torch.zeros_like(self.parameters[n]) if g is None else g for n, g in found.items()}

    def loss_sum(self, batch: Batch) -> Tensor:
        targets, logits = (
            torch.from_numpy(toolkit.next_labels(batch)).long().flatten(),
            self.forward(batch).flatten(0, 1),
        )
        return functional.cross_entropy(logits, targets, ignore_index=IGNORE_LABEL, reduction="sum")

    def forward(self, batch: Batch) -> Tensor:
        toolkit.check_batches(self.spec, [batch])
        # Padding is on the right, where causal attention does not look: no mask is needed.
        logits: Tensor = self.model(input_ids=torch.from_numpy(batch.input_ids).long(), use_cache=False).logits
        return logits

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> values.LossSum:
        total = sum(float(self.loss_sum(batch)) for batch in batches)
        return toolkit.evaluated(batches, total, total)

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
        toolkit.check_moments(snapshot, {name: parameter.shape for name, parameter in self.parameters.items()})
        for name, parameter in self.parameters.items():
            moments: dict[str, Any] = {kind: torch.tensor(snapshot.moments[f"{name}.{kind}"]) for kind in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(snapshot.step)), **moments}

    # views
    @torch.no_grad()
    def logits(self, batch: Batch) -> np.ndarray:
        return to_host(self.forward(batch))

    def gradients(self, window: Sequence[Batch]) -> Mapping[str, np.ndarray]:
        _, gradients = self.window_gradient(window, toolkit.counted_tokens(window))
        return {name: to_host(gradient) for name, gradient in gradients.items()}

    def dequantized_weight(self, module: str) -> np.ndarray:
        if module not in self.layers:
            raise toolkit.unknown_module(module, self.layers)
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
        listed = f"Weights and config.json differ: {', '.join(wrong[:5])}."
        raise ModelError("QH-TOY2", listed, where=source.name, fix="Get both again.")


def to_host(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().numpy().copy()
