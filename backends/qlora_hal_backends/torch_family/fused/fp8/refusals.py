"""What has no products in 8-bit floats is refused: never computed in the compute dtype without a word."""

from __future__ import annotations

import torch

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.detect.gpu_dtypes import dtype_refused
from qlora_hal.errors import QloraHalError
from qlora_hal.model.facts import ModelFacts
from qlora_hal_backends.torch_family.fused.supported import fp8_device_refusal

FORMATS = (WeightFormat.NF4, WeightFormat.FP4)


def check_fp8(facts: ModelFacts, quantization: Quantization, compute: Compute, device: torch.device) -> None:
    """What can be told before the weights are read. Raises UnsupportedFeatureError QH-B01."""
    reason = fp8_device_refusal(device) or _settings_refusal(facts, quantization, compute)
    if reason is not None:
        raise fp8_refused(reason)


def fp8_refused(reason: str) -> QloraHalError:
    return dtype_refused("fp8", reason)


def _settings_refusal(facts: ModelFacts, quantization: Quantization, compute: Compute) -> str | None:
    if compute.dtype != "bfloat16":
        return f"what is beside them is in bfloat16, not {compute.dtype}"
    if quantization.weight_format not in FORMATS:
        return f"the base is stored as {quantization.weight_format}, not as {' or '.join(FORMATS)}"
    if facts.has_routed_experts:
        return "the model is a mixture of experts"
    for option, value in (("layers", "plain"), ("attention", "eager")):
        if compute.options.get(option) == value:
            return f"they are in the fused layers, which backend.options.{option}: {value} leaves out"
    return None
