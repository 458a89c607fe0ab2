"""L2: a whole run. The loss of every step lies where rounding alone can take it."""

from __future__ import annotations

import numpy as np

from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.fixtures import Opener, make_oracle, oracle_step
from qlora_hal_conformance.parameters import in_each_dtype
from qlora_hal_conformance.random_inputs import draw_adapter, draw_window, total_tokens, with_zero
from qlora_hal_conformance.tolerances import LOSS_CURVE_RUNS, learning_shortfall, loss_curve_bound
from qlora_hal_oracle import UNIT_ROUNDOFF, LoraScale, OracleTrainer, loss_curve_envelope
from qlora_hal_oracle.arithmetic import Arithmetic

STEPS, PEAK_RATE, WARMUP = 50, 1e-2, 5
WINDOWS = 4


def _rate(step: int) -> float:
    """Warm-up and linear decay, as the core would hand them in."""
    return PEAK_RATE * min((step + 1) / WARMUP, 1.0 - step / (STEPS + WARMUP))


@in_each_dtype
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
    tokens = max(total_tokens(window) for window in windows)
    judging.within("loss of each of 50 steps", np.array(found), envelope.exact, loss_curve_bound(envelope, tokens))
    assert envelope.exact[-1] < envelope.exact[0], "the drawn run does not learn"


@in_each_dtype
def test_evaluated_loss_falls(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """What `evaluate` says after a run has fallen about as far as the oracle's loss."""
    shape, _ = opened.models.drawn("main")
    adapter = with_zero(draw_adapter(seeded, shape, rank=8), "B")
    ready = opened(adapter=adapter)
    reference = make_oracle(shape, ready.own_base(), adapter)
    windows = [draw_window(seeded, shape) for _ in range(WINDOWS)]
    before = ready.trainer.evaluate(windows[0]).loss
    for step in range(12):
        ready.step(windows[step % WINDOWS], _rate(step))
        oracle_step(reference, windows[step % WINDOWS], _rate(step))
    loss_sum, tokens = reference.evaluate(windows[0])
    fall, expected = before - ready.trainer.evaluate(windows[0]).loss, before - loss_sum / tokens
    judging.at_most("part of the exact fall that is missing", max(1.0 - fall / expected, 0.0), learning_shortfall())
