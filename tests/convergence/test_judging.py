"""What is indistinguishable and what is not, on drawn losses: both directions, the mean and the spread."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from qlora_hal.files import strict_json
from qlora_hal_conformance.convergence.comparison import TaskResult
from qlora_hal_conformance.convergence.judging import Judgement, Power, Verdict, judge, margins
from qlora_hal_conformance.convergence.references import TaskReference
from qlora_hal_conformance.convergence.training import Run, Settings

SIGMA, SEEDS = 0.02, 20
REFERENCE = dict(enumerate(1.0 + SIGMA * np.random.default_rng(11).normal(size=SEEDS)))
MEAN = float(np.mean(list(REFERENCE.values())))
WITHIN = margins(float(np.std(list(REFERENCE.values()), ddof=1)), SEEDS)


def paired(change: Callable[[float], float], *, noise: float = 0.02 * SIGMA, seeds: int = 8) -> Judgement:
    """Runs of the reference's seeds, changed, with noise of a backend's own."""
    random = np.random.default_rng(5)
    return judge({s: change(REFERENCE[s]) + noise * random.normal() for s in range(seeds)}, REFERENCE)


def test_margins_are_what_two_honest_sets_of_seeds_differ_by_19_times_out_of_20() -> None:
    draws = np.random.default_rng(3).normal(size=(2, 20_000, SEEDS))
    within = margins(1.0, SEEDS)
    apart = np.abs(draws[0].mean(axis=1) - draws[1].mean(axis=1))
    wider = np.abs(np.log(draws[0].std(axis=1, ddof=1) / draws[1].std(axis=1, ddof=1)))
    assert float((apart < within.mean).mean()) == pytest.approx(0.95, abs=0.01)
    assert float((wider < math.log(within.spread)).mean()) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("noise", [0.0, 1e-5, 0.05 * SIGMA])
def test_runs_with_a_backends_own_rounding_are_indistinguishable(noise: float) -> None:
    judgement = paired(lambda loss: loss, noise=noise)
    assert judgement.paired
    assert judgement.verdict is Verdict.INDISTINGUISHABLE


@pytest.mark.parametrize(("shift", "side"), [(1.3, "worse"), (-1.3, "better")])
def test_a_shift_beyond_the_margin_is_different_either_way(shift: float, side: str) -> None:
    judgement = paired(lambda loss: loss + shift * WITHIN.mean)
    assert judgement.mean.verdict is Verdict.DIFFERENT
    assert (judgement.mean.found > 0) == (side == "worse")
    assert judgement.spread.verdict is Verdict.INDISTINGUISHABLE


@pytest.mark.parametrize("factor", [0.4, 2.2])
def test_another_spread_around_the_same_mean_is_different(factor: float) -> None:
    beside = float(np.mean([REFERENCE[seed] for seed in range(8)]))
    judgement = paired(lambda loss: beside + factor * (loss - beside))
    assert judgement.mean.verdict is not Verdict.DIFFERENT
    assert judgement.spread.verdict is Verdict.DIFFERENT


def test_runs_that_are_all_alike_are_different() -> None:
    assert judge(dict.fromkeys(range(8), MEAN), REFERENCE).spread.verdict is Verdict.DIFFERENT


def test_noise_never_helps() -> None:
    """A backend too noisy to be shown equal does not pass, though its mean is right."""
    assert paired(lambda loss: loss, noise=2.0 * SIGMA).verdict is not Verdict.INDISTINGUISHABLE


def test_a_run_that_is_not_finite_is_different() -> None:
    losses = {seed: REFERENCE[seed] for seed in range(8)}
    assert judge({**losses, 3: math.nan}, REFERENCE).verdict is Verdict.DIFFERENT


def test_backend_at_the_margin_passes_at_most_once_in_two_hundred() -> None:
    power = Power(SIGMA, SEEDS, 8)
    for deviation in (0.01, 0.1, 0.2, 0.5, 2.0):
        for sign in (-1.0, 1.0):
            passes = 1.0 - power.false_alarm(sign * power.surely_caught, deviation * SIGMA)
            assert passes <= 0.005 + 1e-3


def test_false_alarms_are_those_of_the_docstring() -> None:
    """A true shift and a paired deviation of sigma / 10 each, then of sigma / 5 each."""
    power = Power(SIGMA, SEEDS, 8)
    assert power.false_alarm(0.1 * SIGMA, 0.1 * SIGMA) < 1e-9
    assert power.false_alarm(0.2 * SIGMA, 0.2 * SIGMA) == pytest.approx(0.02, abs=0.002)


def test_least_shift_that_other_seeds_catch_is_that_of_the_docstring() -> None:
    assert Power(SIGMA, SEEDS, 8).surely_caught / SIGMA == pytest.approx(0.640, abs=5e-4)
    assert Power(SIGMA, SEEDS, 8).caught_unpaired / SIGMA == pytest.approx(2.02, abs=0.01)


def test_other_seeds_are_told_apart_only_where_they_are() -> None:
    """Two tests at 0.5 %: an honest set of other seeds fails once in a hundred times."""
    random = np.random.default_rng(7)
    failed, caught = 0, 0
    for _ in range(600):
        reference = {s: float(loss) for s, loss in enumerate(random.normal(size=SEEDS))}
        fresh = random.normal(size=8)
        honest = judge({100 + s: float(loss) for s, loss in enumerate(fresh)}, reference)
        wrong = judge({100 + s: float(loss) - 2.5 for s, loss in enumerate(fresh)}, reference)
        assert not honest.paired
        failed += honest.verdict is Verdict.DIFFERENT
        caught += wrong.mean.verdict is Verdict.DIFFERENT
    assert failed <= 15
    assert caught >= 570


def test_a_run_that_is_not_finite_is_written_down() -> None:
    losses = {**{seed: REFERENCE[seed] for seed in range(8)}, 3: math.nan}
    reference = TaskReference(Settings(1, 1e-3), "", 2.0, REFERENCE)
    runs = tuple(Run(seed, loss) for seed, loss in losses.items())
    result = TaskResult(runs, reference, judge(losses, REFERENCE), Power(SIGMA, SEEDS, 8)).as_json()
    assert json.loads(strict_json.encode(result))["final_losses"]["3"] is None


def test_seeds_of_which_some_are_the_references_are_refused() -> None:
    with pytest.raises(ValueError, match="all or none"):
        judge(dict.fromkeys(range(18, 24), 1.0), REFERENCE)


def test_too_few_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        judge({0: 1.0, 1: 1.0, 2: 1.0}, REFERENCE)
