"""L2: a young adapter's product is far below the last digit of a 16-bit output, and must show all the same."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.fixtures import Opener, oracle_step
from qlora_hal_conformance.parameters import HALF_DTYPES, OracleOf, each_dtype
from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch, draw_window, with_zero
from qlora_hal_conformance.tolerances import young_update

STEPS, RATE = 4, 1.5e-5
ROWS, LENGTH = 96, 48


@pytest.mark.parametrize("dtype", each_dtype(*HALF_DTYPES))
def test_four_small_steps_show_in_the_logits(
    dtype: str, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Four steps at a small rate from B = 0 must move the logits as exact arithmetic does: the part of the exact change
    D that is found in the change d is <d, D> / <D, D>, over so many tokens that rounding's own noise averages out.
    Added onto an output that is already rounded to 16 bits, the adapter's product would be rounded away."""
    shape, _ = opened.models.drawn("main")
    ready = opened(dtype=dtype, adapter=with_zero(draw_adapter(seeded, shape, rank=4), "B"))
    reference = oracle(ready)
    window = draw_window(seeded, shape)
    held_out = [draw_batch(seeded, shape, lengths=(LENGTH,) * 8) for _ in range(ROWS // 8)]
    before = [(ready.trainer.logits(batch), reference.logits(batch)) for batch in held_out]
    for _ in range(STEPS):
        ready.step(window, RATE)
        oracle_step(reference, window, RATE)
    found = exact = 0.0
    for batch, (logits, exact_logits) in zip(held_out, before, strict=True):
        change = ready.trainer.logits(batch).astype(np.float64) - logits
        exact_change = reference.logits(batch) - exact_logits
        found += float(np.sum(change * exact_change))
        exact += float(np.sum(exact_change**2))
    judging.at_most("part of the exact change that is missing", abs(1.0 - found / exact), young_update())
