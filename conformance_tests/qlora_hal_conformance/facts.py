"""A measured fact about one part of a backend: found = base + c * (what should be added), with c fitted.

A part that is right, right but for a factor, missing, or of another kind: the last three look alike in a failed
comparison and have different causes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from qlora_hal_oracle import UNIT_ROUNDOFF
from qlora_hal_oracle.arrays import AnyFloat

MISSING = 0.05
"""A factor below this is nothing that arrives."""
BENT = 0.05
"""What a model that is not linear may bend a factor."""
ROUNDINGS = 16.0
"""Roundings on the way to the logits of two layers, each at most u of their length."""


@dataclass(frozen=True, slots=True)
class Fact:
    """`factor` is the least-squares c of `found` on `expected`, `rest` what it leaves, and `apart` the whole distance,
    both as a part of the length of `expected`. `causes` names factors that have a known reason."""

    what: str
    factor: float
    rest: float
    apart: float
    limit: float
    causes: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        return self.apart <= self.limit

    @property
    def is_a_factor(self) -> bool:
        """Whether one number explains what is wrong: all but rounding, or but a twentieth of what arrives."""
        return not self.is_right and self.rest <= max(self.limit, BENT * abs(self.factor))

    def in_words(self) -> str:
        if self.is_right:
            return f"{self.what}: right"
        if not self.is_a_factor:
            return f"{self.what}: wrong, by no common factor (apart by {100 * self.apart:.3g} %)"
        if abs(self.factor) < MISSING:
            return f"{self.what}: missing"
        reason = next((cause for cause, value in self.causes.items() if _is_near(self.factor, value)), "")
        return f"{self.what}: {self.factor:.3g} times what it should be" + (f", as if {reason}" if reason else "")

    def as_json(self) -> dict[str, object]:
        return {
            "what": self.what,
            "factor": _finite(self.factor),
            "rest": _finite(self.rest),
            "apart": _finite(self.apart),
            "limit": self.limit,
            "causes": dict(self.causes),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, object]) -> Fact:
        causes = record.get("causes")
        assert isinstance(causes, dict)
        factor, rest, apart, limit = (float(str(record[name])) for name in ("factor", "rest", "apart", "limit"))
        return cls(str(record["what"]), factor, rest, apart, limit, {str(k): float(v) for k, v in causes.items()})


def measured(
    what: str,
    found: Iterable[AnyFloat],
    expected: Iterable[AnyFloat],
    dtype: str,
    causes: Mapping[str, float] | None = None,
    *,
    looseness: float = 1.0,
    rounded: AnyFloat | None = None,
) -> Fact:
    """The fact about some arrays taken together.

    A wrong formula is off by a share that half of a dtype's digits show, and rounding by none: the limit is sqrt(u), or
    `looseness` times that. Where the arrays are differences of larger ones, `rounded`, these bring 16 u of their own
    length with them.
    """
    limit = looseness * UNIT_ROUNDOFF[dtype] ** 0.5
    left, right = (
        np.concatenate([np.asarray(a, dtype=np.float64).ravel() for a in each]) for each in (found, expected)
    )
    length = float(np.linalg.norm(right))
    if rounded is not None and length > 0.0:
        limit = max(limit, ROUNDINGS * UNIT_ROUNDOFF[dtype] * float(np.linalg.norm(rounded)) / length)
    if length == 0.0 or not np.isfinite(left).all():
        apart = 0.0 if np.array_equal(left, right) else float("inf")
        return Fact(what, float("nan"), apart, apart, limit, causes or {})
    factor = float(left @ right) / length**2
    rest, apart = (float(np.linalg.norm(left - c * right)) / length for c in (factor, 1.0))
    return Fact(what, factor, rest, apart, limit, causes or {})


def _is_near(found: float, value: float) -> bool:
    return abs(found - value) <= 0.02 * abs(value)


def _finite(value: float) -> float | str:
    return value if np.isfinite(value) else str(value)
