"""Experts' weights read and packed, one expert at a time: the 16-bit stack never stands whole in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.formats.catalogue import record_of
from qlora_hal.formats.gpt_oss import BLOCKS, SCALES
from qlora_hal_backends.torch_family.base_weights import BaseWeight, quantize
from qlora_hal_backends.torch_family.experts.block import RoutedExperts
from qlora_hal_backends.torch_family.experts.stacked_weights import stacked
from qlora_hal_backends.torch_family.experts.stored import HALVES, ExpertNames, StoredProjection
from qlora_hal_backends.torch_family.microscaling import Mxfp4Weight

if TYPE_CHECKING:
    from qlora_hal_backends.torch_family.loading import Checkpoint

Read = Callable[[str], BaseWeight]


def pack_experts(
    names: ExpertNames,
    checkpoint: Checkpoint,
    read_layer: Read,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Fill every stack. `read_layer` gives the packed weight of one layer of the files. A joined tensor of a checkpoint
    that is quantized already was left out of that, and stays as it is stored. Raises ModelError QH-M52 for numbers that
    are not finite."""
    for (path, half), projection in names.projections.items():
        block = names.blocks[path]
        stack = getattr(block, half)
        if projection.is_packed:
            weights = [
                _of_packed(checkpoint, block, projection.joined, half, number, dtype, device)
                for number in range(block.experts)
            ]
        elif projection.joined:
            wanted = quantization if not checkpoint.is_packed else Quantization(WeightFormat.NONE)
            weights = [
                _of_joined(checkpoint, block, projection, half, number, wanted, dtype, device)
                for number in range(block.experts)
            ]
        else:
            weights = [read_layer(projection.paths[number]) for number in range(block.experts)]
        stack.base = stacked(weights)


def _of_packed(
    checkpoint: Checkpoint,
    block: RoutedExperts,
    joined: str,
    half: str,
    number: int,
    dtype: torch.dtype,
    device: torch.device,
) -> BaseWeight:
    """The bytes as they are, a row of them for each output: in turns, as the 16-bit columns are."""
    packed, scales = (checkpoint.take_bytes_of_part(joined + part, number, device) for part in (BLOCKS, SCALES))
    if half in HALVES:
        place = HALVES.index(half)
        packed, scales = packed[place::2], scales[place::2]
    weight = Mxfp4Weight(packed.flatten(1), scales.contiguous(), dtype)
    return checkpoint.numbers_in(weight, joined)


def _of_joined(
    checkpoint: Checkpoint,
    block: RoutedExperts,
    projection: StoredProjection,
    half: str,
    number: int,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
) -> BaseWeight:
    name = projection.joined if checkpoint.has(projection.joined) else f"{projection.joined}.weight"
    stored = checkpoint.take_part(name, number, device, dtype)
    columns = stored if block.is_transposed else stored.t()  # [in, out]
    if half in HALVES:
        columns = block.halves(columns)[HALVES.index(half)]
    record = record_of(quantization.weight_format)
    record.require_whole_blocks(projection.joined, columns.shape[0], quantization.block_size, checkpoint.where)
    return quantize(columns.t().contiguous(), quantization, dtype)
