"""Array types of the oracle and the token batch it reads."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Float16 = npt.NDArray[np.float16]
Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Int8 = npt.NDArray[np.int8]
UInt32 = npt.NDArray[np.uint32]
UInt8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
AnyFloat = npt.NDArray[np.floating]

IGNORE_LABEL = -100
PADDING_SEGMENT = 0


class TokenBatch(Protocol):
    """Arrays `[batch, time]`; `qlora_hal.contract.values.Batch` is one. The oracle needs these names."""

    @property
    def input_ids(self) -> Int32: ...
    @property
    def labels(self) -> Int32: ...
    @property
    def position_ids(self) -> Int32: ...
    @property
    def segment_ids(self) -> Int32: ...
    @property
    def weights(self) -> Float32 | None: ...
