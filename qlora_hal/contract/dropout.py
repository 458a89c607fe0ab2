"""LoRA dropout as the contract means it: which numbers an adapter's input keeps, the same bits on every backend.

A mask is a function of (seed, step, module, row, position, channel) and of nothing else: not of how a window is cut
into micro-batches, nor of ranks, devices or generators. So a window that is split because memory ran out, another
micro-batch size, a resumed run and another backend all drop the same numbers.

Each number has a 32-bit word, `mix(token word + channel word)` modulo 2^32, and is dropped where the word's upper 31
bits lie below `rate` * 2^31. The token word comes from the step's key, the row's place in the global window and the
position; the channel word from the module's path and the channel. Both are tables, so a backend computes one addition
and one `mix` for each number, in 32-bit integers that wrap around. `mix` is the finalizer of MurmurHash3 (Appleby
2011): a bijection in which each input bit changes each output bit with probability close to one half.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from qlora_hal.contract.values import Batch, Int32
from qlora_hal.errors import BackendContractError

UInt32 = npt.NDArray[np.uint32]

MASKS = 2
"""Which masks a checkpoint was trained with: contract 1 drew them by micro-batch, each backend its own."""

FIRST_FACTOR, SECOND_FACTOR = 0x85EBCA6B, 0xC2B2AE35
SHIFTS = (16, 13, 16)
"""`mix(z)`: z ^= z >> 16; z *= FIRST_FACTOR; z ^= z >> 13; z *= SECOND_FACTOR; z ^= z >> 16."""

_ROW_STEP, _POSITION_STEP = np.uint32(0x9E3779B9), np.uint32(0x7FEB352D)


def token_words(key: int, rows: Int32, time: int) -> UInt32:
    """One word `[batch, time]` for each place. `key` is `StepSettings.dropout_key`, `rows` is `Batch.rows`."""
    low, high = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32 & 0xFFFFFFFF)
    with np.errstate(over="ignore"):
        of_row = mix(mix(rows.astype(np.uint32) * _ROW_STEP + low) ^ high)
        positions = mix(np.arange(time, dtype=np.uint32) * _POSITION_STEP + np.uint32(1))
        return mix(of_row[:, None] + positions[None, :])


def channel_words(module: str, channels: int) -> UInt32:
    """One word `[channels]` for each input of a module, which is known by its full path; the same in every step."""
    digest = hashlib.sha256(module.encode("utf-8")).digest()
    first, second = (np.uint32(int.from_bytes(digest[at : at + 4], "little")) for at in (0, 4))
    with np.errstate(over="ignore"):
        return mix(mix(np.arange(channels, dtype=np.uint32) + first) ^ second)


def mix(words: UInt32) -> UInt32:
    """The finalizer of MurmurHash3, elementwise."""
    with np.errstate(over="ignore"):
        words = (words ^ (words >> np.uint32(SHIFTS[0]))) * np.uint32(FIRST_FACTOR)
        words = (words ^ (words >> np.uint32(SHIFTS[1]))) * np.uint32(SECOND_FACTOR)
        return words ^ (words >> np.uint32(SHIFTS[2]))


def drop_below(rate: float) -> int:
    """A number is dropped where `mix(...) >> 1` is below this. 31 bits, so that signed integers compare the same."""
    return min(round(rate * 2**31), 2**31 - 1)


def kept(key: int, module: str, rows: Int32, time: int, channels: int, rate: float) -> npt.NDArray[np.bool_]:
    """The mask `[batch, time, channels]` in NumPy: what every backend must compute. What is kept is multiplied with
    1 / (1 - rate)."""
    with np.errstate(over="ignore"):
        words = mix(token_words(key, rows, time)[:, :, None] + channel_words(module, channels)[None, None, :])
    return (words >> np.uint32(1)) >= drop_below(rate)


def rows_of(batch: Batch) -> Int32:
    """`Batch.rows`, which a step with dropout needs. Raises BackendContractError QH-B02 for a batch without them."""
    if batch.rows is None:
        raise BackendContractError(
            "QH-B02",
            "A batch without rows was given to a step with LoRA dropout.",
            fix="Set Batch.rows to the place of each row in the global window; this is a bug of the caller.",
        )
    if batch.rows.shape != (len(batch.input_ids),):
        raise BackendContractError(
            "QH-B02",
            f"Batch.rows has shape {list(batch.rows.shape)} for {len(batch.input_ids)} rows.",
            fix="Give the place of each row in the global window; this is a bug of the caller.",
        )
    return batch.rows
