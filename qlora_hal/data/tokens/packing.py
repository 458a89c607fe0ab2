"""Several rows in one sequence, so that little of a batch is padding."""

from __future__ import annotations

import numpy as np

from qlora_hal.data.tokens.order import Purpose, permutation
from qlora_hal.data.tokens.token_rows import Int64


def packs_of(rows: Int64, lengths: Int64, capacity: int, *, seed: int, shuffle: bool) -> list[list[int]]:
    """The rows of each sequence of a run; `lengths` are those of all rows, `rows` the ones of one source."""
    order = permutation(len(rows), seed, Purpose.PACKING) if shuffle else np.arange(len(rows))
    packs = [rows[places].tolist() for places in pack(lengths[rows], capacity, order)]
    return packs if shuffle else sorted(map(sorted, packs))


def pack(lengths: Int64, capacity: int, order: Int64) -> list[list[int]]:
    """Rows `[rows]` put together by best-fit-decreasing: the longest first, each into the fullest sequence that has
    room. At most 11/9 of the least possible number of sequences plus 4 (Johnson, Demers, Ullman, Garey and Graham 1974;
    the 6/9 of Dosa 2007 is proved for first-fit-decreasing). `order` decides among rows of the same length. Every row
    occurs exactly once; a row above the capacity is alone.
    """
    longest_first = order[np.argsort(-lengths[order], kind="stable")]
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by free room
    rooms = 0  # bit r is set when a pack with r free places exists
    for row, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        fitting = rooms >> length if length <= capacity else 0
        if not fitting:
            packs.append([row])
            which, room = len(packs) - 1, max(0, capacity - length)
        else:
            found = length + ((fitting & -fitting).bit_length() - 1)
            which, room = with_room[found].pop(), found - length
            if not with_room[found]:
                rooms &= ~(1 << found)
            packs[which].append(row)
        if room:
            with_room[room].append(which)
            rooms |= 1 << room
    return packs
