"""What the ranks of section 85 are asked, and with which inputs: functions of the run's seed, so that every rank and
the judge draw the same, and nothing but a model's folder has to cross.

The names of questions are those under which `worlds` finds the answers. A question asked in a dtype has it before its
name: `float32/gradients`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import IGNORE_LABEL, Adapter, Batch, Float32, Float64
from qlora_hal_conformance.fixtures import placed
from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch, joined, rows_of, stream, total_tokens
from qlora_hal_conformance.tolerances import UpdateSettings
from qlora_hal_oracle import LlamaShape
from qlora_hal_oracle.codebooks import FOUR_BIT_CODEBOOKS, FourBitFormat
from qlora_hal_oracle.random_models import linear_shapes

SIZES = (2, 3)
"""How many ranks. With three no rank has a half, one is neither first nor last, and additions have an order."""
LENGTHS = (20, 9, 14, 5, 17, 7, 11)
"""Rows of the window. Dealt out by turns, they give the ranks unequal numbers of rows and of tokens."""
STEPS = (
    UpdateSettings(1e-2, weight_decay=0.1, max_grad_norm=1.0),
    UpdateSettings(1e-2, weight_decay=0.1, max_grad_norm=1e-2),
    UpdateSettings(1e-2, weight_decay=0.1, max_grad_norm=None),
)
"""Steps one after the other; the second is clipped whatever the gradient's size."""
NEXT_STEP = UpdateSettings(1e-2, weight_decay=0.1, max_grad_norm=1e-2)
DROP, DROPOUT_KEY = 0.25, 2**62 + 77
WEIGHTS = (0.0, 0.25, 1.0, -1.5, 3.0)
WEIGHTED_DENOMINATOR = 7.5
BEYOND_FLOAT32 = 1e41
BYTES, NIBBLES = 256, 16
EVERY_BYTE = "every byte"
"""The model of which the packed bytes of each module take all values."""

WHOLE, SPREAD = "whole", "spread"
"""A base that every rank has, and one of which each holds a part."""


@dataclass(frozen=True, slots=True, eq=False)
class Dealt:
    """A window of all ranks, and the micro-batches that each of them has of it."""

    shares: tuple[tuple[Batch, ...], ...]

    @property
    def window(self) -> list[Batch]:
        return [batch for share in self.shares for batch in share]

    @property
    def tokens(self) -> int:
        return total_tokens(self.window)

    def changed(self, rank: int, share: Sequence[Batch]) -> Dealt:
        """With another share for one rank."""
        return Dealt(tuple(tuple(share) if at == rank else old for at, old in enumerate(self.shares)))


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that is drawn, for a number of ranks."""

    seed: int
    shape: LlamaShape
    size: int

    def adapter(self, dropout: float = 0.0) -> Adapter:
        return draw_adapter(stream(self.seed, "ranks/adapter"), self.shape, rank=4, dropout=dropout)

    def window(self, name: str) -> Dealt:
        """Seven rows, dealt out by turns, so that no rank but the first has a row at its own place. The first and the
        third rank accumulate row by row, the second has all of its rows in one micro-batch."""
        random = stream(self.seed, f"ranks/window/{name}")
        batch = draw_batch(random, self.shape, lengths=LENGTHS, prompt=1)
        batch.labels[0, :19] = IGNORE_LABEL
        rows = rows_of(placed([batch])[0])
        hands = [rows[rank :: self.size] for rank in range(self.size)]
        return Dealt(tuple((joined(hand),) if rank == 1 else tuple(hand) for rank, hand in enumerate(hands)))

    def with_silent_rank(self, rank: int) -> Dealt:
        """One rank has rows of which no token counts."""
        dealt = self.window("silent")
        return dealt.changed(rank, silent(dealt.shares[rank]))

    def with_row_for_one(self, rank: int) -> Dealt:
        """The last window of a data set: one row is left, and the other ranks have nothing."""
        [row] = placed([draw_batch(stream(self.seed, "ranks/last"), self.shape, lengths=(13,), prompt=2)])
        return Dealt(tuple((row,) if at == rank else () for at in range(self.size)))

    def with_tokens_for_one(self, rank: int) -> Dealt:
        """All others have rows, and no token that counts."""
        dealt = self.window("refused")
        return Dealt(tuple(s if at == rank else silent(s) for at, s in enumerate(dealt.shares)))

    def equal_shares(self) -> Dealt:
        """Every rank has the same row."""
        [row] = placed([draw_batch(stream(self.seed, "ranks/equal"), self.shape, lengths=(6,), prompt=1)])
        return Dealt(tuple((row,) for _ in range(self.size)))

    def weighted(self, *ranks: int) -> Dealt:
        """The rows of these ranks have weights; those of the others have none."""
        random, dealt = stream(self.seed, "ranks/weights"), self.window("weights")
        for rank in ranks:
            share = [
                replace(batch, weights=random.choice(WEIGHTS, batch.labels.shape).astype(np.float32))
                for batch in dealt.shares[rank]
            ]
            dealt = dealt.changed(rank, share)
        return dealt

    def votes(self, rank: int) -> Float64:
        """Flags, counts, integers of 48 bits, and sums that are no integers."""
        random = stream(self.seed, f"ranks/votes/{rank}")
        flags, counts = random.integers(0, 2, 6), random.integers(0, 10**6, 6)
        wide = [2**48 - 1 - rank, *random.integers(2**47, 2**48, 12)]
        return np.array([*flags, *counts, *wide, *random.normal(size=SUMS)], np.float64)


SUMS = 5
"""The last entries of a vote, which are no integers."""


def refused_question(dtype: str) -> str:
    """Where a rank tells that it does not compute in a dtype."""
    return f"{dtype}/refused"


def spread_question(how: str, model: str, weight_format: str, double_quant: bool = False) -> str:
    return f"{how}/{model}/{weight_format}{'+double_quant' if double_quant else ''}"


def silent(share: Sequence[Batch]) -> tuple[Batch, ...]:
    return tuple(replace(batch, labels=np.full_like(batch.labels, IGNORE_LABEL)) for batch in share)


def overflowing_denominator(sizes: Sequence[float], tokens: int) -> float:
    """What takes every tensor's gradient beyond float32, by the largest entry of each of the token mean's."""
    return tokens * min(sizes) / BEYOND_FLOAT32


def every_byte(shape: LlamaShape, tensors: dict[str, Float32], weight_format: WeightFormat) -> dict[str, Float32]:
    """The model with modules whose packed bytes are 0, 1, ... 255 beside each other, then each of them before 127 and
    before 255, over and over, in formats of two 4-bit codes to a byte; in others each row takes 256 levels in this
    order. Two bytes that travel as a half-precision float may be none there, and come back as another. (FP4's negative
    zero is left out: no encoder writes it.)"""
    ramp = np.arange(BYTES)
    before = [np.stack([ramp, np.full(BYTES, last)], axis=1).ravel() for last in (BYTES // 2 - 1, BYTES - 1)]
    order = np.concatenate([ramp, *before])
    if weight_format.value in {kind.value for kind in FourBitFormat}:
        codebook = FOUR_BIT_CODEBOOKS[FourBitFormat(weight_format.value)]
        levels = codebook[np.stack([order // NIBBLES, order % NIBBLES], axis=1).ravel()]
    else:
        levels = (order - BYTES / 2 + 0.5) / (BYTES / 2)
    found = dict(tensors)
    for module, linear in linear_shapes(shape).items():
        spread = np.float32(1.0 / np.sqrt(linear.inputs))
        found[f"{module}.weight"] = (np.resize(levels, linear.weight) * spread).astype(np.float32)
    return found
