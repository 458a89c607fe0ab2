"""What a case writes down while it compares: every measured number beside its bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from qlora_hal_conformance.tolerances import EXACT, Bound
from qlora_hal_conformance.verdicts import Measure
from qlora_hal_oracle.arrays import AnyFloat


@dataclass(slots=True)
class Judge:
    """Collects the measures of one case; the first that does not hold fails it."""

    measures: list[Measure] = field(default_factory=list)

    def at_most(self, what: str, measured: float, bound: Bound) -> None:
        """`measured` must not exceed the bound; NaN always does."""
        self._note(Measure(what, float(measured), float(bound.value), bound.formula))

    def within(self, what: str, found: AnyFloat, expected: AnyFloat, bound: Bound) -> None:
        """|found - expected| must not exceed the bound at any place; the place that uses most of it is written down."""
        left, right = (np.asarray(values, dtype=np.float64) for values in (found, expected))
        assert left.shape == right.shape, f"{what}: shape {left.shape}, expected {right.shape}"
        with np.errstate(invalid="ignore"):
            apart = np.abs(left - right)
        apart = np.where(np.isfinite(apart), apart, np.inf)
        allowed = np.broadcast_to(np.asarray(bound.value, dtype=np.float64), apart.shape)
        if not apart.size:
            raise AssertionError(f"{what}: nothing to compare")
        with np.errstate(divide="ignore", invalid="ignore"):
            used = np.where(apart == 0.0, 0.0, apart / allowed)
        place = np.unravel_index(int(np.argmax(used)), used.shape)
        self._note(Measure(what, float(apart[place]), float(allowed[place]), bound.formula))

    def whole(self, what: str, found: AnyFloat, expected: AnyFloat, bound: Bound) -> None:
        """The 2-norm of found - expected must not exceed the bound."""
        left, right = (np.asarray(values, dtype=np.float64) for values in (found, expected))
        assert left.shape == right.shape, f"{what}: shape {left.shape}, expected {right.shape}"
        self.at_most(f"{what} as a whole", float(np.linalg.norm(left - right)), bound)

    def all_whole(
        self, what: str, found: Mapping[str, AnyFloat], expected: Mapping[str, AnyFloat], bounds: Mapping[str, Bound]
    ) -> None:
        """`whole` for each named tensor; the tightest is the one written down."""
        each = Judge()
        for name in expected:
            try:
                each.whole(f"{what}, {_short(name)}", found[name], expected[name], bounds[name])
            except AssertionError:
                self.measures += each.measures[-1:]
                raise
        self.measures.append(max(each.measures, key=lambda measure: measure.used))

    def all_within(
        self, what: str, found: Mapping[str, AnyFloat], expected: Mapping[str, AnyFloat], bounds: Mapping[str, Bound]
    ) -> None:
        """`within` for each named tensor; the names must be the same. The tightest tensor is the one written down."""
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        assert missing == extra == [], f"{what}: tensors missing {missing[:3]}, unexpected {extra[:3]}"
        each = Judge()
        for name in expected:
            try:
                each.within(f"{what}, {_short(name)}", found[name], expected[name], bounds[name])
            except AssertionError:
                self.measures += each.measures[-1:]
                raise
        self.measures.append(max(each.measures, key=lambda measure: measure.used))

    def equal(self, what: str, found: Mapping[str, AnyFloat], expected: Mapping[str, AnyFloat]) -> None:
        """Bit for bit."""
        self.all_within(what, found, expected, dict.fromkeys(expected, EXACT))

    def apart(self, what: str, found: AnyFloat, other: AnyFloat, bound: Bound) -> None:
        """The two must differ by *more* than the bound somewhere: a change that must show, shows beyond rounding."""
        distance = np.abs(np.asarray(found, dtype=np.float64) - np.asarray(other, dtype=np.float64))
        largest = float(np.max(distance / np.maximum(np.asarray(bound.value), np.finfo(np.float64).tiny), initial=0.0))
        inverse = 1.0 / largest if largest > 0.0 else float("inf")
        self._note(Measure(f"{what} (bound / change)", inverse, 1.0, f"the change exceeds {bound.formula}"))

    def apart_as_a_whole(self, what: str, found: AnyFloat, other: AnyFloat, bound: Bound) -> None:
        """The 2-norm of the change must exceed the bound."""
        change = float(np.linalg.norm(np.asarray(found, dtype=np.float64) - np.asarray(other, dtype=np.float64)))
        inverse = float(bound.value) / change if change > 0.0 else float("inf")
        self._note(Measure(f"{what} (bound / change)", inverse, 1.0, f"the change exceeds {bound.formula}"))

    def _note(self, measure: Measure) -> None:
        self.measures.append(measure)
        if not measure.holds:
            raise AssertionError(
                f"{measure.what}: measured {measure.measured:.3g}, bound {measure.bound:.3g} = {measure.formula}"
            )


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".weight")
