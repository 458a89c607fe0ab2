"""L1: products with the base in 8-bit floats, of inputs and weights whose rows differ widely in size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.values import Batch, Float32
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_evaluation
from qlora_hal_conformance.fixtures import Opened, Opener, make_oracle, oracle_step, placed
from qlora_hal_conformance.fp8_parts import ALL, judge_evaluated_parts, judge_parts, turned
from qlora_hal_conformance.parameters import OracleOf, each_packing
from qlora_hal_conformance.random_inputs import (
    at_real_tokens,
    draw_adapter,
    draw_batch,
    draw_packed,
    draw_window,
    rows_of,
    with_zero,
)
from qlora_hal_conformance.tolerances import (
    LOSS_CURVE_RUNS,
    beside_bfloat16,
    drift_of_steps,
    gradient_noise,
    logits_noise,
    start_signs,
    young_update,
)
from qlora_hal_oracle import UNIT_ROUNDOFF, DropoutMasks, Fp8Products, LlamaShape, OracleTrainer, RandomRounding
from qlora_hal_oracle.random_models import linear_shapes

pytestmark = pytest.mark.needs(Feature.FP8_PRODUCTS, "bfloat16")

DTYPE = "bfloat16"
DROP = 0.3
KEY = 2**40 + 7
ROWS, LENGTH = 8, 48
"""So many tokens tell what a rounding does from what bfloat16 does."""
RATE, STEPS = 2e-3, 8
EVALUATED_ROWS, EVALUATED_LENGTH = 64, 12
TINY_RATE, TINY_STEPS = 1.5e-5, 4
HELD_OUT = 12
K, M = 2, 2
WIDE = {1: "wide, one layer", 2: "wide"}


@dataclass(frozen=True, slots=True)
class Way:
    """How a window is computed."""

    packing: bool = False
    dropout: bool = False
    recomputing: bool = False

    def batch(self, seeded: np.random.Generator, shape: LlamaShape, lengths: Sequence[int]) -> Batch:
        """One sample to a row; or the same lengths, several to a row."""
        if not self.packing:
            return draw_batch(seeded, shape, lengths=lengths)
        return draw_packed(seeded, shape, [lengths[: len(lengths) // 2], lengths[len(lengths) // 2 :]])


WAYS = {
    "rows": (Way(), ()),
    "packed": (Way(packing=True), (Feature.PACKING,)),
    "dropout": (Way(dropout=True), (Feature.LORA_DROPOUT,)),
    "recomputed": (Way(recomputing=True), (Feature.GRADIENT_CHECKPOINTING,)),
    "all": (
        Way(packing=True, dropout=True, recomputing=True),
        (Feature.PACKING, Feature.LORA_DROPOUT, Feature.GRADIENT_CHECKPOINTING),
    ),
}
RECOMPUTED = pytest.param(
    WAYS["recomputed"][0], id="recomputed", marks=pytest.mark.needs(Feature.GRADIENT_CHECKPOINTING)
)
in_each_way = pytest.mark.parametrize(
    "way", [pytest.param(way, id=name, marks=pytest.mark.needs(*needs)) for name, (way, needs) in WAYS.items()]
)


@in_each_way
def test_the_rounding_of_each_operand_is_there(
    way: Way, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """Those of weights, inputs and gradients, none of the head's or the adapters' operands: seen by what each does to
    logits and gradients. A product of bfloat16 has none, one with another scale has others."""
    shape, ready = _opened(opened, seeded, way, layers=1)
    judge_parts(ready, placed([way.batch(seeded, shape, (LENGTH,) * ROWS)]), judging, key=KEY)


@in_each_way
def test_logits_losses_and_gradients_of_two_layers(
    way: Way, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """As whole tensors; each layer has weights of its own."""
    shape, ready = _opened(opened, seeded, way, layers=2)
    window = placed([way.batch(seeded, shape, lengths) for lengths in ((24, 17, 21, 9), (7, 12))])
    reference = oracle(ready)
    _judge_logits(ready, reference, window[0], judging)
    judge_evaluation(ready, reference, window, judging)
    _judge_gradients(ready, reference, window, judging)


@pytest.mark.parametrize("way", [pytest.param(WAYS["rows"][0], id="kept"), RECOMPUTED])
def test_evaluation_rounds_as_training_does(
    way: Way, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """The losses of many rows, each evaluated alone, show the roundings of weights and inputs."""
    shape, ready = _opened(opened, seeded, way, layers=2)
    rows = rows_of(draw_batch(seeded, shape, lengths=(EVALUATED_LENGTH,) * EVALUATED_ROWS))
    judge_evaluated_parts(ready, rows, judging)
    judge_evaluation(ready, oracle(ready), rows[:2], judging)


@pytest.mark.needs(Feature.PACKING)
@pytest.mark.parametrize("rows", each_packing("ten_samples", "beyond_512"))
def test_rows_of_packed_samples(
    rows: Sequence[Sequence[int]], opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, ready = _opened(opened, seeded, Way(), layers=1)
    batch = draw_packed(seeded, shape, rows)
    reference = oracle(ready)
    _judge_logits(ready, reference, batch, judging)
    _judge_gradients(ready, reference, [batch], judging)


def test_a_young_adapter_is_not_lost(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Its product is far below the last digit of the output, and must show all the same: it is added before the one
    rounding. It stands on the last linear layer, where no E4M3 rounding comes after it that would drown it. Rows of
    one size: what is added to a small number is not small beside it."""
    shape, _ = opened.models.drawn("one layer")
    last = [module for module in linear_shapes(shape) if module.endswith("down_proj")]
    ready = opened(
        "one layer",
        dtype=DTYPE,
        fp8_products=True,
        adapter=with_zero(draw_adapter(seeded, shape, rank=4, targets=last), "B"),
    )
    reference, window = oracle(ready), draw_window(seeded, shape)
    held_out = [draw_batch(seeded, shape, lengths=(LENGTH,) * ROWS) for _ in range(HELD_OUT)]
    before = [(ready.trainer.logits(batch), reference.logits(batch)) for batch in held_out]
    for _ in range(TINY_STEPS):
        ready.step(window, TINY_RATE)
        oracle_step(reference, window, TINY_RATE)
    found = exact = 0.0
    for batch, (logits, exact_logits) in zip(held_out, before, strict=True):
        change = ready.trainer.logits(batch).astype(np.float64) - logits
        exact_change = reference.logits(batch) - exact_logits
        found += float(np.sum(change * exact_change))
        exact += float(np.sum(exact_change**2))
    judging.at_most("part of the exact change that is missing", abs(1.0 - found / exact), young_update())


def test_first_steps_signs_beside_bfloat16(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """At B = 0 AdamW's first step is a sign. How many entries of B start the other way than with products in bfloat16,
    and how far their gradients are apart, is what the 8-bit roundings explain."""
    shape, _ = opened.models.drawn(WIDE[2])
    adapter = with_zero(draw_adapter(seeded, shape, rank=8), "B")
    window = [draw_batch(seeded, shape, lengths=(LENGTH,) * ROWS)]
    found, references = [], []
    for fp8_products in (True, False):
        ready = opened(WIDE[2], dtype=DTYPE, fp8_products=fp8_products, adapter=adapter)
        found.append(_of_b(ready.trained_gradient(window)))
        references.append(oracle(ready))
    bounds = start_signs(references[0], references[1], window, DTYPE)
    in_fp8, in_bfloat16 = found
    judging.at_most("share of B's entries that start the other way than in bfloat16", turned(*found), bounds.share)
    apart = float(np.linalg.norm(in_fp8 - in_bfloat16) / np.linalg.norm(in_bfloat16))
    judging.at_most("gradient of B, |fp8 - bfloat16| / |bfloat16|", apart, bounds.gradient)


def test_loss_curve_lies_beside_that_of_bfloat16(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """The same run with products in bfloat16 ends as low, up to what the roundings do to the oracle's."""
    shape, _ = opened.models.drawn(WIDE[1])
    adapter, windows = with_zero(draw_adapter(seeded, shape, rank=4), "B"), [draw_window(seeded, shape) for _ in "ab"]
    curves = {}
    for fp8_products in (False, True):
        ready = opened(WIDE[1], dtype=DTYPE, fp8_products=fp8_products, adapter=adapter)
        curves[fp8_products] = [ready.step(windows[n % 2], RATE).loss for n in range(STEPS)]
    base = ready.own_base()

    def rounded(seed: int, fp8: Fp8Products | None) -> list[float]:
        trained = make_oracle(shape, base, adapter, RandomRounding(UNIT_ROUNDOFF[DTYPE], seed), fp8=fp8)
        steps = (oracle_step(trained, windows[n % 2], RATE) for n in range(STEPS))
        return [step.loss_sum / step.token_count for step in steps]

    runs = range(LOSS_CURVE_RUNS)
    bound = beside_bfloat16([rounded(run, ALL) for run in runs], [rounded(LOSS_CURVE_RUNS + run, None) for run in runs])
    judging.within("loss of each step", np.array(curves[True]), np.array(curves[False]), bound)


def test_a_resumed_run_goes_on(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """Bit for bit where that is declared: the base's 8-bit numbers are the same in every trainer."""
    shape, _ = opened.models.drawn(WIDE[2])
    adapter, windows = draw_adapter(seeded, shape, rank=4), [draw_window(seeded, shape) for _ in range(K + M)]
    through, stopped = (opened(WIDE[2], dtype=DTYPE, fp8_products=True, adapter=adapter) for _ in range(2))
    _train(through, windows)
    _train(stopped, windows[:K])
    resumed = opened(WIDE[2], dtype=DTYPE, fp8_products=True, adapter=stopped.trainer.export_adapter())
    resumed.trainer.import_optimizer(stopped.trainer.export_optimizer())
    _train(resumed, windows[K:])
    found, expected = (ready.trainer.export_adapter().tensors for ready in (resumed, through))
    if opened.subject.declares(Feature.BITWISE_DETERMINISM):
        judging.equal("adapter", found, expected)
    else:
        rounded = make_oracle(shape, through.own_base(), adapter, RandomRounding(UNIT_ROUNDOFF[DTYPE], 0), fp8=ALL)
        steps = [partial(oracle_step, window=window, learning_rate=RATE) for window in windows]
        judging.all_whole("adapter", found, expected, drift_of_steps(through.oracle(adapter), rounded, steps))


# what the cases share -------------------------------------------------------------------------------------------------
def _opened(opened: Opener, seeded: np.random.Generator, way: Way, *, layers: int) -> tuple[LlamaShape, Opened]:
    shape, _ = opened.models.drawn(WIDE[layers])
    adapter = draw_adapter(seeded, shape, rank=8, dropout=DROP if way.dropout else 0.0)
    return shape, opened(
        WIDE[layers], dtype=DTYPE, fp8_products=True, checkpointing=way.recomputing or None, adapter=adapter
    )


def _judge_logits(ready: Opened, reference: OracleTrainer, batch: Batch, judging: Judge) -> None:
    found, expected = (at_real_tokens(view.logits(batch), batch) for view in (ready.trainer, reference))
    judging.whole("logits", found, expected, logits_noise(reference, batch, ready.dtype))


def _judge_gradients(ready: Opened, reference: OracleTrainer, window: Sequence[Batch], judging: Judge) -> None:
    masks: list[DropoutMasks] = [ready.masks(batch, KEY) for batch in window]
    expected = reference.window_gradients(window, masks=masks).gradients
    noise = gradient_noise(reference, window, ready.dtype, masks=masks)
    judging.all_whole("gradients", ready.trained_gradient(window, dropout_key=KEY), expected, noise)


def _of_b(gradients: dict[str, Float32]) -> Float32:
    return np.concatenate([gradients[name].ravel() for name in sorted(gradients) if "lora_B" in name])


def _train(ready: Opened, windows: Sequence[Sequence[Batch]]) -> None:
    for window in windows:
        assert ready.step(window, RATE).applied
