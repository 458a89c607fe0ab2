"""LoRA dropout as a pure function of (key, module, micro-batch): a resumed run draws the masks of the first run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from qlora_hal.contract.values import AdapterConfig, LinearShape
from qlora_hal_conformance.oracle.arrays import Float64

_64_BITS = 2**64 - 1


def draw_masks(
    config: AdapterConfig,
    linear_modules: Mapping[str, LinearShape],
    rows_and_time: tuple[int, int],
    key: int,
    micro_batch: int,
) -> dict[str, Float64]:
    """Module path -> `[batch, time, in]`: 0 with probability p, else 1/(1-p). Empty when the rate is 0.

    Philox (Salmon et al. 2011) keyed by `key` and the module's name; the micro-batch is the counter's highest word.
    """
    if config.dropout == 0.0:
        return {}
    return {
        module: _mask((*rows_and_time, linear_modules[module].inputs), config.dropout, key, module, micro_batch)
        for module in config.target_modules
    }


def _mask(shape: tuple[int, ...], rate: float, key: int, module: str, micro_batch: int) -> Float64:
    name_hash = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "little")
    stream = np.random.Philox(
        key=np.array([key & _64_BITS, name_hash], np.uint64), counter=np.array([0, 0, 0, micro_batch], np.uint64)
    )
    uniform = (stream.random_raw(int(np.prod(shape))) >> np.uint64(40)).astype(np.float64) * 2.0**-24
    return np.where(uniform >= rate, 1.0 / (1.0 - rate), 0.0).reshape(shape)
