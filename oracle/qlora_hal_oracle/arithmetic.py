"""Three arithmetics for one forward and backward pass: exact, randomly rounded, and exact with a record of magnitudes.

The model calls `product` for every matrix product, `store` for every value a real backend would write in its compute
dtype, and `store_wide` for what every backend keeps in float32. So one story of the model serves the reference
numbers, the rounding envelope and the a-priori scale of an error bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .arrays import Float64
from .roundoff import UNIT_ROUNDOFF


class Arithmetic(Protocol):
    """How results are formed and kept. `name` says which product it is: a module path or an adapter tensor."""

    def product(self, name: str, left: Float64, right: Float64) -> Float64: ...
    def store(self, values: Float64) -> Float64: ...
    def store_wide(self, values: Float64) -> Float64: ...


class ExactArithmetic:
    """Plain float64."""

    def product(self, name: str, left: Float64, right: Float64) -> Float64:
        return left @ right

    def store(self, values: Float64) -> Float64:
        return values

    def store_wide(self, values: Float64) -> Float64:
        return values


EXACT = ExactArithmetic()


class RandomRounding:
    """Float64 with a random error of the size that a given compute dtype would make at each operation.

    A stored value x becomes x (1 + u r), r uniform in [-1, 1]: the model of Higham, "Accuracy and Stability of
    Numerical Algorithms", section 2.2. A product of length k accumulated at roundoff v gets an error uniform in
    +- v sqrt(k) sqrt(sum of squared terms): the k roundings of a running sum are taken as independent (Higham and Mary,
    "A New Approach to Probabilistic Rounding Error Analysis", 2019), which is where sqrt(k), not k, comes from.
    """

    def __init__(self, unit_roundoff: float, seed: int, *, wide_roundoff: float = UNIT_ROUNDOFF["float32"]) -> None:
        self.unit_roundoff = unit_roundoff
        self.wide_roundoff = wide_roundoff
        self._random = np.random.Generator(np.random.PCG64(seed))

    def product(self, name: str, left: Float64, right: Float64) -> Float64:
        size = self.wide_roundoff * np.sqrt(left.shape[-1] * ((left**2) @ (right**2)))
        return left @ right + size * self._uniform(size.shape)

    def store(self, values: Float64) -> Float64:
        return values * (1.0 + self.unit_roundoff * self._uniform(values.shape))

    def store_wide(self, values: Float64) -> Float64:
        return values * (1.0 + self.wide_roundoff * self._uniform(values.shape))

    def _uniform(self, shape: tuple[int, ...]) -> Float64:
        return self._random.uniform(-1.0, 1.0, shape)


@dataclass(frozen=True, slots=True)
class ErrorScale:
    """What the error bound of one tensor is made of.

    `magnitude` is max(|left| |right|) over the product that makes the tensor, `reduction_length` the longest reduction
    on the way to it, `depth` the number of products that follow one another on that way.
    """

    magnitude: float
    reduction_length: int
    depth: int

    def bound(self, unit_roundoff: float, *, constant: float, wide_roundoff: float = UNIT_ROUNDOFF["float32"]) -> float:
        """constant * sqrt(depth) * (u + v sqrt(k)) * magnitude, with u of the stored values and v of the accumulation.

        One product: storing costs u |y| <= u |left| |right|; accumulating k terms at roundoff v costs at most
        k v |left| |right| and, with independent roundings, about sqrt(k) v of it (Higham, section 3.1; Higham and
        Mary, 2019). Each earlier product on the way hands down an error of its own; independent ones add in squares,
        hence sqrt(depth). In plain float32 u = v and the first term hardly counts: constant * u * sqrt(k depth).
        What the derivation leaves out is amplification (a softmax or a norm with a small denominator): it is what
        `constant` is for, and `envelope.spread` measures it.
        """
        per_product = unit_roundoff + wide_roundoff * math.sqrt(self.reduction_length)
        return constant * math.sqrt(self.depth) * per_product * self.magnitude


# One product of each stage a token passes, forward and back: the rest run beside these, not after them, as a shared
# expert does beside those that were chosen.
_LONGEST_CHAIN = (
    ".q_proj",
    ".qkv_proj",
    ".scores",
    ".mix",
    ".o_proj",
    ".gate_proj",
    ".gate_up_proj",
    ".down_proj",
    ".w1",
    ".w2",
    "lm_head",
    "lm_head.grad_input",
    ".down_proj.grad_input",
    ".w2.grad_input",
    ".w1.grad_input",
    ".gate_proj.grad_input",
    ".gate_up_proj.grad_input",
    ".o_proj.grad_input",
    ".grad_weights",
    ".grad_query",
    ".q_proj.grad_input",
    ".qkv_proj.grad_input",
)
_BESIDE = ".shared_expert"


@dataclass(slots=True)
class MagnitudeRecorder:
    """Exact arithmetic that also notes the `ErrorScale` of each named product.

    A product that occurs once for each micro-batch is a gradient, a sum over them, or a forward value, of which the
    sum is a safe maximum: the magnitudes of equal names add up.
    """

    scales: dict[str, ErrorScale] = field(default_factory=dict)
    _longest: int = 1
    _depth: int = 1

    def start_pass(self) -> None:
        """The next product is the first of a new pass over the model."""
        self._longest, self._depth = 1, 1

    def product(self, name: str, left: Float64, right: Float64) -> Float64:
        self._longest = max(self._longest, left.shape[-1])
        magnitude = float((np.abs(left) @ np.abs(right)).max(initial=0.0))
        before = self.scales.get(name)
        total = magnitude if before is None else before.magnitude + magnitude
        self.scales[name] = ErrorScale(total, self._longest, self._depth)
        self._depth += name.endswith(_LONGEST_CHAIN) and _BESIDE not in name
        return left @ right

    def store(self, values: Float64) -> Float64:
        return values

    def store_wide(self, values: Float64) -> Float64:
        return values
