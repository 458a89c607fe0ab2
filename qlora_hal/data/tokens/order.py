"""Random orders that are a pure function of (seed, purpose, epoch), on every platform and with every NumPy release.

Philox4x64 (Salmon et al. 2011) is a counter-based generator: its raw stream is defined by its key. NumPy promises that
stream for good, but not what `Generator.permutation` makes of it (NEP 19), so the order is the rank of raw draws.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Purpose(IntEnum):
    """What a stream is for; two purposes never share draws."""

    ROWS = 1
    WINDOWS = 2
    PACKING = 3
    HOLD_OUT = 4
    MIXTURE = 5


def permutation(count: int, seed: int, purpose: Purpose, epoch: int = 0) -> npt.NDArray[np.int64]:
    """The numbers 0 to `count` - 1 in the order that belongs to (seed, purpose, epoch)."""
    key = np.array([seed & (2**64 - 1), (int(purpose) << 48) | epoch], np.uint64)
    draws = np.random.Philox(key=key).random_raw(count)
    return np.argsort(np.asarray(draws, np.uint64), kind="stable").astype(np.int64, copy=False)
