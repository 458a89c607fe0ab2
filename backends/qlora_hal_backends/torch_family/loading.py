"""From a folder of safetensors to a frozen, quantized model, one tensor at a time.

The architecture is transformers' own code; its parameters start without memory. Each weight is read, moved, packed and
dropped before the next, so the 16-bit model never stands whole in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as codec
from safetensors import safe_open
from torch import Tensor, nn

from qlora_hal.backend import Compute, Quantization
from qlora_hal.capabilities import WeightFormat
from qlora_hal.errors import ModelError
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.torch_family.base_weights import (
    BaseWeight,
    Blockwise4BitWeight,
    Int8Weight,
    quantize,
)
from qlora_hal_backends.torch_family.head_loss import Head
from qlora_hal_backends.torch_family.lora_linear import FrozenLinear
from qlora_hal_backends.torch_family.transformers_versions import (
    build_causal,
    optional_libraries_unheard,
    read_config,
)

BITSANDBYTES = "bitsandbytes dequantize"


@dataclass(slots=True)
class BaseModel:
    """A loaded base. `body` gives hidden states, `head` turns them into logits.

    `decoding` names what unpacks the weights, `versions` the packages that are needed for it beside the family's own.
    """

    causal: Any
    body: Any
    head: Head
    linears: Mapping[str, FrozenLinear]
    layers: nn.ModuleList
    decoding: str = BITSANDBYTES
    versions: Mapping[str, str] = field(default_factory=dict)


LoadBase = Callable[[ModelSource, Quantization, Compute, torch.device], BaseModel]
"""The room that GPTQ replaces."""

ReadWeight = Callable[["Checkpoint", str, Quantization, torch.dtype, torch.device], BaseWeight]


def load_base(source: ModelSource, quantization: Quantization, compute: Compute, device: torch.device) -> BaseModel:
    """Load and pack. Raises ModelError with every tensor that is missing or left over."""
    read = _read_bitsandbytes if source.facts.prequantized is not None else _read_and_quantize
    return load_with(source, quantization, compute, device, read)


def load_with(
    source: ModelSource, quantization: Quantization, compute: Compute, device: torch.device, read_weight: ReadWeight
) -> BaseModel:
    """The story of loading; `read_weight` turns one linear layer's tensors into its packed weight."""
    dtype = getattr(torch, compute.dtype)
    with optional_libraries_unheard():
        causal = _architecture(source, compute, dtype)
    linears = _place_frozen_linears(causal)
    with Checkpoint(source.path, source.facts.tensors) as checkpoint:
        for name, linear in linears.items():
            linear.base = read_weight(checkpoint, name, quantization, dtype, device)
            if linear.base.shape != (linear.out_features, linear.in_features):
                expected = (linear.out_features, linear.in_features)
                raise _shape_mismatch(source.name, name, linear.base.shape, expected)
            if checkpoint.has(f"{name}.bias"):
                linear.bias = checkpoint.take(f"{name}.bias", device).to(dtype)
        _fill_parameters(causal, checkpoint, dtype, device)
        _tie_head(causal)
        _check_complete(causal, checkpoint, source)
    causal.to(device)
    causal.eval()
    causal.requires_grad_(False)
    return BaseModel(causal, _body(causal), _head(causal), linears, _decoder_layers(causal))


class Checkpoint:
    """The tensors of all shards, each read once and only when asked for."""

    def __init__(self, folder: Path, tensors: Mapping[str, Any]) -> None:
        self._folder = folder
        self._tensors = tensors
        self._left = set(tensors)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    @property
    def where(self) -> str:
        return str(self._folder)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def has(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, device: torch.device) -> Tensor:
        """Read one tensor. Raises ModelError when the checkpoint lacks it."""
        if name not in self._tensors:
            raise ModelError(
                "QH-M50",
                f"The checkpoint has no tensor {name}.",
                where=str(self._folder),
                cause="The architecture in config.json needs it.",
                fix="Check that the folder is complete and that config.json belongs to it.",
            )
        file = self._tensors[name].file
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(self._folder / file, framework="pt"))
        self._left.discard(name)
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor.to(device)

    def with_prefix(self, prefix: str) -> list[str]:
        return [name for name in self._tensors if name.startswith(prefix)]

    def unread(self) -> list[str]:
        return sorted(self._left)


def _architecture(source: ModelSource, compute: Compute, dtype: torch.dtype) -> Any:
    from accelerate import init_empty_weights

    config = read_config(source.path, trust_remote_code=source.trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # packing is done here, not by transformers
    wanted = str(compute.options.get("attention", "auto"))
    # Left to choose, transformers takes the fused attention wherever the architecture has it (Gemma 2 has not).
    attention = None if wanted == "auto" else wanted
    # Buffers (rotary frequencies) are computed for real: no checkpoint holds them.
    with init_empty_weights(include_buffers=False):
        try:
            return build_causal(config, dtype=dtype, attention=attention, trust_remote_code=source.trust_remote_code)
        except ValueError as error:
            raise ModelError(
                "QH-M51",
                f"transformers cannot build {source.facts.architecture or source.facts.model_type}.",
                where=source.name,
                cause=str(error).splitlines()[0],
                fix="Choose another model, or update transformers.",
            ) from error


def _place_frozen_linears(causal: Any) -> dict[str, FrozenLinear]:
    head = causal.get_output_embeddings()
    linears: dict[str, FrozenLinear] = {}
    for name, module in list(causal.named_modules()):
        if type(module) is nn.Linear and module is not head:
            frozen = FrozenLinear(module.in_features, module.out_features)
            causal.set_submodule(name, frozen)
            linears[name] = frozen
    return linears


def _read_and_quantize(
    checkpoint: Checkpoint, name: str, quantization: Quantization, dtype: torch.dtype, device: torch.device
) -> BaseWeight:
    weight = checkpoint.take(f"{name}.weight", device)
    # A codec may turn NaN into an ordinary code (bitsandbytes on CUDA does): nothing later would show it.
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(
            "QH-M52",
            f"{name}.weight holds NaN or infinity; finite numbers are expected.",
            where=checkpoint.where,
            cause="The checkpoint is damaged, or overflowed when it was converted to 16 bits.",
            fix="Fetch the checkpoint again, or convert it from float32 to bfloat16.",
        )
    return quantize(weight, quantization, dtype)


def _read_bitsandbytes(
    checkpoint: Checkpoint, name: str, quantization: Quantization, dtype: torch.dtype, device: torch.device
) -> BaseWeight:
    """A layer as bitsandbytes saves it; layers left out of quantization stay as they are."""
    if checkpoint.has(f"{name}.SCB"):
        integers = checkpoint.take(f"{name}.weight", device)
        checkpoint.has(f"{name}.weight_format") and checkpoint.take(f"{name}.weight_format", device)
        return Int8Weight(integers, checkpoint.take(f"{name}.SCB", device).float(), dtype)
    parts = [part for part in checkpoint.with_prefix(f"{name}.weight.")]
    if not parts:
        dense = Quantization(WeightFormat.NONE)
        return quantize(checkpoint.take(f"{name}.weight", device), dense, dtype)
    packed = checkpoint.take(f"{name}.weight", device)
    state = codec.QuantState.from_dict({part: checkpoint.take(part, device) for part in parts}, device=device)
    state.dtype = dtype
    return Blockwise4BitWeight(packed, state)


def _fill_parameters(causal: Any, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    for name, parameter in list(causal.named_parameters()):
        if parameter.is_meta and checkpoint.has(name):
            tensor = checkpoint.take(name, device)
            if tensor.shape != parameter.shape:
                raise _shape_mismatch(checkpoint.where, name, tuple(tensor.shape), tuple(parameter.shape))
            _set(causal, name, nn.Parameter(tensor.to(dtype), requires_grad=False))
    for name, buffer in list(causal.named_buffers()):
        if checkpoint.has(name) and not name.endswith(".bias"):
            buffer.copy_(checkpoint.take(name, buffer.device))


def _set(causal: Any, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(causal.get_submodule(path), leaf, parameter)


def _tie_head(causal: Any) -> None:
    head = causal.get_output_embeddings()
    if head is not None and head.weight.is_meta and causal.config.get_text_config().tie_word_embeddings:
        head.weight = causal.get_input_embeddings().weight


def _check_complete(causal: Any, checkpoint: Checkpoint, source: ModelSource) -> None:
    missing = [name for name, tensor in causal.named_parameters() if tensor.is_meta]
    # Rotary frequencies that older checkpoints carry are recomputed, and a tied head may be stored twice.
    ignorable = ("rotary_emb.inv_freq", "lm_head.weight", "masked_bias", "attn.bias")
    left = [name for name in checkpoint.unread() if not name.endswith(ignorable)]
    if missing or left:
        raise ModelError(
            "QH-M50",
            f"The checkpoint and {source.facts.architecture} do not match: {len(missing)} tensors missing "
            f"({', '.join(missing[:5]) or 'none'}), {len(left)} left over ({', '.join(left[:5]) or 'none'}).",
            where=source.name,
            fix="Check that config.json belongs to these weights.",
            context={"missing": missing, "left_over": left},
        )


def _shape_mismatch(where: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> ModelError:
    return ModelError(
        "QH-M50",
        f"{name} has shape {list(found)}; config.json asks for {list(expected)}.",
        where=where,
        fix="Check that config.json belongs to these weights.",
    )


def _body(causal: Any) -> Any:
    return getattr(causal, causal.base_model_prefix)


def _head(causal: Any) -> Head:
    config = causal.config.get_text_config()
    head = causal.get_output_embeddings()
    return Head(
        weight=head.weight,
        bias=head.bias,
        softcap=getattr(config, "final_logit_softcapping", None),
        multiplier=_logit_multiplier(config),
    )


def _logit_multiplier(config: Any) -> float:
    """Cohere multiplies its logits, Granite divides them."""
    if getattr(config, "logit_scale", None):
        return float(config.logit_scale)
    return 1.0 / float(getattr(config, "logits_scaling", 1.0) or 1.0)


def _decoder_layers(causal: Any) -> nn.ModuleList:
    count = causal.config.get_text_config().num_hidden_layers
    for module in causal.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        "QH-M51",
        f"No list of {count} decoder layers was found in {type(causal).__name__}.",
        fix="Choose a decoder-only causal language model.",
    )
