"""L2: a young adapter's product is far below the last digit of a 16-bit output, and must show all the same."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_hal_conformance.drawing import draw_adapter, draw_batch, with_zero
from qlora_hal_conformance.judging import Judge
from qlora_hal_conformance.opening import Opener, oracle_step
from qlora_hal_conformance.parameters import HALF_DTYPES, OracleOf, each_dtype
from qlora_hal_conformance.tolerances import young_update

STEPS, RATE = 4, 2e-5


@pytest.mark.parametrize("dtype", each_dtype(*HALF_DTYPES))
def test_four_small_steps_show_in_the_loss(
    dtype: str, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Four steps at a small rate from B = 0: the loss must fall as in exact arithmetic. Added onto an output that is
    already rounded to 16 bits, the adapter's product would be rounded away."""
    shape, _ = opened.models.drawn("main")
    ready = opened(dtype=dtype, adapter=with_zero(draw_adapter(seeded, shape, rank=4), "B"))
    window = [draw_batch(seeded, shape, lengths=(48, 45, 48, 41)) for _ in range(3)]
    reference = oracle(ready)
    before, exact_before = ready.trainer.evaluate(window).loss_sum, reference.evaluate(window)[0]
    for _ in range(STEPS):
        ready.step(window, RATE)
        oracle_step(reference, window, RATE)
    fall = before - ready.trainer.evaluate(window).loss_sum
    expected = exact_before - reference.evaluate(window)[0]
    judging.at_most("part of the exact fall that is missing", abs(1.0 - fall / expected), young_update())
