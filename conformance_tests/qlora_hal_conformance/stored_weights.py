"""What a backend shows of its stored weights beside what the format allows, by the codec of its record.

A stack of experts is judged expert by expert: each is stored as a linear layer of its own would be.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qlora_hal.formats.catalogue import record_of
from qlora_hal.formats.record import FormatRecord
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.fixtures import Opened
from qlora_hal_conformance.tolerances import decoded_exactly, format_error, solver_error
from qlora_hal_oracle import round_to_bfloat16
from qlora_hal_oracle.arrays import Float32


def judge_stored(ready: Opened, judging: Judge) -> None:
    """Every module of a quantized checkpoint shows just what its codes decode to."""
    assert ready.model.stored is not None
    for module, expected in ready.model.stored.items():
        found = ready.trainer.dequantized_weight(module)
        judging.within(module, found, expected, decoded_exactly(expected, ready.dtype))


def judge_format_error(module: str, ready: Opened, judging: Judge) -> None:
    """The weight that a module shows is no further from the one on disk than its format is."""
    record, storage = record_in(ready), ready.quantization
    for name, weight, decoded in each_matrix(module, ready):
        if record.calibrated:
            _judge_calibrated(name, ready, weight, decoded, judging)
            continue
        bound = record.codec.error_bound(weight, storage.block_size, storage.double_quant)
        assert bound is not None, f"{record.name} is not calibrated, and its codec has no bound"
        judging.within(name, decoded, weight, format_error(bound, weight, ready.dtype))


def each_matrix(module: str, ready: Opened) -> Iterator[tuple[str, Float32, Float32]]:
    """(name, weight to store, weight shown), both `[out, in]`: one of a linear layer, one of each expert of a stack."""
    weight, decoded = weight_to_store(module, ready), ready.trainer.dequantized_weight(module)
    assert decoded.shape == weight.shape, f"{module} is {decoded.shape}, {weight.shape} is stored"
    if weight.ndim == 2:
        yield module, weight, decoded
        return
    for expert, (one, other) in enumerate(zip(weight, decoded, strict=True)):
        yield f"{module}, expert {expert}", one, other


def record_in(ready: Opened) -> FormatRecord:
    return record_of(ready.quantization.weight_format)


def weight_to_store(module: str, ready: Opened) -> Float32:
    """What there is to quantize: the weight in the compute dtype, as a backend may read it."""
    return in_dtype(ready.model.tensors[f"{module}.weight"], ready.dtype)


def in_dtype(values: Float32, dtype: str) -> Float32:
    return round_to_bfloat16(values) if dtype == "bfloat16" else values.astype(dtype).astype(np.float32)


def _judge_calibrated(module: str, ready: Opened, weight: Float32, decoded: Float32, judging: Judge) -> None:
    """Which code the solver picks is its own affair; that each group has no more levels than there are codes, and that
    the whole is no further from the weights than one step in the mean, is not."""
    size = ready.quantization.block_size or weight.shape[1]
    codes = 2 ** record_in(ready).bits
    for start in range(0, weight.shape[1], size):
        group, original = decoded[:, start : start + size].astype(np.float64), weight[:, start : start + size]
        error = np.sqrt(((group - original) ** 2).mean(axis=1))
        judging.within(f"mean error of {module}", error, np.zeros_like(error), solver_error(original, codes))
        levels = max(len(np.unique(row)) for row in group)
        assert levels <= codes, f"{module} has {levels} levels in a group of {codes} codes"
