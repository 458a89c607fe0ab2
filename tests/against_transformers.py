"""A saved model as this family computes it beside transformers and PEFT on the same folder: logits, loss, gradients.
Tests and `benchmarks/architectures.py` only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
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
    targets = list(config.target_modules)
    wrapped = get_peft_model(model, LoraConfig(r=config.r, lora_alpha=config.alpha, target_modules=targets)).eval()
    named = dict(wrapped.named_parameters())
    theirs = {name: named[f"{name.removesuffix('.weight')}.default.weight"] for name in adapter.tensors}
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            theirs[name].copy_(torch.from_numpy(tensor))
    logits = wrapped(input_ids=torch.from_numpy(batch.input_ids).long(), use_cache=False).logits.float()
    labels = torch.from_numpy(batch.labels).long()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    gradients = {name: torch.zeros_like(found) if found.grad is None else found.grad for name, found in theirs.items()}
    return float(loss.detach()), {name: gradient.numpy() for name, gradient in gradients.items()}
