"""From a folder of safetensors to a frozen, quantized model, one tensor at a time.

The architecture is transformers' own code; its parameters start without memory. Each weight is read, moved, packed and
dropped before the next, so the 16-bit model never stands whole in memory.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as codec
from safetensors import safe_open
from torch import Tensor, nn

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.memory_constants import OFFLOADED_LAYERS
from qlora_hal.contract.rotary_length import RotaryLength
from qlora_hal.errors import ModelError, UnsupportedFeatureError
from qlora_hal.formats.catalogue import record_of
from qlora_hal.model.linear_shapes import layer_of
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.torch_family.architecture import Architecture, build, rotary_of, shape_mismatch
from qlora_hal_backends.torch_family.attention import sinks
from qlora_hal_backends.torch_family.base_weights import (
    BaseWeight,
    Blockwise4BitWeight,
    Int8Weight,
    quantize,
)
from qlora_hal_backends.torch_family.experts import ExpertStack, RoutedExperts, pack_experts
from qlora_hal_backends.torch_family.experts.stacked_weights import Mxfp4Stack
from qlora_hal_backends.torch_family.head_loss import Head
from qlora_hal_backends.torch_family.host_tables import HostEmbedding, Tables
from qlora_hal_backends.torch_family.layer_slots import LayerStore, kind_of
from qlora_hal_backends.torch_family.layers_at_rest import AUTO, idle_note
from qlora_hal_backends.torch_family.lora_linear import FrozenLinear
from qlora_hal_backends.torch_family.microscaling import LARGEST, Mxfp4Weight
from qlora_hal_backends.torch_family.ranks import most_ranks_here
from qlora_hal_backends.torch_family.sharded_base import ShardedBase
from qlora_hal_backends.torch_family.streamed_base import StreamedBase
from qlora_hal_backends.torch_family.transformers_versions import recomputable_layers, stays_float32
from qlora_hal_backends.torch_family.trial import tried

FEED_FORWARD = "mlp"
"""What transformers' decoder layers call it."""

BITSANDBYTES = "bitsandbytes dequantize"


@dataclass(slots=True)
class BaseModel:
    """A loaded base. `body` gives hidden states, `head` turns them into logits; without a head only `causal` does.

    `mixes_samples` says why several samples cannot share a row, or is empty; `takes_lengths`: its attention is told
    where they end, beside positions that start again; `rotary` where rotary positions change
    with the length of a row. `notes` are for the user. `decoding` names what unpacks the weights, `versions` the
    packages that are needed for it beside the family's own. `sharded` holds the layers where each rank has a part,
    `streamed` where they are in the host's memory; `host_embedding` looks tokens up there.
    `experts` the blocks whose stacks are among `linears`.
    """

    causal: Any
    body: Any
    head: Head | None
    linears: Mapping[str, FrozenLinear | ExpertStack]
    layers: nn.ModuleList
    mixes_samples: str = ""
    takes_lengths: bool = False
    rotary: RotaryLength | None = None
    notes: tuple[str, ...] = ()
    decoding: str = BITSANDBYTES
    versions: Mapping[str, str] = field(default_factory=dict)
    sharded: ShardedBase | None = None
    streamed: StreamedBase | None = None
    host_embedding: HostEmbedding | None = None
    experts: tuple[RoutedExperts, ...] = ()

    @property
    def is_microscaled(self) -> bool:
        return any(kind_of(linear.base) in (Mxfp4Weight, Mxfp4Stack) for linear in self.linears.values())


LoadBase = Callable[[ModelSource, Quantization, Compute, torch.device], BaseModel]
"""The room that GPTQ replaces."""

ReadWeight = Callable[["Checkpoint", str, Quantization, torch.dtype, torch.device], BaseWeight]


def load_base(source: ModelSource, quantization: Quantization, compute: Compute, device: torch.device) -> BaseModel:
    """Load and pack. Raises ModelError with every tensor that is missing or left over."""
    return load_with(source, quantization, compute, device, _reader_of(source))


def _reader_of(source: ModelSource) -> ReadWeight:
    """How a linear layer's tensors become its weight."""
    stored = source.facts.prequantized
    if stored is None:
        return read_and_quantize
    return _read_mxfp4 if stored.weight_format == WeightFormat.MXFP4 else _read_bitsandbytes


def load_with(
    source: ModelSource, quantization: Quantization, compute: Compute, device: torch.device, read_weight: ReadWeight
) -> BaseModel:
    """The story of loading; `read_weight` turns one linear layer's tensors into its packed weight."""
    dtype = getattr(torch, compute.dtype)
    architecture = build(source, compute.options.get("attention", "auto"), dtype)
    causal, linears = architecture.causal, architecture.linears
    layers = _by_layer(architecture)
    store = _layer_store(compute, device, sum(part.numbers for layer, part in layers.items() if layer))
    with Checkpoint(source.path, source.facts.tensors, architecture.stored) as checkpoint:
        read = partial(_read_layer, read_weight, checkpoint, quantization, dtype, device)
        for layer, part in layers.items():
            for name, linear in part.linears.items():
                if not checkpoint.has_module(name):
                    continue  # one with another layer
                linear.base = read(name)
                if linear.base.shape != (linear.out_features, linear.in_features):
                    expected = (linear.out_features, linear.in_features)
                    raise shape_mismatch(source.name, name, linear.base.shape, expected)
                linear.bias = _bias(checkpoint, name, linear, dtype, device)
            for path in part.blocks:
                pack_experts(architecture.expert_names, path, checkpoint, read, quantization, dtype, device)
            if store is not None and layer:
                part.move_to(store)
        if store is not None:
            store.finish()
        tables = Tables.of(causal, compute.base_offload)
        _fill_parameters(causal, checkpoint, lambda name: torch.device("cpu") if name in tables.names else device)
        _fill_buffers(causal, checkpoint)
        notes = [*_tie(architecture), *_unused_notes(architecture), *tables.notes]
        resting = str(compute.options.get(OFFLOADED_LAYERS, AUTO))
        if not isinstance(store, StreamedBase) and (idle := idle_note(resting)):
            notes.append(idle)
    host_embedding = tables.move_to_host(causal, device)
    causal.to(device)
    causal.eval()
    causal.requires_grad_(False)
    trial = tried(causal, source, device)
    if trial.head is None:
        notes.append(
            f"{type(causal).__name__} computes its logits in a way of its own: all at once, for every token of a "
            "batch, which takes more memory than the estimate"
        )
    return BaseModel(
        causal=causal,
        body=trial.body,
        head=trial.head,
        linears={name: linears.get(name) or architecture.experts[name] for name in architecture.shapes},
        experts=tuple(architecture.expert_names.blocks.values()),
        layers=_decoder_layers(causal, compute),
        mixes_samples=trial.mixes_samples,
        takes_lengths=sinks.is_used(causal),
        rotary=rotary_of(causal),
        notes=tuple(notes) if not isinstance(store, StreamedBase) else (*notes, store.cost()),
        sharded=store if isinstance(store, ShardedBase) else None,
        streamed=store if isinstance(store, StreamedBase) else None,
        host_embedding=host_embedding,
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """The modules of one layer whose weights are packed, by their paths in the model."""

    linears: dict[str, FrozenLinear] = field(default_factory=dict)
    blocks: dict[str, RoutedExperts] = field(default_factory=dict)

    @property
    def modules(self) -> list[FrozenLinear | ExpertStack]:
        return [*self.linears.values(), *(stack for block in self.blocks.values() for stack in block.stacks)]

    @property
    def numbers(self) -> int:
        """Of their weights."""
        return sum(module.shape.parameters for module in self.modules)

    def move_to(self, store: LayerStore) -> None:
        """Keep what was read there, as one layer."""
        read = [(module, module.base) for module in self.modules if module.base is not None]
        moved = store.add([weight for _, weight in read]) if read else []
        for (module, _), weight in zip(read, moved, strict=True):
            module.base = weight


def _by_layer(architecture: Architecture) -> dict[str, _Part]:
    """Layers in the order of the model, with what is in no layer under an empty name."""
    layers: dict[str, _Part] = {}
    for name, linear in architecture.linears.items():
        layers.setdefault(layer_of(name), _Part()).linears[name] = linear
    for path, block in architecture.expert_names.blocks.items():
        layers.setdefault(layer_of(path), _Part()).blocks[path] = block
    return layers


def _layer_store(compute: Compute, device: torch.device, numbers: int) -> ShardedBase | StreamedBase | None:
    """Where packed layers of so many numbers are kept, if not on the device. Raises UnsupportedFeatureError QH-B01 for
    two at once."""
    on_host = "layers" in compute.base_offload
    if on_host and compute.shard_base:
        raise UnsupportedFeatureError(
            "QH-B01",
            "The decoder layers can be spread over the devices or kept in the host's memory, not both.",
            where="training.base_offload",
            fix="Take layers out of training.base_offload, or set parallel.mode: data.",
        )
    if on_host:
        choice = str(compute.options.get(OFFLOADED_LAYERS, AUTO))
        return StreamedBase(device, numbers, choice, most_ranks_here(compute.world, device))
    return ShardedBase(compute.world, device) if compute.shard_base else None


def _read_layer(
    read_weight: ReadWeight,
    checkpoint: Checkpoint,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
    name: str,
) -> BaseWeight:
    return read_weight(checkpoint, name, quantization, dtype, device)


class Checkpoint:
    """The tensors of all shards under their names in the model, each read only when asked for.

    `stored` maps these names to those in the files; without it they are the same.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Any], stored: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._tensors = tensors
        self._stored = dict.fromkeys(tensors) if stored is None else stored
        self._sorted = sorted(self._stored)
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
        return name in self._stored

    def has_module(self, module: str) -> bool:
        """Whether a weight is stored for this layer, packed or not."""
        return self.has(f"{module}.weight") or any(self.has(f"{module}.{part}") for part in ("qweight", "SCB"))

    def take(self, name: str, device: torch.device) -> Tensor:
        """Read one tensor. Raises ModelError when the checkpoint lacks it."""
        if name not in self._stored:
            raise ModelError(
                "QH-M50",
                f"The checkpoint has no tensor {name}.",
                where=str(self._folder),
                cause="The architecture in config.json needs it.",
                fix="Check that the folder is complete and that config.json belongs to it.",
            )
        stored = self._stored[name] or name
        tensor: Tensor = self._file_of(stored).get_tensor(stored)
        return tensor.to(device)

    def take_part(self, name: str, number: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """One of the parts along the first side, of which no other is read. Raises ModelError QH-M52 as `finite_in`."""
        part = self.take_bytes_of_part(name, number, device)
        finite_in(part, dtype, name, self.where)
        return part

    def take_bytes_of_part(self, name: str, number: int, device: torch.device) -> Tensor:
        """One of the parts along the first side, as it is stored."""
        stored = self._stored[name] or name
        part: Tensor = self._file_of(stored).get_slice(stored)[number].to(device)
        return part

    def numbers_in(self, weight: Mxfp4Weight, name: str) -> Mxfp4Weight:
        """`weight` again, that of the layer `name`. Raises ModelError QH-M52 as `finite_in`; only where a scale is that
        large, the one for NaN among them, is it decoded for that."""
        if LARGEST * 2.0 ** (int(weight.scales.max()) - 127) > torch.finfo(weight.dtype).max:
            finite_in(replace(weight, dtype=torch.float32).dense(), weight.dtype, name, self.where)
        return weight

    @property
    def is_packed(self) -> bool:
        """Whether any layer is quantized in the files."""
        return any(name.endswith((".SCB", ".qweight", ".scales")) or ".weight." in name for name in self._stored)

    def _file_of(self, stored: str) -> Any:
        file = self._tensors[stored].file
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(self._folder / file, framework="pt"))
        return self._open[file]

    def with_prefix(self, prefix: str) -> list[str]:
        first = bisect_left(self._sorted, prefix)
        return list(takewhile(lambda name: name.startswith(prefix), islice(self._sorted, first, None)))


def are_finite(tensor: Tensor) -> bool:
    """By the smallest and the largest, of which NaN is both. `torch.isfinite` makes four or five bytes a number on its
    way: on a GPU an embedding of 128,256 x 3072 took more for that than a step of short rows."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor))


def finite(tensor: Tensor, name: str, where: str) -> Tensor:
    """`tensor` again. Raises ModelError QH-M52 where it holds NaN or infinity."""
    if are_finite(tensor):
        return tensor
    raise ModelError(
        "QH-M52",
        f"{name} holds NaN or infinity; finite numbers are expected.",
        where=where,
        cause="The checkpoint is damaged, or overflowed when it was converted to 16 bits.",
        fix="Fetch the checkpoint again, or convert it from float32 to bfloat16.",
    )


def finite_in(tensor: Tensor, dtype: torch.dtype, name: str, where: str) -> Tensor:
    """`tensor` in `dtype`. Raises ModelError QH-M52 where it is not finite, there or as it is stored."""
    found = finite(tensor, name, where).to(dtype)
    if are_finite(found):
        return found
    raise ModelError(
        "QH-M52",
        f"{name} holds {float(tensor.double().abs().max()):.3g}; {str(dtype).removeprefix('torch.')} ends at "
        f"{torch.finfo(dtype).max:.3g}.",
        where=where,
        cause="The number becomes infinity in the dtype that is computed in.",
        fix="Set quantization.compute_dtype to bfloat16 or float32, or get the checkpoint again.",
    )


def read_and_quantize(
    checkpoint: Checkpoint, name: str, quantization: Quantization, dtype: torch.dtype, device: torch.device
) -> BaseWeight:
    """A weight that is stored as ordinary numbers. Raises ModelError QH-M52."""
    weight = checkpoint.take(f"{name}.weight", device)
    # A codec may turn NaN into an ordinary code (bitsandbytes on CUDA does): nothing later would show it.
    finite_in(weight, dtype, f"{name}.weight", checkpoint.where)
    format_record = record_of(quantization.weight_format)
    format_record.require_whole_blocks(name, weight.shape[-1], quantization.block_size, checkpoint.where)
    return quantize(weight, quantization, dtype)


def _read_mxfp4(
    checkpoint: Checkpoint, name: str, quantization: Quantization, dtype: torch.dtype, device: torch.device
) -> BaseWeight:
    """A layer as MLX packs it; others stay as they are, as all but the experts of gpt-oss do."""
    if not checkpoint.has(f"{name}.scales"):
        return read_and_quantize(checkpoint, name, Quantization(WeightFormat.NONE), dtype, device)
    packed = checkpoint.take(f"{name}.weight", device).view(torch.uint8)
    return checkpoint.numbers_in(Mxfp4Weight(packed, checkpoint.take(f"{name}.scales", device), dtype), name)


def _read_bitsandbytes(
    checkpoint: Checkpoint, name: str, quantization: Quantization, dtype: torch.dtype, device: torch.device
) -> BaseWeight:
    """A layer as bitsandbytes saves it; layers left out of quantization stay as they are."""
    if checkpoint.has(f"{name}.SCB"):
        integers = checkpoint.take(f"{name}.weight", device)
        checkpoint.has(f"{name}.weight_format") and checkpoint.take(f"{name}.weight_format", device)
        row_absmax = finite(checkpoint.take(f"{name}.SCB", device).float(), f"{name}.SCB", checkpoint.where)
        return Int8Weight(integers, row_absmax, dtype)
    parts = [part for part in checkpoint.with_prefix(f"{name}.weight.")]
    if not parts:
        dense = Quantization(WeightFormat.NONE)
        return read_and_quantize(checkpoint, name, dense, dtype, device)
    # Sharded trainers want the bytes of codes under the name of a float (`bnb_4bit_quant_storage`); kernels read bytes.
    packed = checkpoint.take(f"{name}.weight", device).view(torch.uint8).view(-1, 1)
    tensors = {part: checkpoint.take(part, device) for part in parts}
    for part, tensor in tensors.items():
        if tensor.is_floating_point():
            # Whatever the dtype of its scales, bitsandbytes reads them as float32.
            tensors[part] = finite(tensor, part, checkpoint.where).float()
    state = codec.QuantState.from_dict(tensors, device=device)
    state.dtype = dtype
    return Blockwise4BitWeight(packed, state)


def _bias(
    checkpoint: Checkpoint, name: str, linear: FrozenLinear, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The bias of one layer; none where only zeros are stored and the architecture has none. Raises ModelError QH-M50
    where other numbers are, which would be dropped."""
    bias = f"{name}.bias"
    if not linear.has_bias and not checkpoint.has(bias):
        return None
    tensor = finite_in(checkpoint.take(bias, device), dtype, bias, checkpoint.where)
    if linear.has_bias:
        return tensor
    if bool(tensor.any()):
        raise ModelError(
            "QH-M50",
            f"{bias} is stored and is not zero; by config.json this layer has no bias.",
            where=checkpoint.where,
            fix="Check that config.json belongs to these weights.",
        )
    return None


def _fill_parameters(causal: Any, checkpoint: Checkpoint, device_of: Callable[[str], torch.device]) -> None:
    """Every parameter that is stored under its own name, in the dtype that the architecture gives it."""
    in_float32 = stays_float32(causal)
    for name, parameter in list(causal.named_parameters(remove_duplicate=False)):
        if checkpoint.has(name):
            dtype = torch.float32 if in_float32(name) and parameter.is_floating_point() else parameter.dtype
            tensor = finite_in(checkpoint.take(name, device_of(name)), dtype, name, checkpoint.where)
            _set(causal, name, nn.Parameter(tensor, requires_grad=False))


def _fill_buffers(causal: Any, checkpoint: Checkpoint) -> None:
    ours = {f"{name}.bias" for name, module in causal.named_modules() if isinstance(module, FrozenLinear)}
    for name, buffer in list(causal.named_buffers(remove_duplicate=False)):
        if checkpoint.has(name) and name not in ours:
            buffer.copy_(finite_in(checkpoint.take(name, buffer.device), buffer.dtype, name, checkpoint.where))


def _set(causal: Any, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(causal.get_submodule(path), leaf, parameter)


def _tie(architecture: Architecture) -> Iterator[str]:
    """Make one what config.json ties. Where a tied parameter is stored again with other numbers, the stored ones stay,
    as in transformers, and that is said."""
    causal, linears = architecture.causal, architecture.linears
    for group in architecture.tied:
        modules = [name.removesuffix(".weight") for name in group]
        bases = [linears[name].base for name in modules if name in linears and linears[name].base is not None]
        for name in modules:
            if name in linears and linears[name].base is None:
                linears[name].base = bases[0]
        parameters = {name: found for name in group if (found := _parameter(causal, name)) is not None}
        filled = [name for name, parameter in parameters.items() if not parameter.is_meta]
        for name, parameter in parameters.items():
            if parameter.is_meta or torch.equal(parameter, parameters[filled[0]]):
                _set(causal, name, parameters[filled[0]])
            else:
                yield f"config.json ties {name} to {filled[0]}, but other numbers are stored for it: those are used"


def _parameter(causal: Any, name: str) -> nn.Parameter | None:
    path, _, leaf = name.rpartition(".")
    found = getattr(causal.get_submodule(path), leaf, None)
    return found if isinstance(found, nn.Parameter) else None


def _unused_notes(architecture: Architecture) -> Iterator[str]:
    if unused := architecture.unused:
        listed = ", ".join(unused[:3]) + (" and others" if len(unused) > 3 else "")
        yield f"{len(unused)} stored tensors are not used ({listed}): the architecture computes or ignores them"


def _decoder_layers(causal: Any, compute: Compute) -> nn.ModuleList:
    """What gradient checkpointing recomputes one by one. Raises UnsupportedFeatureError QH-B01 where it is asked for
    and no such layers are found, or none with the part that is to be recomputed."""
    layers = _layers_of(causal, compute)
    selective = compute.gradient_checkpointing and compute.recompute == "selective"
    if selective and not all(isinstance(getattr(layer, FEED_FORWARD, None), nn.Module) for layer in layers):
        raise UnsupportedFeatureError(
            "QH-B01",
            f"No feed-forward to recompute by itself was found in the layers of {type(causal).__name__}.",
            where="training.recompute",
            fix="Set training.recompute: full.",
        )
    return layers


def _layers_of(causal: Any, compute: Compute) -> nn.ModuleList:
    count = getattr(causal.config.get_text_config(), "num_hidden_layers", None)
    for module in causal.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    layers = nn.ModuleList(recomputable_layers(causal))
    if not layers and compute.gradient_checkpointing:
        raise UnsupportedFeatureError(
            "QH-B01",
            f"No decoder layers to recompute were found in {type(causal).__name__}.",
            where="training.recompute",
            fix="Set training.recompute: none.",
        )
    return layers
