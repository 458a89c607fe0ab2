"""A saved model as this family computes it beside transformers and PEFT on the same folder: logits, loss, gradients.
Tests and `benchmarks/architectures.py` only."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trainers import OpenTrainer, open_cpu_trainer, packed, random_batch, source_of

from qlora_hal.contract.values import Adapter, Batch

TOLERANCE = 1e-4
"""Of logits relative to the largest, and of the loss in nats: float32 sums of a few thousand products in another order
differ by 1e-6; whatever is computed otherwise shows above."""
GRADIENT_TOLERANCE = 1e-3
"""Relative to the largest entry: a gradient has passed through all layers twice."""


@dataclass(frozen=True)
class Reference:
    """transformers' model of a folder, and its logits `[batch, time, vocabulary]`."""

    model: Any
    batch: Batch
    logits: Any


def reference_of(folder: Path, seed: int = 0) -> Reference:
    """The folder opened by transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    batch = random_batch(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(batch.input_ids).long(), use_cache=False).logits.float()
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("transformers' logits are not finite")
    return Reference(model, batch, logits)


def refusal_of(folder: Path) -> dict[str, Any] | None:
    """How a dry run refuses the folder, or None."""
    from qlora_hal.errors import QloraHalError
    from qlora_hal_backends.torch_family.outline import outline

    try:
        outline(source_of(folder), {})
    except QloraHalError as error:
        return {"result": "refused", "code": error.code, "why": error.cause or error.message, "by": "dry run"}
    return None


def compare(folder: Path, expected: Reference) -> dict[str, Any]:
    """Outline, load, logits, loss and gradients beside the reference's; a refusal with its code and its stage."""
    from qlora_hal.errors import QloraHalError
    from qlora_hal_backends.torch_family.outline import outline

    if refusal := refusal_of(folder):
        return refusal
    told = outline(source_of(folder), {})
    try:
        opened = open_cpu_trainer(folder)
    except QloraHalError as error:
        return {"result": "refused", "code": error.code, "why": error.cause or error.message, "by": "load"}
    assert set(told.linear_modules) == set(opened.trainer.linear_modules()), "the outline told other layers"
    base = opened.trainer._base  # type: ignore[attr-defined]
    result: dict[str, Any] = {
        **_distances(opened, expected),
        "linear_layers": len(told.linear_modules),
        "head": "whole forward pass" if base.head is None else "product",
        "packing": base.mixes_samples or "yes",
        "notes": list(told.notes),
    }
    within = max(result["apart"], result["loss_apart"], result["packed_apart"]) <= TOLERANCE
    is_equal = within and result["gradient_apart"] <= GRADIENT_TOLERANCE
    opened.trainer.close()
    return {"result": "equal" if is_equal else "different", **result}


def _distances(opened: OpenTrainer, expected: Reference) -> dict[str, float]:
    import numpy as np
    import torch

    trainer, adapter, batch = opened.trainer, opened.adapter, expected.batch
    loss, gradients = peft_step(expected.model, adapter, batch)
    ours, found = trainer.evaluate([batch]).loss, trainer.gradients([batch])
    largest_gradient = max(float(np.abs(gradient).max()) for gradient in gradients.values())
    gradient_apart = max(float(np.abs(found[name] - gradients[name]).max()) for name in gradients)
    mixes = trainer._base.mixes_samples  # type: ignore[attr-defined]
    packed_apart = 0.0 if mixes else abs(trainer.evaluate([packed([batch])]).loss - ours)
    for name, tensor in adapter.tensors.items():
        tensor *= "lora_A" in name  # B = 0: the base alone
    trainer.attach(adapter)
    largest = max(1.0, float(expected.logits.abs().max()))
    return {
        "apart": float((torch.from_numpy(trainer.logits(batch)) - expected.logits).abs().max()) / largest,
        "loss_apart": abs(ours - loss),
        "gradient_apart": gradient_apart / max(largest_gradient, 1e-12),
        "packed_apart": packed_apart,
    }


def peft_step(model: Any, adapter: Adapter, batch: Batch) -> tuple[float, dict[str, Any]]:
    """Token mean of the loss, and the adapter's gradients, by PEFT on transformers' model in eval mode."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = adapter.config
    if any(tensor.ndim == 3 for tensor in adapter.tensors.values()):
        return _peft_step_with_experts(model, adapter, batch)
    targets = list(config.target_modules)
    wrapped = get_peft_model(model, LoraConfig(r=config.r, lora_alpha=config.alpha, target_modules=targets)).eval()
    named = dict(wrapped.named_parameters())
    theirs = {name: named[f"{name.removesuffix('.weight')}.default.weight"] for name in adapter.tensors}
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            theirs[name].copy_(torch.from_numpy(tensor))
    loss = _loss_of(wrapped, batch)
    loss.backward()
    gradients = {name: torch.zeros_like(found) if found.grad is None else found.grad for name, found in theirs.items()}
    return float(loss.detach()), {name: gradient.numpy() for name, gradient in gradients.items()}


def _loss_of(wrapped: Any, batch: Batch) -> Any:
    import torch

    logits = wrapped(input_ids=torch.from_numpy(batch.input_ids).long(), use_cache=False).logits.float()
    labels = torch.from_numpy(batch.labels).long()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _peft_step_with_experts(model: Any, adapter: Adapter, batch: Batch) -> tuple[float, dict[str, Any]]:
    """The adapter opened from its file. PEFT keeps a stack's A as `[experts * r, in]` and B as `[out, r * experts]`;
    gate and up as one of twice the rank, B in two blocks of which those beside the diagonal are no part of it."""
    import torch
    from peft import PeftModel

    from qlora_hal.adapter import module_of, write_adapter
    from qlora_hal.adapter.naming import lora_a_key, lora_b_key
    from qlora_hal.adapter.peft_experts import LAYOUT, NUMBERED, layout_of
    from qlora_hal.model.expert_stacks import INTERLEAVED, paired_with

    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft 0.21: patterns of parameters, an older name of recomputation
        in_turns = model.config.model_type in INTERLEAVED
        provenance = {LAYOUT: layout_of(model.config.model_type)}
        write_adapter(Path(folder) / "a", adapter, base_name="base", base_revision=None, provenance=provenance)
        wrapped = PeftModel.from_pretrained(model, Path(folder) / "a", is_trainable=True).eval()
    loss = _loss_of(wrapped, batch)
    loss.backward()
    found = {
        name.replace(".default", ""): torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in wrapped.named_parameters()
        if ".lora_" in name
    }
    gradients: dict[str, Any] = {}
    for name, tensor in adapter.tensors.items():
        module, half = module_of(name)
        if tensor.ndim == 2:
            gradients[name] = found[name].numpy()
            continue
        block = module.rpartition(".")[0].replace("ffn", "mlp")
        if provenance[LAYOUT] == NUMBERED:
            block = block.replace("block_sparse_moe", "mlp")
        is_gate = module.endswith((".gate_proj", ".w1"))
        inner = ".base_layer" if paired_with(module) else ""
        key = (lora_a_key if half == "A" else lora_b_key)(f"{block}{inner}")
        experts, rank = tensor.shape[0], adapter.config.r
        if half == "A":
            stack = found[key].view(experts, -1, tensor.shape[2])
            part = stack[:, :rank] if is_gate or not inner else stack[:, rank:]
        else:
            stack = found[key].view(found[key].shape[0], -1, experts).permute(2, 0, 1)  # [experts, out, r or 2 r]
            outputs = tensor.shape[1]
            gate, up = (slice(0, None, 2), slice(1, None, 2)) if in_turns else (slice(outputs), slice(outputs, None))
            part = stack[:, gate, :rank] if is_gate else stack[:, up, rank:]
            part = stack if not inner else part
        gradients[name] = part.numpy()
    return float(loss.detach()), gradients
