"""Whether a backend's runs end where the reference's do: neither worse nor better, neither wider nor narrower.

**Margins.** The reference is m seeds with mean and standard deviation sigma. Two honest sets of m seeds differ, 19
times out of 20, by less than

    mean:    delta = t[0.975, 2m - 2] sigma sqrt(2 / m)           0.640 sigma for m = 20
    spread:  rho   = sqrt(F[0.975, m - 1, m - 1])                  a factor of 1.589 for m = 20

A backend that ends closer than that cannot be told from the reference by running all its seeds again; one that ends
farther away can. So these are what "indistinguishable" means here, in both directions, and they come from the
reference's own spread.

**Paired** (the same seeds as the reference). A backend draws the same A, rows and dropout masks as the reference, so
d = loss - reference is judged, seed by seed, and the seeds' own spread drops out. Equivalence has to be shown, by two
one-sided tests (Schuirmann 1987): the 99 % interval of Student's t for the mean of d has to lie inside +-delta, and the
99 % interval of Pitman and Morgan for the ratio of standard deviations inside (1 / rho, rho).

- A backend that is off by delta or more, either way, passes with a probability of at most 0.5 %, whatever its noise and
  however few the seeds: a smaller or noisier sample widens the interval, it never helps. So delta is the smallest shift
  that is surely caught.
- False alarm: an honest backend with a true shift mu and a paired deviation tau fails where its interval reaches a
  margin; `Power.false_alarm` integrates it. With tau = sigma / 5 and mu = sigma / 5 (a coarse bfloat16) it is below
  1 % for 8 seeds.

**Unpaired** (other seeds, or a library that draws its own). The two-sample tests of Student (mean) and Fisher (spread),
two-sided, at 0.5 % each: an honest backend fails one of them once in a hundred times. They catch only what is larger
than the seeds' own noise: a shift of 2.0 sigma in 95 of 100 times with 8 seeds. Not to fail is then no proof of being
equal, and is said so.

Losses of different seeds are taken for normal; each is a mean over hundreds of held-out tokens after hundreds of
thousands of roundings and draws.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from qlora_hal_conformance.convergence.distributions import (
    chance_inside,
    chance_told_apart,
    fisher_below,
    fisher_quantile,
    student_below,
    student_quantile,
)
from qlora_hal_oracle.arrays import Float64

SAME_IN = 0.95
"""How often two honest sets of as many seeds as the reference has lie within the margins."""
CONFIDENCE = 0.99
"""Of each paired interval."""
UNPAIRED_CONFIDENCE = 0.995
"""Two tests at 0.5 % each: an honest backend fails a task once in a hundred times at most."""
CAUGHT = 0.95
"""The power that the smallest shift of the unpaired test is told for."""
FEWEST_SEEDS = 4
"""Below this Pitman and Morgan's interval, with n - 2 degrees of freedom, says nothing."""


class SeedsError(ValueError):
    """Seeds that cannot be judged, told before anything is trained."""


class Verdict(StrEnum):
    """`undecided`: these seeds neither show that the backend is equal nor that it is not."""

    INDISTINGUISHABLE = "indistinguishable"
    DIFFERENT = "different"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Margins:
    """`mean` in nats; `spread` is a factor above 1."""

    mean: float
    spread: float


def margins(sigma: float, seeds: int) -> Margins:
    """Within what two honest sets of `seeds` runs lie 19 times out of 20."""
    tail = 0.5 + SAME_IN / 2.0
    return Margins(
        student_quantile(tail, 2 * seeds - 2) * sigma * math.sqrt(2.0 / seeds),
        math.sqrt(fisher_quantile(tail, seeds - 1, seeds - 1)),
    )


@dataclass(frozen=True, slots=True)
class Judged:
    """One test. `low` to `high` is the 99 % interval of `what`; inside `margin` it has to lie. For an unpaired test
    `probability` is how often honest runs lie as far apart."""

    what: str
    verdict: Verdict
    found: float
    low: float
    high: float
    margin: tuple[float, float]
    probability: float | None = None

    def as_json(self) -> dict[str, object]:
        return {
            "what": self.what,
            "verdict": self.verdict.value,
            "found": _json(self.found),
            "interval": [_json(self.low), _json(self.high)],
            "margin": list(self.margin),
            "probability": self.probability,
        }


@dataclass(frozen=True, slots=True)
class Judgement:
    """Both tests of a backend's runs of one task."""

    paired: bool
    mean: Judged
    spread: Judged

    @property
    def verdict(self) -> Verdict:
        found = {self.mean.verdict, self.spread.verdict}
        for verdict in (Verdict.DIFFERENT, Verdict.UNDECIDED):
            if verdict in found:
                return verdict
        return Verdict.INDISTINGUISHABLE

    def as_json(self) -> dict[str, object]:
        return {
            "paired": self.paired,
            "verdict": self.verdict.value,
            "mean": self.mean.as_json(),
            "spread": self.spread.as_json(),
        }


def check_seeds(seeds: Collection[int], reference: Collection[int]) -> None:
    """Raises SeedsError for fewer seeds than `FEWEST_SEEDS`, and for seeds of which some are the reference's."""
    if len(seeds) < FEWEST_SEEDS:
        raise SeedsError(f"{len(seeds)} seeds cannot be judged; give at least {FEWEST_SEEDS}")
    if 0 < len(set(seeds) & set(reference)) < len(seeds):
        raise SeedsError("some seeds are the reference's and some are not; give all or none of them")


def judge(losses: Mapping[int, float], reference: Mapping[int, float]) -> Judgement:
    """Seed -> final held-out loss of a backend and of the reference. Paired where every seed is one of the reference's.

    Raises SeedsError as `check_seeds` does.
    """
    check_seeds(losses, reference)
    shared = losses.keys() & reference.keys()
    everything = np.array(list(reference.values()))
    within = margins(float(everything.std(ddof=1)), len(everything))
    found = np.array([losses[seed] for seed in sorted(losses)])
    if not np.isfinite(found).all():
        lost = Judged("mean", Verdict.DIFFERENT, math.nan, math.nan, math.nan, (-within.mean, within.mean))
        return Judgement(bool(shared), lost, lost)
    if shared:
        beside = np.array([reference[seed] for seed in sorted(losses)])
        return Judgement(True, paired_mean(found - beside, within), paired_spread(found, beside, within))
    return Judgement(False, unpaired_mean(found, everything, within), unpaired_spread(found, everything, within))


# paired: equivalence is shown -----------------------------------------------------------------------------------------
def paired_mean(apart: Sequence[float] | Float64, within: Margins) -> Judged:
    """Student's interval for the mean of the differences, inside +-delta."""
    values = np.asarray(apart, dtype=np.float64)
    half = student_quantile(0.5 + CONFIDENCE / 2.0, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    mean = float(values.mean())
    return _placed("mean of the differences", mean, mean - half, mean + half, (-within.mean, within.mean))


def paired_spread(
    found: Float64,
    reference: Float64,
    within: Margins,
) -> Judged:
    """The interval of Pitman (1939) and Morgan (1939) for the ratio of two correlated standard deviations.

    With w = s_x^2 / s_y^2, their correlation r and K = 1 + 2 (1 - r^2) t^2 / (n - 2), the ratio of variances lies in
    w (K +- sqrt(K^2 - 1)).
    """
    own, theirs = float(found.std(ddof=1)), float(reference.std(ddof=1))
    margin = (1.0 / within.spread, within.spread)
    if own == 0.0:
        return Judged("ratio of standard deviations", Verdict.DIFFERENT, 0.0, 0.0, 0.0, margin)
    ratio, correlation = own / theirs, float(np.corrcoef(found, reference)[0, 1])
    t = student_quantile(0.5 + CONFIDENCE / 2.0, len(found) - 2)
    k = 1.0 + 2.0 * max(1.0 - correlation**2, 0.0) * t * t / (len(found) - 2)
    width = math.sqrt(k + math.sqrt(k * k - 1.0))
    return _placed("ratio of standard deviations", ratio, ratio / width, ratio * width, margin)


def _placed(what: str, found: float, low: float, high: float, margin: tuple[float, float]) -> Judged:
    if margin[0] < low and high < margin[1]:
        verdict = Verdict.INDISTINGUISHABLE
    elif high <= margin[0] or low >= margin[1]:
        verdict = Verdict.DIFFERENT
    else:
        verdict = Verdict.UNDECIDED
    return Judged(what, verdict, found, low, high, margin)


# unpaired: a difference is looked for ---------------------------------------------------------------------------------
def unpaired_mean(
    found: Float64,
    reference: Float64,
    within: Margins,
) -> Judged:
    """Student's two-sample test with a pooled deviation; what it supposes, equal spreads, is judged beside it."""
    n, m = len(found), len(reference)
    pooled = math.sqrt(((n - 1) * found.var(ddof=1) + (m - 1) * reference.var(ddof=1)) / (n + m - 2))
    error, apart = pooled * math.sqrt(1.0 / n + 1.0 / m), float(found.mean() - reference.mean())
    half = student_quantile(0.5 + UNPAIRED_CONFIDENCE / 2.0, n + m - 2) * error
    probability = 2.0 * student_below(-abs(apart) / error, n + m - 2)
    verdict = Verdict.INDISTINGUISHABLE if abs(apart) <= half else Verdict.DIFFERENT
    margin = (-within.mean, within.mean)
    return Judged("difference of the means", verdict, apart, apart - half, apart + half, margin, probability)


def unpaired_spread(
    found: Float64,
    reference: Float64,
    within: Margins,
) -> Judged:
    """Fisher's test of two variances."""
    n, m, tail = len(found), len(reference), 0.5 + UNPAIRED_CONFIDENCE / 2.0
    squared = float(found.var(ddof=1) / reference.var(ddof=1))
    low = squared / fisher_quantile(tail, n - 1, m - 1)
    high = squared * fisher_quantile(tail, m - 1, n - 1)
    below = fisher_below(squared, n - 1, m - 1)
    verdict = Verdict.INDISTINGUISHABLE if low <= 1.0 <= high else Verdict.DIFFERENT
    margin = (1.0 / within.spread, within.spread)
    ratio, ends = math.sqrt(squared), (math.sqrt(low), math.sqrt(high))
    return Judged("ratio of standard deviations", verdict, ratio, *ends, margin, 2.0 * min(below, 1.0 - below))


# what the tests can tell ----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Power:
    """What the tests tell of a reference's spread: `sigma` in nats, `reference_seeds` of them, and `seeds` of a
    backend. All from the normal distribution, integrated, not simulated."""

    sigma: float
    reference_seeds: int
    seeds: int

    @property
    def surely_caught(self) -> float:
        """The shift in nats that the paired test lets through with a probability of at most 0.5 %."""
        return margins(self.sigma, self.reference_seeds).mean

    def false_alarm(self, shift: float, paired_deviation: float) -> float:
        """How often the paired test of the mean fails a backend with this true shift and deviation, in nats."""
        return 1.0 - chance_inside(shift, paired_deviation, self.seeds, self.surely_caught, CONFIDENCE)

    @property
    def caught_unpaired(self) -> float:
        """The least shift in nats that the unpaired test of the mean catches in 95 of 100 times."""
        low, high = 0.0, 100.0 * self.sigma
        for _ in range(40):
            middle = 0.5 * (low + high)
            told = chance_told_apart(middle, self.sigma, self.seeds, self.reference_seeds, UNPAIRED_CONFIDENCE)
            low, high = (low, middle) if told >= CAUGHT else (middle, high)
        return high

    def as_json(self) -> dict[str, float]:
        return {"surely_caught_paired": self.surely_caught, "caught_unpaired_95": self.caught_unpaired}


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
