"""L2: a whole run. The loss of every step lies where rounding alone can take it."""

from __future__ import annotations

import numpy as np

from qlora_hal_conformance.drawing import draw_adapter, draw_window, stream, with_zero
from qlora_hal_conformance.judging import Judge
from qlora_hal_conformance.opening import Opener, make_oracle, oracle_step
from qlora_hal_conformance.oracle import UNIT_ROUNDOFF, LoraScale, OracleTrainer, loss_curve_envelope
from qlora_hal_conformance.oracle.arithmetic import Arithmetic
from qlora_hal_conformance.tolerances import LOSS_CURVE_RUNS, LOSS_CURVE_WIDENING, learning_shortfall, loss_curve

STEPS, PEAK_RATE, WARMUP = 50, 1e-2, 5
WINDOWS = 4


def _rate(step: int) -> float:
    """Warm-up and linear decay, as the core would hand them in."""
    return PEAK_RATE * min((step + 1) / WARMUP, 1.0 - step / (STEPS + WARMUP))


def test_loss_curve_lies_in_the_envelope(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """50 steps from a young adapter, with warm-up, decay, clipping and weight decay."""
    shape, _ = opened.models.drawn("main")
    adapter = with_zero(draw_adapter(seeded, shape, rank=4), "B")
    windows = [draw_window(seeded, shape) for _ in range(WINDOWS)]
    ready = opened(adapter=adapter)
    base = ready.own_base()
    found = [ready.step(windows[n % WINDOWS], _rate(n), weight_decay=0.01).loss for n in range(STEPS)]

    def train(arithmetic: Arithmetic) -> list[float]:
        config = adapter.config
        scale = LoraScale(config.alpha, config.r, config.use_rslora)
        oracle = OracleTrainer(shape, base, adapter.tensors, scale, arithmetic)
        steps = (oracle_step(oracle, windows[n % WINDOWS], _rate(n), weight_decay=0.01) for n in range(STEPS))
        return [step.loss_sum / step.token_count for step in steps]

    envelope = loss_curve_envelope(train, unit_roundoff=UNIT_ROUNDOFF[ready.dtype], runs=LOSS_CURVE_RUNS)
    excess = envelope.excess(found, widening=LOSS_CURVE_WIDENING)
    judging.at_most("distance / allowed distance, worst of 50 steps", excess, loss_curve())
    assert envelope.exact[-1] < envelope.exact[0], "the drawn run does not learn"


def test_run_learns_on_fresh_windows(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """The held-out loss of a task that can be learned falls about as far as the oracle's does."""
    shape, _ = opened.models.drawn("main")
    adapter = with_zero(draw_adapter(seeded, shape, rank=8), "B")
    ready = opened(adapter=adapter)
    reference = make_oracle(shape, ready.own_base(), adapter)
    window, held_out = draw_window(stream(1, "task"), shape), draw_window(stream(1, "task"), shape)
    before = ready.trainer.evaluate(held_out).loss
    for step in range(12):
        ready.step(window, _rate(step))
        oracle_step(reference, window, _rate(step))
    loss_sum, tokens = reference.evaluate(held_out)
    fall, expected = before - ready.trainer.evaluate(held_out).loss, before - loss_sum / tokens
    judging.at_most("part of the exact fall that is missing", 1.0 - fall / expected, learning_shortfall())
