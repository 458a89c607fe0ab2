"""Honest backends that compute in another order than the reference: each must pass the whole suite, in every dtype.

A device is free to sum in chunks, from the end, or in a library's own order, and autocast to keep in float32 what the
reference rounds. A suite that fails one of these judges taste. They are written down as mutants that nothing may catch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlora_hal.contract.values import Batch
from qlora_hal_conformance.reference_backend.rounding import ROUNDINGS, Round, RoundedArithmetic, to_float32
from qlora_hal_conformance.reference_backend.step import MasksOf, WindowResult, window_gradient
from qlora_hal_oracle import Arithmetic, OracleLlama
from qlora_hal_oracle.arrays import Float32, Float64

from .registry import Mutant, with_rooms

CHUNK = 16
"""Terms that are summed before they are added to the sum: a tensor core's, and less than any layer's inputs."""


class SummedInChunks(RoundedArithmetic):
    """Float32 sums of `CHUNK` terms, added to a float32 accumulator one after another."""

    def product(self, name: str, left: Float64, right: Float64) -> Float64:
        first, second = _narrow(left), _narrow(right)
        total = np.zeros((*np.broadcast_shapes(first.shape[:-2], second.shape[:-2]), first.shape[-2], second.shape[-1]))
        accumulator: Float32 = total.astype(np.float32)
        for start in range(0, first.shape[-1], CHUNK):
            accumulator = accumulator + first[..., start : start + CHUNK] @ second[..., start : start + CHUNK, :]
        return accumulator.astype(np.float64)


class SummedFromTheEnd(RoundedArithmetic):
    """Float32 sums, one term after another, the last one first."""

    def product(self, name: str, left: Float64, right: Float64) -> Float64:
        first, second = _narrow(left), _narrow(right)
        total: Float32 = np.zeros((1, 1), dtype=np.float32)
        for place in reversed(range(first.shape[-1])):
            total = total + first[..., :, place, None] * second[..., None, place, :]
        shape = (*np.broadcast_shapes(first.shape[:-2], second.shape[:-2]), first.shape[-2], second.shape[-1])
        return np.broadcast_to(total, shape).astype(np.float64)


class SummedByBlas(RoundedArithmetic):
    """Float32 products in whatever order the machine's BLAS sums."""

    def product(self, name: str, left: Float64, right: Float64) -> Float64:
        return (_narrow(left) @ _narrow(right)).astype(np.float64)


class Transposed(RoundedArithmetic):
    """(right^T left^T)^T: the same product, blocked along its other side."""

    def product(self, name: str, left: Float64, right: Float64) -> Float64:
        turned = np.swapaxes(_narrow(right), -1, -2) @ np.swapaxes(_narrow(left), -1, -2)
        return np.swapaxes(turned, -1, -2).astype(np.float64)


class Autocast(RoundedArithmetic):
    """As torch's autocast: products of rounded operands, everything between them in float32."""

    def __init__(self, rounded: Round) -> None:
        super().__init__(to_float32)
        self._operand = rounded

    def product(self, name: str, left: Float64, right: Float64) -> Float64:
        product: Float64 = (_narrow(self._operand(left)) @ _narrow(self._operand(right))).astype(np.float64)
        return product


def _narrow(values: Float64) -> Float32:
    return np.ascontiguousarray(values, dtype=np.float32)


def summed_in_chunks(dtype: str) -> Arithmetic:
    return SummedInChunks(ROUNDINGS[dtype])


def summed_from_the_end(dtype: str) -> Arithmetic:
    return SummedFromTheEnd(ROUNDINGS[dtype])


def summed_by_blas(dtype: str) -> Arithmetic:
    return SummedByBlas(ROUNDINGS[dtype])


def transposed(dtype: str) -> Arithmetic:
    return Transposed(ROUNDINGS[dtype])


def autocast(dtype: str) -> Arithmetic:
    return Autocast(ROUNDINGS[dtype])


def last_micro_batch_first(
    model: OracleLlama, window: Sequence[Batch], divisor: float, masks_of: MasksOf, arithmetic: Arithmetic
) -> WindowResult:
    return window_gradient(model, window[::-1], divisor, masks_of, arithmetic)


VARIATIONS = (
    Mutant("honest_in_chunks", "Sums products in chunks of 16.", (), with_rooms(arithmetic=summed_in_chunks)),
    Mutant("honest_from_the_end", "Sums products from the end.", (), with_rooms(arithmetic=summed_from_the_end)),
    Mutant("honest_by_blas", "Sums products in float32 by BLAS.", (), with_rooms(arithmetic=summed_by_blas)),
    Mutant("honest_transposed", "Computes transposed products.", (), with_rooms(arithmetic=transposed)),
    Mutant("honest_autocast", "Rounds the operands of products alone.", (), with_rooms(arithmetic=autocast)),
    Mutant(
        "honest_last_micro_batch_first",
        "Adds up the micro-batches of a window from its end.",
        (),
        with_rooms(window_gradient=last_micro_batch_first),
    ),
)
