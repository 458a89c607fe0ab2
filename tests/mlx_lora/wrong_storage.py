"""This backend with one defect in how it stores weights. Tests only: a defect stays for the life of its process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from qlora_hal.contract.backend import Quantization
from qlora_hal_backends.mlx_lora import linear_weights
from qlora_hal_backends.mlx_lora.base_weights import BaseWeight, CodebookWeight, GroupedWeight, quantize
from qlora_hal_backends.mlx_lora.trainer import MLXLoRATrainer

Stored = Callable[[mx.array, Quantization, Any], BaseWeight]


def _opened(stored: Stored) -> MLXLoRATrainer:
    linear_weights.quantize = stored
    return MLXLoRATrainer()


def _without_biases(weight: mx.array, quantization: Quantization, dtype: Any) -> BaseWeight:
    honest = quantize(weight, quantization, dtype)
    if isinstance(honest, GroupedWeight) and honest.biases is not None:
        return replace(honest, biases=mx.zeros_like(honest.biases))
    return honest


def _always_in_groups_of_64(weight: mx.array, quantization: Quantization, dtype: Any) -> BaseWeight:
    fits = quantization.block_size in (32, 128) and weight.shape[1] % 64 == 0
    return quantize(weight, replace(quantization, block_size=64) if fits else quantization, dtype)


def _scale_codes_one_up(weight: mx.array, quantization: Quantization, dtype: Any) -> BaseWeight:
    honest = quantize(weight, quantization, dtype)
    if isinstance(honest, GroupedWeight) and honest.biases is None:
        return replace(honest, scales=honest.scales + 1)
    return honest


def _absmax_of_the_block_before(weight: mx.array, quantization: Quantization, dtype: Any) -> BaseWeight:
    honest = quantize(weight, quantization, dtype)
    if isinstance(honest, CodebookWeight) and isinstance(honest.weight.absmax, mx.array):
        return replace(honest, weight=replace(honest.weight, absmax=mx.roll(honest.weight.absmax, 1)))
    return honest


biases_dropped = partial(_opened, _without_biases)
group_size_ignored = partial(_opened, _always_in_groups_of_64)
scales_doubled = partial(_opened, _scale_codes_one_up)
absmax_of_a_neighbour = partial(_opened, _absmax_of_the_block_before)
