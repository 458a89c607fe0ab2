"""Windows of a run on a mixture of experts in which no rounding decides where a token goes, dropout masks included."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlora_hal.contract.values import IGNORE_LABEL, PADDING_SEGMENT, Batch
from qlora_hal_conformance.combination import MOST_MICRO_BATCHES, MOST_ROWS, Combination
from qlora_hal_conformance.dropout_oracle import DropoutOracle, masks_of
from qlora_hal_conformance.fixtures import Opened, placed
from qlora_hal_conformance.random_inputs import draw_batch, packed, with_field
from qlora_hal_conformance.routed_inputs import MARGIN_DEVIATIONS, NORMAL_MEDIAN, ROUNDS, mixtures_of
from qlora_hal_oracle import EXACT, UNIT_ROUNDOFF, DropoutMasks, LlamaShape, RandomRounding
from qlora_hal_oracle.arrays import Bool
from qlora_hal_oracle.random_models import FIRST_ORDINARY_TOKEN

TOKENS = 24
SHORTEST_ROW = 16
SAMPLES_IN_A_ROW = 3


def draw_window(
    random: np.random.Generator,
    shape: LlamaShape,
    run: Combination,
    *,
    tokens: int = TOKENS,
    micro_batches: int = MOST_MICRO_BATCHES,
    rows: int = MOST_ROWS,
) -> list[Batch]:
    """A window as the run has them: its rows, its micro-batches, several samples in a row where it packs."""
    number, longest = min(run.batch_size, rows), max(min(tokens, run.row_length), SHORTEST_ROW)
    drawn = []
    for _ in range(min(run.accumulation, micro_batches)):
        if run.packing:
            drawn.append(joined_rows([_packed_row(random, shape, longest) for _ in range(number)]))
        else:
            lengths = [longest, *(int(length) for length in random.integers(longest // 3 + 2, longest + 1, number - 1))]
            drawn.append(draw_batch(random, shape, lengths=lengths))
    return placed(drawn)


def draw_routed_window(
    random: np.random.Generator, ready: Opened, run: Combination, *, key: int | None = None
) -> list[Batch]:
    """The same, every real token decided in every layer: in a step of this dropout key, or without dropout."""
    oracle = DropoutOracle.at_state_of(ready, 0 if key is None else key)
    window = draw_window(random, ready.model.shape, run)
    return [_routed(random, oracle, batch, ready.dtype, has_dropout=key is not None) for batch in window]


def joined_rows(rows: Sequence[Batch]) -> Batch:
    """Rows without places of their own in one batch."""
    names = ("input_ids", "labels", "position_ids", "segment_ids")
    return Batch(**{name: np.concatenate([getattr(row, name) for row in rows]) for name in names})


def _packed_row(random: np.random.Generator, shape: LlamaShape, longest: int) -> Batch:
    """Three samples and a little padding."""
    cuts = np.sort(random.choice(np.arange(1, longest // 4), size=SAMPLES_IN_A_ROW - 1, replace=False)) * 4
    lengths = np.diff([0, *cuts, longest - int(random.integers(0, 4))])
    return packed([draw_batch(random, shape, lengths=[int(length)]) for length in lengths], time=longest)


def _routed(
    random: np.random.Generator, oracle: DropoutOracle, batch: Batch, dtype: str, *, has_dropout: bool
) -> Batch:
    """A token sees only those before it, so those that are decided in front of the first undecided one stay so."""
    # By place, not by token: drawing other tokens leaves the masks as they are.
    masks = masks_of(oracle.adapter_config, oracle.shapes, batch, oracle.key) if has_dropout else {}
    for _ in range(ROUNDS):
        undecided = _undecided(oracle, batch, masks, dtype)
        if not undecided.any():
            return batch
        drawn = random.integers(FIRST_ORDINARY_TOKEN, oracle.model.shape.vocab_size, batch.input_ids.shape)
        input_ids = np.where(undecided, drawn, batch.input_ids).astype(np.int32)
        labels = np.where(batch.labels == IGNORE_LABEL, IGNORE_LABEL, input_ids).astype(np.int32)
        batch = with_field(batch, input_ids=input_ids, labels=labels)
    raise AssertionError(f"no batch was found in {ROUNDS} rounds in which {dtype} decides every token")


def _undecided(oracle: DropoutOracle, batch: Batch, masks: DropoutMasks, dtype: str) -> Bool:
    """`[batch, time]`: as `routed_inputs` finds them, with the masks of a step."""
    exact, rounded = (
        mixtures_of(oracle.model.forward(batch, arithmetic, masks))
        for arithmetic in (EXACT, RandomRounding(UNIT_ROUNDOFF[dtype], seed=0))
    )
    real = batch.segment_ids != PADDING_SEGMENT
    undecided = np.zeros(batch.input_ids.shape, dtype=np.bool_)
    for one, other in zip(exact, rounded, strict=True):
        # Few tokens go elsewhere in the rounded run, and have other scores behind that: the median does not see them.
        apart = np.abs(one.routing.deciding - other.routing.deciding)[real.reshape(-1)]
        deviation = float(np.median(apart)) / NORMAL_MEDIAN
        undecided |= (one.routing.margin < MARGIN_DEVIATIONS * deviation).reshape(undecided.shape)
    found: Bool = undecided & real
    return found
