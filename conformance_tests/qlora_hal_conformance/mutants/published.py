"""Right in every other format and family; wrong in MXFP4, in the layout that gpt-oss is published in, or in what
gpt-oss computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from qlora_hal.contract.backend import BackendSpec, Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.formats.catalogue import record_of
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.reference_backend import SPEC
from qlora_hal_conformance.reference_backend.storage import Coded, Stored, pack, unpack
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle import LlamaShape, MicroscalingCodec, OracleLlama, StoredTensors
from qlora_hal_oracle.arrays import AnyFloat, Float64
from qlora_hal_oracle.lora import LoraScale

from .families import read_as
from .registry import Mutant, with_rooms, with_trainer

Change = Callable[[StoredTensors], StoredTensors]


def with_mxfp4(spec: BackendSpec) -> BackendSpec:
    """The honest reference does not declare MXFP4: its cases would be run with every mutant."""
    known = spec.capabilities
    return replace(
        spec,
        capabilities=replace(
            known,
            weight_formats=known.weight_formats | {WeightFormat.MXFP4},
            block_sizes={**known.block_sizes, WeightFormat.MXFP4: record_of(WeightFormat.MXFP4).block_sizes},
        ),
    )


HONEST_WITH_MXFP4 = replace(with_mxfp4(SPEC), trainer=f"{__name__}:open_honest")
"""What the mutants below differ from."""


def open_honest() -> ReferenceTrainer:
    """Its trainer."""
    return ReferenceTrainer(spec=HONEST_WITH_MXFP4)


def reading(change: Change) -> Callable[[Stored], Float64]:
    def read(stored: Stored) -> Float64:
        if isinstance(stored, Coded) and isinstance(stored.codec, MicroscalingCodec):
            stored = replace(stored, tensors=change(stored.tensors))
        return unpack(stored)

    return read


def nibbles_swapped(tensors: StoredTensors) -> StoredTensors:
    pairs = tensors[".weight"].view(np.uint8)
    return {**tensors, ".weight": ((pairs << 4) | (pairs >> 4)).astype(np.uint8).view(np.uint32)}


def scale_of_the_group_before(tensors: StoredTensors) -> StoredTensors:
    return {**tensors, ".scales": np.roll(tensors[".scales"], 1, axis=-1)}


def bias_of_the_scale_is_128(tensors: StoredTensors) -> StoredTensors:
    return {**tensors, ".scales": (np.maximum(tensors[".scales"], 1) - 1).astype(np.uint8)}


def _is_published(source: ModelSource) -> bool:
    return source.facts.prequantized is not None and source.facts.prequantized.method == "mxfp4"


class PublishedHalvesSwapped(ReferenceTrainer):
    """Takes the odd rows of published bytes for the gate."""

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        super().load(source, quantization, compute)
        if _is_published(source):
            weights = self.base.weights
            for name in [name for name in weights if name.endswith("experts.gate_proj.weight")]:
                other = name.replace("gate_proj", "up_proj")
                weights[name], weights[other] = weights[other], weights[name]


class PublishedBaseRequantized(ReferenceTrainer):
    """Decodes published bytes once and packs them in NF4."""

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        super().load(source, quantization, compute)
        if _is_published(source):
            weights = self.base.weights
            for name in [name for name in weights if ".experts." in name and name.endswith(".weight")]:
                weights[name] = self.arithmetic.store(np.stack([in_nf4(one) for one in weights[name]]))


class RestOfPublishedRequantized(ReferenceTrainer):
    """Packs what is published in 16 bits."""

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        super().load(source, quantization, compute)
        if _is_published(source):
            weights = self.base.weights
            for name in [name for name in weights if ".self_attn." in name and name.endswith("_proj.weight")]:
                weights[name] = self.arithmetic.store(in_nf4(weights[name]))


def in_nf4(weight: AnyFloat) -> Float64:
    return unpack(pack(np.asarray(weight, dtype=np.float32), Quantization(WeightFormat.NF4, 64)))


def sinks_forgotten(
    shape: LlamaShape, base: Mapping[str, AnyFloat], adapter: dict[str, Float64], scale: LoraScale
) -> OracleLlama:
    nothing = {name: np.full_like(tensor, -1e9) for name, tensor in base.items() if name.endswith(".sinks")}
    return OracleLlama(shape, {**base, **nothing}, adapter, scale)


def expert_biases_forgotten(
    shape: LlamaShape, base: Mapping[str, AnyFloat], adapter: dict[str, Float64], scale: LoraScale
) -> OracleLlama:
    nothing = {name: np.zeros_like(tensor) for name, tensor in base.items() if ".experts." in name and "bias" in name}
    return OracleLlama(shape, {**base, **nothing}, adapter, scale)


def gates_without_limit(shape: LlamaShape) -> LlamaShape:
    mixture = shape.mixture
    if mixture is None or mixture.limit is None:
        return shape
    return replace(shape, mixture=replace(mixture, limit=1e9))


MUTANTS = (
    Mutant(
        "mxfp4_nibble_order_swapped",
        "Reads the high nibble of each byte of MXFP4 first.",
        ("20",),
        with_rooms(unpack=reading(nibbles_swapped)),
        change_spec=with_mxfp4,
    ),
    Mutant(
        "mxfp4_scale_of_a_neighbour",
        "Scales each group of MXFP4 by the scale of the group before it.",
        ("20",),
        with_rooms(unpack=reading(scale_of_the_group_before)),
        change_spec=with_mxfp4,
    ),
    Mutant(
        "mxfp4_scales_halved",
        "Takes 128 and not 127 off the exponent of a scale of MXFP4.",
        ("20",),
        with_rooms(unpack=reading(bias_of_the_scale_is_128)),
        change_spec=with_mxfp4,
    ),
    Mutant(
        "published_gate_and_up_swapped",
        "Takes the odd rows of gpt-oss's published bytes for the gate.",
        ("33",),
        with_trainer(PublishedHalvesSwapped),
        change_spec=with_mxfp4,
    ),
    Mutant(
        "published_base_requantized",
        "Decodes gpt-oss's published bytes and packs them in NF4.",
        ("33",),
        with_trainer(PublishedBaseRequantized),
        change_spec=with_mxfp4,
    ),
    Mutant(
        "rest_of_published_base_requantized",
        "Packs the attention of a published gpt-oss, which is stored in 16 bits.",
        ("33",),
        with_trainer(RestOfPublishedRequantized),
        change_spec=with_mxfp4,
    ),
    Mutant("attention_sinks_forgotten", "Leaves out attention's sinks.", ("33",), with_rooms(model=sinks_forgotten)),
    Mutant(
        "biases_of_experts_forgotten",
        "Leaves out the biases of experts.",
        ("33",),
        with_rooms(model=expert_biases_forgotten),
    ),
    Mutant("gates_not_limited", "Ignores swiglu_limit.", ("33",), read_as(gates_without_limit)),
)
