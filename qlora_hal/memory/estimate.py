"""How many bytes a run will need at its peak: pure arithmetic over header facts, no weight loaded.

What depends on a backend's code stands in `MemoryConstants`, data that a backend may replace. The parts
are added although not all of them are alive at one moment, so the total leans to the safe side.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.memory_constants import HEAP_BLOCK_BYTES, MemoryConstants
from qlora_hal.contract.values import LinearShape, MemoryEstimate
from qlora_hal.formats.catalogue import record_of
from qlora_hal.formats.packed_modules import PackedModules
from qlora_hal.model.linear_shapes import layer_of
from qlora_hal.model.shape import DecoderShape, decoder_shape
from qlora_hal.model.stored_dtypes import FLOATING_DTYPES

if TYPE_CHECKING:
    from qlora_hal.contract.values import ComputeDtype
    from qlora_hal.model.facts import ModelFacts

DTYPE_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
SMALLEST_8BIT_STATE = 4096
"""bitsandbytes keeps the moments of smaller tensors in float32 (`min_8bit_size`)."""

SLOTS = 2
"""Layers that are whole on a device whose base is spread or on the host: one computes, one is on its way."""

HOLED_LAYERS = 8
"""Of so many layers' activations the heap's holes are counted at most, recomputed or not: backward runs in a thread
with a heap of its own, so what forward freed is not reused there. Measured with up to eight layers."""

Targets = Mapping[str, LinearShape]


def estimate(
    facts: ModelFacts,
    *,
    weight_format: WeightFormat | str,
    block_size: int | None,
    double_quant: bool,
    compute_dtype: ComputeDtype,
    r: int,
    targets: Targets,
    optimizer: str,
    batch_size: int,
    sequence_length: int,
    gradient_checkpointing: bool,
    constants: MemoryConstants | None = None,
) -> MemoryEstimate:
    """Bytes at the peak of training one micro-batch of `batch_size` rows of `sequence_length` tokens.

    `targets` are the modules that carry LoRA, path -> (in, out). `optimizer` is one of `training.optim`. Raises
    BackendNotFoundError QH-E82 for an unknown weight format.
    """
    constants = constants or MemoryConstants()
    weight_format = WeightFormat(weight_format)
    compute_bytes = DTYPE_BYTES[compute_dtype]
    shape = decoder_shape(facts)
    tokens = batch_size * sequence_length
    adapter_weights = adapter_parameters(targets, r)
    largest = max((linear.parameters for linear in facts.linear_modules.values()), default=0)
    is_quantized = weight_format is not WeightFormat.NONE
    logits = _logits_bytes(facts.vocabulary_size, tokens, compute_bytes, constants)
    decoded = max((_decoded_at_once(linear, constants) for linear in facts.linear_modules.values()), default=0)
    dequantized = int(constants.dequantized_copies * decoded * compute_bytes) if is_quantized else 0
    kept, working = _activation_bytes(
        shape, batch_size, sequence_length, r * len(targets), compute_bytes, gradient_checkpointing, constants
    )
    # Logits are gone before a layer is differentiated.
    activations = kept + max(working - logits, 0)
    largest_block = tokens * max(shape.feed_forward, shape.hidden) * compute_bytes
    holes = 0
    if constants.heap_holes and largest_block < HEAP_BLOCK_BYTES:
        few = replace(shape, layers=min(shape.layers, HOLED_LAYERS))
        ranks = r * len(targets) * few.layers // max(shape.layers, 1)
        left, _ = _activation_bytes(few, batch_size, sequence_length, ranks, compute_bytes, False, constants)
        holes = int(constants.heap_holes * (left + logits))
    workspace = constants.workspace_bytes + dequantized + holes
    loading = 0
    if largest * 4 < HEAP_BLOCK_BYTES:
        loading = int(constants.loading_holes * sum(linear.parameters for linear in facts.linear_modules.values()))
    return MemoryEstimate(
        weights=weight_bytes(facts, weight_format, block_size, double_quant, compute_dtype),
        adapter=constants.master_bytes * adapter_weights,
        gradients=constants.gradient_bytes * adapter_weights,
        optimizer=optimizer_bytes(targets, r, optimizer),
        activations=activations,
        logits=logits,
        workspace=max(workspace, loading - activations - logits),
        runtime=constants.runtime_bytes,
        relative_error=constants.relative_error,
        loading=loading,
    )


def spread_over(memory: MemoryEstimate, facts: ModelFacts, compute_dtype: ComputeDtype, devices: int) -> MemoryEstimate:
    """The same on each of so many devices that hold the decoder layers' packed weights together: a share of them, and
    two layers whole, the one that computes and the one that is on its way. All else every device has."""
    layers = LayerBytes.of(memory.weights, facts, compute_dtype)
    return replace(memory, weights=memory.weights - layers.all + layers.all // devices + layers.in_slots)


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Packed weights of `all` decoder layers, and of the two that are whole on a device while the others are elsewhere:
    `in_slots` of the largest layer, which in some mixtures is larger than the lowest ones."""

    all: int
    in_slots: int

    @classmethod
    def of(cls, weights: int, facts: ModelFacts, compute_dtype: ComputeDtype) -> LayerBytes:
        """`weights` are the bytes of the whole base. Linear layers that are in no decoder layer stay on the device."""
        numbers: Counter[str] = Counter()
        for module, linear in facts.linear_modules.items():
            numbers[layer_of(module)] += linear.parameters
        linear_weights = numbers.total()
        rest = (facts.parameter_count - linear_weights - _tied_head_weights(facts)) * DTYPE_BYTES[compute_dtype]
        packed = max(weights - rest, 0)
        del numbers[""]
        in_slots = min(SLOTS, len(numbers)) * max(numbers.values(), default=0)
        return cls(*(packed * part // max(linear_weights, 1) for part in (numbers.total(), in_slots)))


def adapter_parameters(targets: Targets, r: int) -> int:
    """Trainable weights: A is [r, in], B is [out, r]."""
    return sum(r * linear.experts * (linear.inputs + linear.outputs) for linear in targets.values())


def optimizer_bytes(targets: Targets, r: int, optimizer: str) -> int:
    """Two moments for each adapter weight: 4 bytes each, or 1 byte each and a float32 scale to 256 of them.

    Paged states may leave the device; they count in full, because they must fit somewhere.
    """
    sizes = [r * linear.experts * side for linear in targets.values() for side in (linear.inputs, linear.outputs)]
    if not optimizer.endswith("8bit"):
        return 8 * sum(sizes)
    small = sum(size for size in sizes if size < SMALLEST_8BIT_STATE)
    large = [size for size in sizes if size >= SMALLEST_8BIT_STATE]
    return 8 * small + sum(2 * size + 2 * 4 * math.ceil(size / 256) for size in large)


# weights ------------------------------------------------------------------------------------------------------------
def weight_bytes(
    facts: ModelFacts,
    weight_format: WeightFormat,
    block_size: int | None,
    double_quant: bool,
    compute_dtype: ComputeDtype,
) -> int:
    """Bytes of the frozen base: linear layers in `weight_format`, all else in the compute dtype.

    A checkpoint stored in this format already is counted as it is stored.
    """
    compute_bytes = DTYPE_BYTES[compute_dtype]
    if facts.prequantized is not None and facts.prequantized.weight_format == weight_format.value:
        return _stored_bytes(facts, compute_bytes)
    linear_weights = sum(linear.parameters for linear in facts.linear_modules.values())
    rest = (facts.parameter_count - linear_weights - _tied_head_weights(facts)) * compute_bytes
    record = record_of(weight_format)
    return rest + sum(
        record.bytes_of(linear, block_size, double_quant, compute_bytes) for linear in facts.linear_modules.values()
    )


def linear_bytes(
    inputs: int,
    outputs: int,
    weight_format: WeightFormat,
    block_size: int | None = None,
    double_quant: bool = False,
    compute_bytes: int = 2,
) -> int:
    """Bytes of one linear layer's weight with its scales, by the format's record."""
    shape = LinearShape(inputs, outputs)
    return record_of(weight_format).bytes_of(shape, block_size, double_quant, compute_bytes)


def _stored_bytes(facts: ModelFacts, compute_bytes: int) -> int:
    # Not by their dtypes alone: sharded trainers have codes stored under the name of a float.
    packed = PackedModules.of(facts).modules
    total = 0
    for name, tensor in facts.tensors.items():
        belongs = tensor.dtype not in FLOATING_DTYPES or any(prefix in packed for prefix in _prefixes(name))
        total += tensor.byte_count if belongs else math.prod(tensor.shape) * compute_bytes
    return total


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _decoded_at_once(linear: LinearShape, constants: MemoryConstants) -> int:
    """Weights of a layer that stand decoded together; of one expert at least."""
    most = constants.dequantized_of_a_stack
    if linear.experts == 1 or most is None:
        return linear.parameters
    return min(linear.parameters, max(most, linear.parameters // linear.experts))


def _tied_head_weights(facts: ModelFacts) -> int:
    """Weights of a head that is stored although it is the embedding."""
    head = facts.tensors.get("lm_head.weight")
    return math.prod(head.shape) if head is not None and facts.config.get("tie_word_embeddings") is True else 0


# activations --------------------------------------------------------------------------------------------------------
def _activation_bytes(
    shape: DecoderShape,
    batch_size: int,
    sequence_length: int,
    adapter_ranks: int,
    compute_bytes: int,
    gradient_checkpointing: bool,
    constants: MemoryConstants,
) -> tuple[int, int]:
    """What is kept for backward, and what is alive beyond it while one layer is differentiated: with recomputation that
    is all of the layer."""
    tokens = batch_size * sequence_length
    widths = constants.hidden_copies * shape.hidden + constants.feed_forward_copies * shape.feed_forward
    widths += min(constants.hidden_copies, 2.0) * (shape.query - shape.hidden)
    widths += constants.rotated_copies * (shape.query + shape.key_value)
    # Each of a token's experts has a row of its own.
    widths += shape.routed * (
        constants.routed_hidden_copies * shape.hidden + constants.feed_forward_copies * shape.routed_width
    )
    one_layer = tokens * (widths + 2 * shape.key_value) * compute_bytes
    one_layer += constants.attention_scores_kept * batch_size * shape.heads * sequence_length**2 * compute_bytes
    one_layer += tokens * adapter_ranks * compute_bytes / max(shape.layers, 1)
    working = int(constants.working_layers * one_layer)
    tile = tokens if constants.feed_forward_tile is None else min(tokens, constants.feed_forward_tile)
    in_a_tile = constants.working_feed_forward_copies * shape.feed_forward + shape.routed * (
        constants.working_routed_hidden_copies * shape.hidden + constants.working_routed_copies * shape.routed_width
    )
    working += int(tile * in_a_tile * compute_bytes)
    if gradient_checkpointing:
        inputs = shape.layers if constants.recomputed_inputs is None else min(shape.layers, constants.recomputed_inputs)
        of_a_token = inputs * shape.hidden
        if sequence_length >= constants.attended_from:
            of_a_token += int(constants.attended_copies * shape.query)
        return tokens * of_a_token * compute_bytes, int(one_layer) + working
    return int(shape.layers * one_layer), working


def _logits_bytes(vocabulary_size: int, tokens: int, compute_bytes: int, constants: MemoryConstants) -> int:
    """Logits in the compute dtype, a float32 copy when that is another dtype, and the float32 gradient."""
    rows = tokens if constants.cross_entropy_rows is None else min(tokens, constants.cross_entropy_rows)
    if constants.cross_entropy_logits is not None:
        rows = min(rows, max(constants.cross_entropy_logits // max(vocabulary_size, 1), 1))
    per_logit = constants.logit_bytes or compute_bytes + (4 if compute_bytes != 4 else 0) + 4
    return rows * vocabulary_size * per_logit
