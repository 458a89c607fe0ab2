"""How far rounding alone may move a result: the same computation repeated with random roundings.

An a-priori bound knows nothing of amplification (an early Adam step turns the sign of a tiny gradient into a full
step of the learning rate). Repeating the run with the roundings of the compute dtype measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .arithmetic import EXACT, Arithmetic, RandomRounding
from .arrays import AnyFloat, Float64

Measurement = Callable[[Arithmetic], Mapping[str, AnyFloat]]
"""Computes named arrays with the arithmetic it is given, from the start and always on the same data."""


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """The exact value of one array and the largest deviation of the randomly rounded runs at each of its places."""

    exact: Float64
    deviation: Float64

    def allows(self, measured: AnyFloat, *, widening: float) -> bool:
        """Whether `measured` lies everywhere within `widening` deviations of the exact value."""
        return self.excess(measured, widening=widening) <= 1.0

    def excess(self, measured: AnyFloat, *, widening: float) -> float:
        """The largest |measured - exact| as a fraction of what is allowed; NaN in `measured` gives infinity."""
        distance = np.abs(np.asarray(measured, dtype=np.float64) - self.exact)
        with np.errstate(divide="ignore", invalid="ignore"):
            fraction = np.where(distance == 0.0, 0.0, distance / (widening * self.deviation))
        return float(np.nan_to_num(fraction, nan=np.inf).max(initial=0.0))


def spread(measure: Measurement, *, unit_roundoff: float, runs: int, first_seed: int = 0) -> dict[str, Spread]:
    """Run `measure` once exactly and `runs` times with random roundings of a compute dtype.

    `unit_roundoff` is that of stored values; accumulation and master weights stay float32. The deviation at a place is
    the largest of all runs there, but at least the root mean square over the array: with few runs a single place can
    be near zero by luck.
    """
    exact = {name: np.asarray(value, dtype=np.float64) for name, value in measure(EXACT).items()}
    deviations = {name: np.zeros_like(value) for name, value in exact.items()}
    for run in range(runs):
        for name, value in measure(RandomRounding(unit_roundoff, first_seed + run)).items():
            deviations[name] = np.maximum(deviations[name], np.abs(value - exact[name]))
    return {
        name: Spread(exact[name], np.maximum(deviation, np.sqrt((deviation**2).mean())))
        for name, deviation in deviations.items()
    }


@dataclass(frozen=True, slots=True, eq=False)
class LossCurveEnvelope:
    """Exact loss of each step, and the deviation rounding had caused up to that step."""

    exact: Float64
    deviation: Float64

    def excess(self, losses: Sequence[float], *, widening: float = 3.0) -> float:
        """The largest distance from the exact curve as a fraction of what is allowed; above 1 is outside."""
        return Spread(self.exact, self.deviation).excess(np.asarray(losses, dtype=np.float64), widening=widening)


def loss_curve_envelope(
    train: Callable[[Arithmetic], Sequence[float]], *, unit_roundoff: float, runs: int, first_seed: int = 0
) -> LossCurveEnvelope:
    """Envelope of the losses that `train` returns, one to a step.

    The deviation of a step is the largest of all runs at this step or before: two runs that have parted may cross
    again by chance, but neither may be expected to.
    """

    def measure(arithmetic: Arithmetic) -> dict[str, Float64]:
        return {"loss": np.asarray(train(arithmetic), dtype=np.float64)}

    exact = measure(EXACT)["loss"]
    apart = [np.abs(measure(RandomRounding(unit_roundoff, first_seed + run))["loss"] - exact) for run in range(runs)]
    return LossCurveEnvelope(exact, np.maximum.accumulate(np.max(apart, axis=0)))
