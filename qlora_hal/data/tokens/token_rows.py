"""Rows of tokens on their way to the store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qlora_hal.contract.values import Int32

Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]
UInt64 = npt.NDArray[np.uint64]


@dataclass(slots=True)
class TokenRows:
    """Rows of tokens, one after the other: ids and mask `[tokens]`, the rest `[rows]`."""

    ids: Int32
    trained: UInt8
    lengths: Int64
    numbers: Int64
    digests: UInt64
