"""Unsloth's model and LoRA layers, stepped as transformers' Trainer does. Not run: it needs an NVIDIA or AMD GPU."""

from __future__ import annotations

# Unsloth patches transformers and PEFT, and asks to be imported before them.
import unsloth  # isort: skip
from typing import Any, ClassVar

import torch

from benchmarks.rivals import UNSLOTH
from benchmarks.rivals.peft_trainer import PeftTrainer
from qlora_hal.contract.backend import BackendSpec, Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Adapter
from qlora_hal.model.source import ModelSource

LONGEST_ROW = 2048
"""Tokens; Unsloth wants to know it before it loads."""


class UnslothTrainer(PeftTrainer):
    """PEFT's adapter, with the two calls that Unsloth replaces."""

    spec: ClassVar[BackendSpec] = UNSLOTH

    def proved_compute_dtypes(self) -> tuple[str, ...]:
        return ("bfloat16", "float16") if torch.cuda.is_bf16_supported() else ("float16",)

    def load_model(self, source: ModelSource, quantization: Quantization, compute: Compute) -> Any:
        self.checkpointing = "unsloth" if compute.gradient_checkpointing else False
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            model_name=str(source.path),
            max_seq_length=LONGEST_ROW,
            dtype=getattr(torch, compute.dtype),
            load_in_4bit=quantization.weight_format is WeightFormat.NF4,
        )
        return model

    def put_on(self, adapter: Adapter) -> Any:
        config = adapter.config
        return unsloth.FastLanguageModel.get_peft_model(
            self.model,
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=0.0,
            use_rslora=config.use_rslora,
            target_modules=list(config.target_modules),
            use_gradient_checkpointing=self.checkpointing,
        )
