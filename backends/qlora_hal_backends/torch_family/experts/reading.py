"""Experts' weights read and packed, one expert at a time: the 16-bit stack never stands whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    path: str,
    checkpoint: Checkpoint,
    read_layer: Read,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Fill the stacks of one block. `read_layer` gives the packed weight of one layer of the files. A joined tensor of
    a checkpoint that is quantized already was left out of that, and stays as it is stored. Raises ModelError QH-M52 for
    numbers that are not finite."""
    block = names.blocks[path]
    for halves in (HALVES, ("down",)):
        projections = [names.projections[path, half] for half in halves]
        packed: Iterable[list[BaseWeight]]
        if projections[0].joined:
            wanted = quantization if not checkpoint.is_packed else Quantization(WeightFormat.NONE)
            packed = _of_joined(checkpoint, block, projections[0], len(halves), wanted, dtype, device)
        else:
            packed = ([read_layer(each.paths[number]) for number in range(block.experts)] for each in projections)
        for half, weights in zip(halves, packed, strict=True):
            getattr(block, half).base = stacked(weights)


def _of_joined(
    checkpoint: Checkpoint,
    block: RoutedExperts,
    projection: StoredProjection,
    halves: int,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
) -> list[list[BaseWeight]]:
    """All experts of each half of one tensor, which is read once: a half is a fraction of each page of it."""
    packed: list[list[BaseWeight]] = [[] for _ in range(halves)]
    for number in range(block.experts):
        parts = (
            _packed_parts(checkpoint, projection.joined, number, halves, dtype, device)
            if projection.is_packed
            else _parts(checkpoint, block, projection.joined, number, halves, quantization, dtype, device)
        )
        for weights, part in zip(packed, parts, strict=True):
            weights.append(part)
    return packed


def _packed_parts(
    checkpoint: Checkpoint, joined: str, number: int, halves: int, dtype: torch.dtype, device: torch.device
) -> Iterator[BaseWeight]:
    """The bytes as they are, a row of them for each output: in turns, as the 16-bit columns are."""
    packed, scales = (checkpoint.take_bytes_of_part(joined + part, number, device) for part in (BLOCKS, SCALES))
    for place in range(halves):
        weight = Mxfp4Weight(packed[place::halves].flatten(1), scales[place::halves].contiguous(), dtype)
        yield checkpoint.numbers_in(weight, joined)


def _parts(
    checkpoint: Checkpoint,
    block: RoutedExperts,
    joined: str,
    number: int,
    halves: int,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[BaseWeight]:
    stored = checkpoint.take_part(joined if checkpoint.has(joined) else f"{joined}.weight", number, device, dtype)
    columns = stored if block.is_transposed else stored.t()  # [in, out]
    record = record_of(quantization.weight_format)
    record.require_whole_blocks(joined, columns.shape[0], quantization.block_size, checkpoint.where)
    for part in block.halves(columns) if halves > 1 else (columns,):
        yield quantize(part.t().contiguous(), quantization, dtype)
