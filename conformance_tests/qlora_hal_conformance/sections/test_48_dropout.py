"""L2: dropout masks of every module, of many rows, at low and high rates, by all bits of a key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.dropout import kept
from qlora_hal.contract.dropout import rows_of as rows_of_batch
from qlora_hal.contract.values import Batch
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.fixtures import Opened, Opener, placed
from qlora_hal_conformance.parameters import in_each_dtype
from qlora_hal_conformance.random_inputs import (
    draw_adapter,
    draw_many_rows,
    draw_two_tokens_seen,
    joined,
    rows_of,
    with_zero,
)
from qlora_hal_conformance.tolerances import EXACT, gradient_bounds
from qlora_hal_oracle.arrays import AnyFloat, Float64
from qlora_hal_oracle.random_models import draw_tensors

pytestmark = pytest.mark.needs(Feature.LORA_DROPOUT)

DROP = 0.5
RATES = {"a_hundredth": 0.01, "a_twentieth": 0.05, "three_quarters": 0.75}
HIGH_BITS = {"none": (), "32": (32,), "47": (47,), "55": (55,), "62": (62,), "40_and_62": (40, 62)}
LOW_KEY = 77
LAYERS = 5
CUTS = (5, 9, 15)
"""Where fifteen rows are cut into three micro-batches."""


@in_each_dtype
@pytest.mark.parametrize("bits", HIGH_BITS.values(), ids=HIGH_BITS)
def test_every_module_of_five_layers_by_every_bit_of_the_key(
    bits: tuple[int, ...], opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """With A = 0 no mask changes what another module sees. Two tokens are seen, and a column of A's gradient is 0 where
    the contract drops that input of both; elsewhere it is not. No rounding can hide which columns these are."""
    ready = _with_five_layers(opened, seeded)
    window = placed([draw_two_tokens_seen(seeded, ready.model.shape)])
    key = LOW_KEY + sum(2**bit for bit in bits)
    found, expected = ready.trained_gradient(window, dropout_key=key), _expected(ready, window, key)
    wrong = {name: _wrong_columns(found[name], e) for name, e in expected.items() if "lora_A" in name}
    worst = max(wrong, key=lambda name: wrong[name])
    judging.at_most(f"columns with another mask than the contract's, {worst}", wrong[worst], EXACT)


@in_each_dtype
@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
def test_many_rows_in_three_micro_batches(
    rate: float, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """Fifteen rows: the gradient is that of the contract's masks, whichever micro-batch a row is in."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape, dropout=rate))
    (whole,) = placed([draw_many_rows(seeded, shape, rows=CUTS[-1])])
    rows, starts = rows_of(whole), (0, *CUTS)
    window = [joined(rows[start:end]) for start, end in zip(starts, CUTS, strict=False)]
    key = int(seeded.integers(2**63))
    bounds = gradient_bounds(ready.oracle(), window, ready.dtype)
    judging.all_within(
        "gradients",
        ready.trained_gradient(window, dropout_key=key),
        _expected(ready, window, key),
        {name: bound.times(2.0 / (1.0 - rate) ** 2, "kept inputs are larger") for name, bound in bounds.items()},
    )


def _with_five_layers(opened: Opener, seeded: np.random.Generator) -> Opened:
    """Enough layers for one to be taken for another two or four away."""
    shape, _ = opened.models.drawn("main")
    deeper = replace(shape, num_hidden_layers=LAYERS)
    opened.models.define("five layers", deeper, draw_tensors(deeper, seeded))
    return opened("five layers", adapter=with_zero(draw_adapter(seeded, deeper, dropout=DROP), "A"))


def _expected(ready: Opened, window: list[Batch], key: int) -> Mapping[str, Float64]:
    """The oracle's gradient of the window with the contract's masks."""
    assert ready.adapter is not None
    config, shapes = ready.adapter.config, ready.trainer.linear_modules()
    masks = [
        {
            module: kept(
                key, module, rows_of_batch(batch), batch.input_ids.shape[1], shapes[module].inputs, config.dropout
            )
            / (1.0 - config.dropout)
            for module in config.target_modules
        }
        for batch in window
    ]
    return ready.oracle().window_gradients(window, masks=masks).gradients


def _wrong_columns(found: AnyFloat, expected: AnyFloat) -> int:
    """Columns that are 0 in one and not in the other; those below the mean in the exact gradient are left out."""
    one, other = (np.abs(np.asarray(values, np.float64)).sum(axis=0) for values in (found, expected))
    is_zero, is_large = other == 0.0, other > other.mean()
    # A kept column above the mean has lost nearly all of itself to no honest rounding; a dropped one has nothing. One
    # of a quarter of the mean may: behind a gate that is nearly shut, bfloat16 rounds the gate.
    return int((is_zero & (one > other.mean() / 16)).sum() + (is_large & (one < other.mean() / 16)).sum())
