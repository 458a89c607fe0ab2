"""PEFT's layers on transformers' model with bitsandbytes' weights, stepped as transformers' Trainer does."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import bitsandbytes as bnb
import numpy as np
import peft
import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.rivals import PEFT_BITSANDBYTES
from qlora_hal.adapter import check_fits
from qlora_hal.contract import toolkit
from qlora_hal.contract.backend import BackendSpec, Compute, DeviceFacts, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.toolkit import MOMENTS
from qlora_hal.contract.values import (
    Adapter,
    Batch,
    Float32,
    Int32,
    LinearShape,
    LossSum,
    OptimizerSnapshot,
    StepSettings,
)
from qlora_hal.errors import ModelError
from qlora_hal.model.source import ModelSource

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adamw_8bit": AdamW8bit,
    "paged_adamw": PagedAdamW32bit,
    "paged_adamw_8bit": PagedAdamW8bit,
}
"""What `TrainingArguments.optim` means by these names."""
_BITSANDBYTES_MOMENTS = {"exp_avg": ("state1", "absmax1", "qmap1"), "exp_avg_sq": ("state2", "absmax2", "qmap2")}
_BLOCK = 256
"""Numbers of an 8-bit moment to one scale, bitsandbytes 0.50."""
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")

memory_named = partial(toolkit.memory_named, "The CPU", words=("can't allocate memory",))


class PeftTrainer(QuantizedLoRATrainer):
    spec: ClassVar[BackendSpec] = PEFT_BITSANDBYTES

    # life ------------------------------------------------------------------------------------------------------------
    def proved_compute_dtypes(self) -> tuple[str, ...]:
        return ("float32", "bfloat16")

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        is_packed = source.facts.prequantized is not None
        toolkit.check_served(self.spec, quantization, compute, prequantized=is_packed)
        self.close()
        with memory_named("load"):
            try:
                self.model: Any = self.load_model(source, quantization, compute)
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                raise ModelError("QH-RIV1", f"It does not load: {error}", where=source.name, fix="Get it again.") from (
                    error
                )
        self.linears = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module is not self.model.get_output_embeddings()
        }

    def load_model(self, source: ModelSource, quantization: Quantization, compute: Compute) -> Any:
        """The frozen base as PEFT's guide to quantization makes it."""
        dtype = getattr(torch, compute.dtype)
        is_packed = source.facts.prequantized is not None
        wanted = {} if is_packed else bitsandbytes_config(quantization, dtype)
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, **wanted)
        model.requires_grad_(False)
        if is_packed or wanted:
            return peft.prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
                model, use_gradient_checkpointing=compute.gradient_checkpointing
            )
        if compute.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        return model

    def linear_modules(self) -> Mapping[str, LinearShape]:
        return {name: LinearShape(module.in_features, module.out_features) for name, module in self.linears.items()}

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        toolkit.check_attached(self.spec, adapter.config, optimizer)
        with memory_named("attach"):
            check_fits(adapter, self.linear_modules(), where="attach")
            if isinstance(self.model, peft.PeftModel):
                self.model = self.model.unload()
            self.config, self.model = adapter.config, self.put_on(adapter)
            tensors = {name: torch.tensor(tensor) for name, tensor in adapter.tensors.items()}
            peft.set_peft_model_state_dict(self.model, tensors)
            trainable = {n.replace(".default", ""): p for n, p in self.model.named_parameters() if p.requires_grad}
            self.parameters = dict(sorted(trainable.items()))
            self.optimizer: Any = OPTIMIZERS[optimizer](self.parameters.values())

    def put_on(self, adapter: Adapter) -> Any:
        config = adapter.config
        return peft.get_peft_model(
            self.model,
            peft.LoraConfig(
                r=config.r,
                lora_alpha=config.alpha,  # type: ignore[arg-type]
                use_rslora=config.use_rslora,
                target_modules=list(config.target_modules),
                task_type="CAUSAL_LM",
            ),
        )

    def device_facts(self) -> DeviceFacts:
        versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
        return DeviceFacts("cpu", versions, kernel_path="PEFT LoRA layers on bitsandbytes or torch linears")

    def close(self) -> None:
        self.__dict__.clear()

    def __getattr__(self, name: str) -> Any:
        """Only for what is not there: `load` and `attach` set it, `close` takes it away."""
        if name in ("model", "linears", "config", "parameters", "optimizer"):
            raise toolkit.out_of_order("load" if name in ("model", "linears") else "attach")
        raise AttributeError(name)

    # training --------------------------------------------------------------------------------------------------------
    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> toolkit.Done:
        """Trainer's: backward for each micro-batch with `num_items_in_batch`, clip, step. It steps on NaN as well."""
        with memory_named("train_step"):
            loss = self.backward(window, settings.denominator)
            limit = float("inf") if settings.max_grad_norm is None else settings.max_grad_norm
            norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), limit))
            self.optimizer.param_groups[0].update(
                lr=settings.learning_rate,
                betas=(settings.beta1, settings.beta2),
                eps=settings.epsilon,
                weight_decay=settings.weight_decay,
            )
            self.optimizer.step()
            self.optimizer.zero_grad()
        loss_sum = loss * settings.denominator
        return toolkit.Done(toolkit.step_stats(window, loss_sum, loss_sum, norm, applied=True))

    def backward(self, window: Sequence[Batch], denominator: float) -> float:
        self.model.train()
        self.optimizer.zero_grad()
        total = 0.0
        for batch in window:
            loss = self.outputs(batch, denominator).loss
            loss.backward()
            total += float(loss.detach())
        return total

    def outputs(self, batch: Batch, denominator: float | None = None) -> Any:
        """As the collators of transformers and TRL hand rows over: a mask for padded ones, positions for packed ones,
        and the number of counted tokens in the whole window."""
        toolkit.check_batches(self.spec, [batch])
        ids, labels, positions, segments = (
            torch.from_numpy(array).long().to(self.device)
            for array in (batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids)
        )
        rows: dict[str, Any] = {"input_ids": ids}
        rows |= {"position_ids": positions} if batch.is_packed else {"attention_mask": (segments > 0).long()}
        if denominator is not None:
            rows |= {"labels": labels, "num_items_in_batch": torch.tensor(denominator, device=self.device)}
        return self.model(**rows, use_cache=False)

    @property
    def device(self) -> torch.device:
        found: torch.device = self.model.device
        return found

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        _ = self.parameters
        self.model.eval()
        with memory_named("evaluate"):
            total = sum(float(self.outputs(batch, 1.0).loss) for batch in batches)
        return toolkit.evaluated(batches, total, total)

    # state -----------------------------------------------------------------------------------------------------------
    def export_adapter(self) -> Adapter:
        return Adapter({name: to_host(parameter) for name, parameter in self.parameters.items()}, self.config)

    def export_optimizer(self) -> OptimizerSnapshot:
        moments: dict[str, Float32] = {}
        native: dict[str, Any] = {}
        step = 0
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            step = int(state.get("step", 0))
            for kind in MOMENTS:
                moments[f"{name}.{kind}"] = to_host(moment(state, kind, parameter))
            if "state1" in state:
                tensors = {part: value for part, value in state.items() if isinstance(value, Tensor)}
                native |= {f"{name}.{part}": value.cpu().numpy().copy() for part, value in tensors.items()}
        kind = "bitsandbytes.adamw" if native else ""
        return OptimizerSnapshot(step, moments, exact=not native, native_kind=kind, native=native)

    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        toolkit.check_moments(snapshot, {name: parameter.shape for name, parameter in self.parameters.items()})
        for name, parameter in self.parameters.items():
            if isinstance(self.optimizer, torch.optim.AdamW):
                moments: dict[str, Any] = {kind: torch.tensor(snapshot.moments[f"{name}.{kind}"]) for kind in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(snapshot.step)), **moments}
            elif snapshot.native_kind == "bitsandbytes.adamw":
                parts = {part: value for part, value in snapshot.native.items() if part.startswith(f"{name}.")}
                tensors = {part.removeprefix(f"{name}."): torch.tensor(value) for part, value in parts.items()}
                self.optimizer.state[parameter] = {"step": snapshot.step, **tensors}
            else:
                self.fill_bitsandbytes(name, parameter, snapshot)
        self.optimizer.initialized = True

    def fill_bitsandbytes(self, name: str, parameter: nn.Parameter, snapshot: OptimizerSnapshot) -> None:
        """Moments of another optimizer, quantized as bitsandbytes would keep them."""
        if not self.optimizer.initialized:
            self.optimizer.check_overrides()
            self.optimizer.to_gpu()
            self.optimizer.initialized = True
        group = self.optimizer.param_groups[0]
        index = list(self.parameters).index(name)
        self.optimizer.init_state(group, parameter, 0, index)
        state = self.optimizer.state[parameter]
        state["step"] = snapshot.step
        for kind, (codes, scales, table) in _BITSANDBYTES_MOMENTS.items():
            values = torch.tensor(snapshot.moments[f"{name}.{kind}"]).to(parameter.device)
            if state[codes].dtype == torch.uint8:
                packed, found = bnb.functional.quantize_blockwise(values, code=state[table], blocksize=_BLOCK)
                state[codes].copy_(packed)
                state[scales].copy_(found.absmax)
            else:
                state[codes].copy_(values)

    # views -----------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def logits(self, batch: Batch) -> Float32:
        self.model.eval()
        return to_host(self.outputs(batch).logits)

    def gradients(self, window: Sequence[Batch]) -> Mapping[str, Float32]:
        self.backward(window, toolkit.counted_tokens(window))
        found = {
            name: to_host(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            for name, parameter in self.parameters.items()
        }
        self.optimizer.zero_grad()
        return found

    def dequantized_weight(self, module: str) -> Float32:
        if module not in self.linears:
            raise toolkit.unknown_module(module, self.linears)
        return to_host(dequantize_module_weight(self.linears[module]))

    @torch.no_grad()
    def generate(
        self, prompt: Int32, *, max_new_tokens: int, stop_tokens: Sequence[int] = (), adapter: bool = True
    ) -> Int32:
        self.model.eval()
        ids = torch.from_numpy(prompt).long()[None].to(self.device)
        arguments: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "eos_token_id": list(stop_tokens) or None,
            "pad_token_id": 0,
        }
        if adapter or not isinstance(self.model, peft.PeftModel):
            tokens = self.model.generate(**arguments)
        else:
            with self.model.disable_adapter():
                tokens = self.model.generate(**arguments)
        new: Int32 = tokens[0, len(prompt) :].cpu().numpy().astype(np.int32)
        return new[:-1] if len(new) and int(new[-1]) in stop_tokens else new


def bitsandbytes_config(quantization: Quantization, dtype: torch.dtype) -> dict[str, BitsAndBytesConfig]:
    """What `from_pretrained` is told; nothing where nothing is quantized, for a None would hide a checkpoint's own."""
    match quantization.weight_format:
        case WeightFormat.NONE:
            return {}
        case WeightFormat.INT8:
            return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        case four_bit:
            return {
                "quantization_config": BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type=str(four_bit),
                    bnb_4bit_use_double_quant=quantization.double_quant,
                    bnb_4bit_compute_dtype=dtype,
                )
            }


def moment(state: Mapping[str, Any], kind: str, parameter: nn.Parameter) -> Tensor:
    """One moment in float32: torch's, or bitsandbytes' with its 8 bits decoded."""
    codes, scales, table = _BITSANDBYTES_MOMENTS[kind]
    found: Tensor = state.get(kind, state.get(codes, torch.zeros_like(parameter)))
    if found.dtype != torch.uint8:
        return found
    decoded: Tensor = bnb.functional.dequantize_blockwise(
        found, absmax=state[scales], code=state[table], blocksize=_BLOCK
    )
    return decoded


def to_host(tensor: Tensor) -> Float32:
    found: Float32 = tensor.detach().float().cpu().numpy().copy()
    return found
