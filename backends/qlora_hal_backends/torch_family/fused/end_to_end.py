"""Batches without their padding: all samples of a batch end to end in one row, so that a layer's rows are its tokens.

Only the host's arrays are touched. Order is kept, so a loss reads its labels, and each sample its positions, as before;
every sample begins with a token that carries no loss, so none is scored against its neighbour.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qlora_hal.contract.values import PADDING_SEGMENT, Batch, Int32

WORTH_IT = 1 / 16
"""Share of padding from which rows of unequal length are laid end to end. Attention over a rectangle has faster kernels
than over lengths, and takes that much of a step over long rows."""


def without_padding(batch: Batch) -> Batch:
    """The batch as one row `[1, M]`, M its real tokens; as it is where its padding is too little to matter. `rows` is
    left out: dropout's words are made for the batch as the contract has it."""
    is_real = kept_places(batch)
    if is_real is None:
        return batch
    return Batch(
        input_ids=batch.input_ids[is_real][None],
        labels=batch.labels[is_real][None],
        position_ids=batch.position_ids[is_real][None],
        segment_ids=_numbered(batch.segment_ids)[is_real][None],
        weights=None if batch.weights is None else batch.weights[is_real][None],
    )


def kept_places(batch: Batch) -> npt.NDArray[np.bool_] | None:
    """Which places `[batch, time]` `without_padding` takes; None where it leaves a batch as it is."""
    is_real: npt.NDArray[np.bool_] = batch.segment_ids != PADDING_SEGMENT
    real = int(is_real.sum())
    lengths = is_real.sum(axis=1)
    is_worth_it = batch.is_packed or (lengths == lengths[0]).all() or real <= (1 - WORTH_IT) * is_real.size
    return is_real if is_worth_it and real not in (0, is_real.size) else None


def _numbered(segment_ids: Int32) -> Int32:
    """Segments 1..k of each row numbered through the batch."""
    of_row = segment_ids.max(axis=1)
    before: Int32 = (np.cumsum(of_row) - of_row).astype(np.int32)
    return segment_ids + before[:, None]
