"""The rooms of the reference backend: each a function or class that a mutant replaces by a wrong one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_hal.contract.values import AdapterConfig, Batch, Int32, LinearShape, StepSettings
from qlora_hal_oracle import Arithmetic, Fp8Products, LlamaShape, LoraScale, OracleLlama
from qlora_hal_oracle.adamw import AdamWState
from qlora_hal_oracle.arrays import Float32, Float64

from . import dropout, ranks, rounding, step, storage
from .loading import Pack, Unpack

DrawMasks = Callable[[AdapterConfig, Mapping[str, LinearShape], Int32, int, int], Mapping[str, Float64]]
WindowGradient = Callable[[OracleLlama, Sequence[Batch], float, step.MasksOf, Arithmetic], step.WindowResult]
Clip = Callable[[dict[str, Float64], float, float | None], dict[str, Float64]]
Update = Callable[[dict[str, Float64], dict[str, Float64], AdamWState, StepSettings, Arithmetic], None]
MakeModel = Callable[[LlamaShape, Mapping[str, Float64], dict[str, Float64], LoraScale], OracleLlama]


def scale_of(config: AdapterConfig) -> LoraScale:
    """alpha / r, or alpha / sqrt(r) when rank-stabilized."""
    return LoraScale(config.alpha, config.r, config.use_rslora)


def unchanged(batch: Batch) -> Batch:
    """A batch as the core made it."""
    return batch


def float32_copy(tensor: Float64) -> Float32:
    """What crosses to the core: float32, and nobody else's memory."""
    return np.array(tensor, dtype=np.float32, order="C")


ROUND_ALL = Fp8Products()


@dataclass(frozen=True, slots=True)
class Rooms:
    """What the trainer is put together from. The defaults are honest.

    `read_batch` is what the model sees of a batch in training; `fp8` rounds the operands of products in 8-bit floats;
    `adapter_in` and `adapter_out` turn a tensor of the core into the backend's and back. `over_ranks`, `votes` and
    `gather` (of a spread base) do nothing with one rank.
    """

    pack: Pack = storage.pack
    unpack: Unpack = storage.unpack
    arithmetic: Callable[[str], Arithmetic] = rounding.arithmetic_of
    model: MakeModel = OracleLlama
    fp8: Fp8Products = ROUND_ALL
    scale: Callable[[AdapterConfig], LoraScale] = scale_of
    read_batch: Callable[[Batch], Batch] = unchanged
    masks: DrawMasks = dropout.draw_masks
    window_gradient: WindowGradient = step.window_gradient
    clip: Clip = step.clip
    update: Update = step.update
    over_ranks: ranks.OverRanks = ranks.over_ranks
    votes: ranks.Votes = ranks.votes
    gather: ranks.Gather = ranks.gather
    adapter_in: Callable[[Float32], Float64] = lambda tensor: np.array(tensor, dtype=np.float64)
    adapter_out: Callable[[Float64], Float32] = float32_copy


HONEST = Rooms()
