"""L4: several ranks compute what one computes, and each of them knows it.

Gradients are sums over the window of all ranks, and float32 addition is all that may differ. What the ranks said comes
from one start for each number of them (`worlds`); where this machine has fewer devices, they are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pytest

from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.contract.values import StepStats
from qlora_hal_conformance.asked_of_ranks import (
    DROP,
    DROPOUT_KEY,
    EVERY_BYTE,
    NEXT_STEP,
    SIZES,
    SPREAD,
    STEPS,
    SUMS,
    WEIGHTED_DENOMINATOR,
    WEIGHTS,
    WHOLE,
    Dealt,
    spread_question,
)
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_gradients
from qlora_hal_conformance.fixtures import Opened, Opener
from qlora_hal_conformance.parameters import each_format, in_each_dtype
from qlora_hal_conformance.random_inputs import at_real_tokens, total_tokens
from qlora_hal_conformance.rank_in_child import hash_of
from qlora_hal_conformance.subject import Devices
from qlora_hal_conformance.tolerances import (
    EXACT,
    gradient_bounds,
    gradient_noise,
    is_coarse,
    logits_bound,
    loss_bound,
    norm_bound,
    norm_noise,
    resumed_bounds,
    summed,
    summed_in_float64,
)
from qlora_hal_conformance.updating import judge_step, judge_taken_step, oracle_at_state_of
from qlora_hal_conformance.worlds import Answer, WorldAnswers, Worlds, adapter_of
from qlora_hal_oracle import OracleTrainer
from qlora_hal_oracle.adamw import global_norm

pytestmark = pytest.mark.needs(Feature.DATA_PARALLEL)

TWO, THREE = SIZES
each_size = pytest.mark.parametrize(
    "size", [pytest.param(n, id=f"{n}_ranks", marks=pytest.mark.needs(Devices(n))) for n in SIZES]
)
with_three = pytest.mark.needs(Devices(THREE))
STATES = (
    "trained", *(f"step-{n}" for n in range(len(STEPS) + 1)), "silent", "row_for_first", "row_for_last", "equal",
    "before_refused", "refused_by_first", "refused_by_last", "after_refused",
)  # fmt: skip


@in_each_dtype
@each_size
def test_gradients_are_those_of_the_whole_window(size: int, opened: Opener, worlds: Worlds, judging: Judge) -> None:
    """Rows of 1 to 18 counted tokens, shared unequally, accumulated differently: no mean of means, and no denominator
    of a rank's own. Those that are shown, and those that a step uses."""
    world, dealt = worlds(size), worlds(size).inputs.window("first")
    ready = opened(adapter=world.inputs.adapter())
    reference = ready.oracle()
    shown = _alike(world, f"{ready.dtype}/gradients").arrays["gradients"]
    judge_gradients(shown, reference, dealt.window, ready, judging, ranks=size)
    _judge_step_of_no_rate(world, "trained", dealt, ready, reference, judging)


@in_each_dtype
@each_size
def test_steps_are_those_of_the_whole_window(size: int, opened: Opener, worlds: Worlds, judging: Judge) -> None:
    """Three of them, one clipped by far: loss sum, token count, norm before clipping, adapter and moments."""
    world = worlds(size)
    ready = opened(adapter=world.inputs.adapter())
    for number, given in enumerate(STEPS, start=1):
        before, after = (_alike(world, f"{ready.dtype}/step-{n}") for n in (number - 1, number))
        window = world.inputs.window(f"step-{number}").window
        reference = _oracle_at(ready, before, world)
        judge_taken_step(
            before.held, after.held, after.stats, reference, window, given, ready.dtype, judging, ranks=size
        )


@in_each_dtype
@each_size
def test_base_is_the_same_on_every_rank(size: int, opened: Opener, worlds: Worlds, judging: Judge) -> None:
    world = worlds(size)
    ready = opened(adapter=world.inputs.adapter())
    expected = {module: ready.trainer.dequantized_weight(module) for module in ready.trainer.linear_modules()}
    for answer in world.of_each(f"{ready.dtype}/base"):
        judging.equal("weights", answer.arrays["weights"], expected)


@in_each_dtype
@each_size
def test_all_ranks_have_the_same_bits(size: int, opened: Opener, worlds: Worlds) -> None:
    """Figures, adapter and moments after every step: ranks that part in a last bit part for good."""
    world = worlds(size)
    ready = opened(adapter=world.inputs.adapter())
    for question in STATES:
        _alike(world, f"{ready.dtype}/{question}")


@in_each_dtype
@each_size
def test_views_of_a_rank_are_of_its_own_rows(size: int, opened: Opener, worlds: Worlds, judging: Judge) -> None:
    """Evaluation and logits: the core adds up what each rank was given, and a rank without a batch gives nothing."""
    world = worlds(size)
    ready = opened(adapter=world.inputs.adapter())
    reference = ready.oracle()
    answers = world.of_each(f"{ready.dtype}/own")
    for answer, share in zip(answers, world.inputs.window("first").shares, strict=True):
        told, nothing = answer.facts["evaluated"], answer.facts["of_nothing"]
        assert told["token_count"] == total_tokens(share), f"{told['token_count']} tokens of {total_tokens(share)}"
        loss, bound = reference.evaluate(share)[0], loss_bound(reference, share, ready.dtype)
        judging.within("loss sum", np.array(told["loss_sum"]), np.array(loss), bound)
        assert (nothing["loss_sum"], nothing["token_count"]) == (0, 0), f"no batch was evaluated to {nothing}"
        found, expected = (
            at_real_tokens(logits, share[0])
            for logits in (answer.arrays["logits"]["first"], reference.logits(share[0]))
        )
        judging.within("logits", found, expected, logits_bound(reference, share[0], ready.dtype))


@pytest.mark.needs(Feature.LORA_DROPOUT)
@in_each_dtype
@each_size
def test_dropout_masks_are_those_of_global_rows(size: int, opened: Opener, worlds: Worlds, judging: Judge) -> None:
    """By a row's place in the window of all ranks: neither the same on every rank, nor drawn by the rank's number."""
    world, dealt = worlds(size), worlds(size).inputs.window("first")
    ready = opened(adapter=world.inputs.adapter(DROP))
    found = _alike(world, f"{ready.dtype}/dropout").gradients
    masks = [ready.masks(batch, DROPOUT_KEY) for batch in dealt.window]
    judge_gradients(found, ready.oracle(), dealt.window, ready, judging, masks=masks, ranks=size)


@in_each_dtype
@each_size
def test_rank_without_a_counted_token(size: int, opened: Opener, worlds: Worlds, judging: Judge) -> None:
    """It adds nothing, and takes no place in a mean."""
    world = worlds(size)
    ready = opened(adapter=world.inputs.adapter())
    dealt = world.inputs.with_silent_rank(size - 1)
    _judge_step_of_no_rate(world, "silent", dealt, ready, ready.oracle(), judging)


@pytest.mark.parametrize("who", ["first", "last"])
@in_each_dtype
@each_size
def test_one_row_is_left(who: str, size: int, opened: Opener, worlds: Worlds, judging: Judge) -> None:
    """The last window of the data: the other ranks have no micro-batch. It is trained, once, and nothing is repeated to
    make the shares even."""
    world = worlds(size)
    ready = opened(adapter=world.inputs.adapter())
    dealt = world.inputs.with_row_for_one(0 if who == "first" else size - 1)
    _judge_step_of_no_rate(world, f"row_for_{who}", dealt, ready, ready.oracle(), judging)


@pytest.mark.needs(Devices(TWO))
@in_each_dtype
def test_equal_shares_have_the_gradient_of_one(opened: Opener, worlds: Worlds, judging: Judge) -> None:
    """Both ranks have the same row, then one has it alone: what is left is the rounding of one float32 addition,
    whatever the compute dtype. Gradients that cross in bfloat16 lose more."""
    world = worlds(TWO)
    dtype = opened(adapter=world.inputs.adapter()).dtype
    both, one = (_alike(world, f"{dtype}/{name}").gradients for name in ("equal", "equal_alone"))
    judging.all_within("gradients", both, one, {name: summed(gradient, TWO) for name, gradient in one.items()})


@pytest.mark.needs(Feature.TOKEN_WEIGHTS)
@pytest.mark.parametrize("who", ["all", "last"])
@in_each_dtype
@each_size
def test_weights_of_tokens(who: str, size: int, opened: Opener, worlds: Worlds, judging: Judge) -> None:
    """Where one rank's rows have weights, every rank tells the weighted sum, in which all other tokens weigh 1."""
    world = worlds(size)
    ready = opened(adapter=world.inputs.adapter())
    name, weighted = ("weights", range(size)) if who == "all" else ("weights_of_last", range(size - 1, size))
    dealt, reference, answer = world.inputs.weighted(*weighted), ready.oracle(), _alike(world, f"{ready.dtype}/{name}")
    judge_gradients(
        answer.gradients, reference, dealt.window, ready, judging, denominator=WEIGHTED_DENOMINATOR, ranks=size
    )
    expected = sum(
        float((reference.token_losses(b) * (1.0 if b.weights is None else b.weights)).sum()) for b in dealt.window
    )
    bound = loss_bound(reference, dealt.window, ready.dtype, ranks=size)
    stats = answer.stats
    _judge_loss(stats, reference, dealt, ready, judging)
    assert stats.weighted_loss_sum is not None, "no weighted sum was given"
    largest = max(abs(weight) for weight in WEIGHTS)
    judging.within(
        "weighted sum", np.array(stats.weighted_loss_sum), np.array(expected), bound.times(largest, "largest weight")
    )


@pytest.mark.parametrize("who", ["first", "last"])
@in_each_dtype
@each_size
def test_gradient_of_one_rank_that_is_not_finite_refuses_the_step_of_all(
    who: str, size: int, opened: Opener, worlds: Worlds, judging: Judge
) -> None:
    """The others have a finite one, of tokens that do not count. All refuse, nothing moves, the next step is right."""
    world = worlds(size)
    ready = opened(adapter=world.inputs.adapter())
    before = world.of_each(f"{ready.dtype}/before_refused")
    for rank, answer in enumerate(world.of_each(f"{ready.dtype}/refused_by_{who}")):
        assert not answer.stats.applied, f"rank {rank} applied the step"
        assert not np.isfinite(answer.stats.grad_norm), f"refused, but the norm is told as {answer.stats.grad_norm}"
        judging.equal("adapter", answer.arrays["adapter"], before[rank].arrays["adapter"])
        judging.equal("moments", answer.arrays["moments"], before[rank].arrays["moments"])
        assert answer.facts["step"] == before[rank].facts["step"], "the refused step was counted"
    held, after = (_alike(world, f"{ready.dtype}/{name}") for name in ("refused_by_last", "after_refused"))
    window, reference = world.inputs.window("second").window, _oracle_at(ready, held, world)
    judge_taken_step(held.held, after.held, after.stats, reference, window, NEXT_STEP, ready.dtype, judging, ranks=size)


@pytest.mark.parametrize("when", ["votes_before_load", "votes"])
@each_size
def test_votes_are_exact_and_the_same_on_every_rank(when: str, size: int, worlds: Worlds, judging: Judge) -> None:
    """Flags, counts and integers of 48 bits exactly, whoever cast them; other numbers to the rounding of float64, and
    on all ranks to the same bits."""
    world = worlds(size)
    found = _alike(world, when).arrays["sums"]
    cast = np.array([world.inputs.votes(rank) for rank in range(size)])
    expected, magnitude = cast.sum(axis=0), np.abs(cast).sum(axis=0)
    for how in ("own", "turned"):
        judging.within(f"integers, {how}", found[how][:-SUMS], expected[:-SUMS], EXACT)
        bound = summed_in_float64(2.0 * magnitude[-SUMS:], size)
        judging.within(f"sums, {how}", found[how][-SUMS:], expected[-SUMS:], bound)


@with_three
@in_each_dtype
def test_two_ranks_and_three_are_one(opened: Opener, worlds: Worlds, judging: Judge) -> None:
    """The gradient of the same rows, and the adapter after three steps."""
    two, three = worlds(TWO), worlds(THREE)
    ready = opened(adapter=two.inputs.adapter())
    reference, window = ready.oracle(), two.inputs.window("first").window
    bounds = {n: b.times(2, "two of them") for n, b in gradient_bounds(reference, window, ready.dtype, ranks=3).items()}
    own = ready.trained_gradient(window)
    ready.attach(two.inputs.adapter())
    windows = [two.inputs.window(f"step-{n}").window for n in range(1, len(STEPS) + 1)]
    allowed = resumed_bounds(oracle_at_state_of(ready), windows, ready.dtype, STEPS, ranks=THREE)
    for each, given in zip(windows, STEPS, strict=True):
        settings = asdict(given)
        ready.step(each, settings.pop("learning_rate"), **settings)
    gradients = [*(_alike(w, f"{ready.dtype}/trained").gradients for w in (two, three)), own]
    after = [_alike(w, f"{ready.dtype}/step-{len(STEPS)}").arrays["adapter"] for w in (two, three)]
    after.append(ready.trainer.export_adapter().tensors)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        judging.all_within("gradients", gradients[one], gradients[other], bounds)
        judging.all_within("adapter after three steps", after[one], after[other], allowed)
    if is_coarse(ready.dtype):
        noise = {n: b.times(2, "two of them") for n, b in gradient_noise(reference, window, ready.dtype).items()}
        for one, other in ((0, 1), (0, 2), (1, 2)):
            judging.all_whole("gradients", gradients[one], gradients[other], noise)


@with_three
@in_each_dtype
def test_state_of_two_ranks_continues_on_three(opened: Opener, worlds: Worlds, judging: Judge) -> None:
    two, three = worlds(TWO), worlds(THREE)
    ready = opened(adapter=two.inputs.adapter())
    before, after = _alike(two, f"{ready.dtype}/step-{len(STEPS)}"), _alike(three, f"{ready.dtype}/continued")
    window, reference = three.inputs.window("continued").window, _oracle_at(ready, before, two)
    judge_taken_step(
        before.held, after.held, after.stats, reference, window, NEXT_STEP, ready.dtype, judging, ranks=THREE
    )


@pytest.mark.needs(Devices(TWO))
@in_each_dtype
def test_state_of_two_ranks_continues_on_one(opened: Opener, worlds: Worlds, judging: Judge) -> None:
    two = worlds(TWO)
    dtype = opened.main_dtype
    ready = opened(adapter=two.inputs.adapter())
    before = _alike(two, f"{dtype}/step-{len(STEPS)}")
    ready.attach(adapter_of(before, two.inputs))
    ready.trainer.import_optimizer(before.held.optimizer)
    judge_step(ready, oracle_at_state_of(ready), two.inputs.window("continued").window, NEXT_STEP, judging)


@pytest.mark.needs(Feature.SHARDED_BASE)
@pytest.mark.parametrize("weight_format", each_format())
@each_size
def test_spread_base_computes_as_a_whole_one(
    size: int, weight_format: WeightFormat, opened: Opener, worlds: Worlds
) -> None:
    """Weights, logits, gradients and the adapter after a step, bit for bit."""
    world = worlds.spread(size)
    ready = opened(weight_format=weight_format, double_quant=False)
    _judge_spread(world, "main", weight_format, ready)


@pytest.mark.needs(Feature.SHARDED_BASE, Feature.DOUBLE_QUANT)
@pytest.mark.parametrize("weight_format", each_format(WeightFormat.NF4, WeightFormat.FP4))
@each_size
def test_spread_base_of_double_quantization(
    size: int, weight_format: WeightFormat, opened: Opener, worlds: Worlds
) -> None:
    world = worlds.spread(size)
    ready = opened(weight_format=weight_format, double_quant=True)
    _judge_spread(world, "main", weight_format, ready)


@pytest.mark.needs(Feature.SHARDED_BASE)
@each_size
def test_spread_base_keeps_every_byte(size: int, opened: Opener, worlds: Worlds) -> None:
    """All 256 beside each other: bytes that travel as another type lose those that are no numbers there."""
    world = worlds.spread(size)
    ready = opened(EVERY_BYTE)
    _judge_spread(world, EVERY_BYTE, ready.quantization.weight_format, ready)


@each_size
def test_every_rank_answers_and_ends(size: int, worlds: Worlds) -> None:
    """Every verb, by all ranks, in the same order: nobody waits for a rank that has nothing to do."""
    failure = worlds(size).failure
    if failure is not None:
        raise failure


def _alike(world: WorldAnswers, question: str) -> Answer:
    """The answer that all ranks gave, to the same bits."""
    first, *others = world.of_each(question)
    for rank, other in enumerate(others, start=1):
        told = [json.dumps(answer.facts, sort_keys=True) for answer in (first, other)]
        assert told[0] == told[1], f"{question}: rank 0 says {told[0]}, rank {rank} {told[1]}"
        for kind, named in first.arrays.items():
            apart = [name for name, array in named.items() if array.tobytes() != other.arrays[kind][name].tobytes()]
            assert not apart, (
                f"{question}: {len(apart)} tensors of {kind} differ between ranks 0 and {rank}: {apart[:3]}"
            )
    return first


def _oracle_at(ready: Opened, held: Answer, world: WorldAnswers) -> OracleTrainer:
    """The oracle with the state that ranks exported."""
    reference = ready.oracle(adapter_of(held, world.inputs))
    reference.import_optimizer(held.held.optimizer.step, held.held.optimizer.moments)
    return reference


def _judge_step_of_no_rate(
    world: WorldAnswers, name: str, dealt: Dealt, ready: Opened, reference: OracleTrainer, judging: Judge
) -> None:
    """The gradient that a step used, unclipped, and its figures, which are of the whole window on every rank."""
    answer, size = _alike(world, f"{ready.dtype}/{name}"), world.inputs.size
    judge_gradients(answer.gradients, reference, dealt.window, ready, judging, ranks=size)
    _judge_loss(answer.stats, reference, dealt, ready, judging)
    gradients = reference.gradients(dealt.window)
    bound = (
        norm_noise(gradient_noise(reference, dealt.window, ready.dtype), gradients)
        if is_coarse(ready.dtype)
        else norm_bound(gradient_bounds(reference, dealt.window, ready.dtype, ranks=size), gradients)
    )
    judging.within("gradient norm", np.array(answer.stats.grad_norm), np.array(global_norm(gradients)), bound)


def _judge_loss(stats: StepStats, reference: OracleTrainer, dealt: Dealt, ready: Opened, judging: Judge) -> None:
    size = len(dealt.shares)
    assert stats.applied, "an ordinary step was not applied"
    assert stats.token_count == dealt.tokens, f"{stats.token_count} tokens of {dealt.tokens}"
    expected, bound = reference.evaluate(dealt.window)[0], loss_bound(reference, dealt.window, ready.dtype, ranks=size)
    judging.within("loss sum", np.array(stats.loss_sum), np.array(expected), bound)


def _judge_spread(world: WorldAnswers, model: str, weight_format: WeightFormat, ready: Opened) -> None:
    """`ready` is the same base on one rank."""
    double_quant = ready.quantization.double_quant
    whole, spread = (
        world.of_each(spread_question(how, model, weight_format.value, double_quant)) for how in (WHOLE, SPREAD)
    )
    own = {module: hash_of(ready.trainer.dequantized_weight(module)) for module in ready.trainer.linear_modules()}
    for rank, (one, other) in enumerate(zip(whole, spread, strict=True)):
        assert other.facts["weights"] == own, f"rank {rank} has other weights than one rank has: {_first(other, own)}"
        wrong = [kind for kind in one.facts if one.facts[kind] != other.facts[kind]]
        assert not wrong, f"rank {rank} has other {', '.join(wrong)} with a spread base than with a whole one"


def _first(answer: Answer, own: dict[str, str]) -> Sequence[str]:
    return [module for module, told in answer.facts["weights"].items() if own.get(module) != told][:3]
