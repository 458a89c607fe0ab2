"""The longest sample that a backend computes as config.json asks for it.

Where a model library leaves out a sliding window, samples within the window are computed right and longer ones are not.
They are refused when the lengths of all rows are known, and not when the first of them is met, hours into a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qlora_hal.errors import UnsupportedFeatureError

if TYPE_CHECKING:
    from qlora_hal.contract.values import Batch


@dataclass(frozen=True, slots=True)
class LongestSample:
    """Of `tokens`. `bound` says in words what longer ones would ignore: `the sliding window of 16 tokens of ...`."""

    tokens: int
    bound: str

    def check(self, longest: int) -> None:
        """Raises UnsupportedFeatureError QH-B61 where a sample has more tokens."""
        if longest > self.tokens:
            raise UnsupportedFeatureError(
                "QH-B61",
                f"A row of {longest} tokens is longer than {self.bound}.",
                where="data.max_seq_length",
                fix=f"Set data.max_seq_length to at most {self.tokens}, or choose another backend.",
                context={"longest": longest, "most": self.tokens},
            )

    def check_batch(self, batch: Batch) -> None:
        """The same for the samples of a batch, without their padding."""
        self.check(max((int(np.bincount(row)[1:].max(initial=0)) for row in batch.segment_ids), default=0))
