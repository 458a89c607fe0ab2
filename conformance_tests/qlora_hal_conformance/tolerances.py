"""Every bound of the suite: its formula, its constants, and why. No section holds a tolerance of its own.

Notation: u = unit roundoff of the compute dtype (2^-24 float32, 2^-11 float16, 2^-8 bfloat16), u32 = 2^-24,
k = length of the longest reduction on the way, depth = number of products that follow one another,
|L||R| = the largest entry of the product of magnitudes. All three come from the oracle, for the very tensors at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qlora_hal.contract.values import OptimizerSnapshot
from qlora_hal_oracle import UNIT_ROUNDOFF, DropoutMasks, ErrorScale, LossCurveEnvelope, OracleTrainer
from qlora_hal_oracle.adamw import AdamWState, adamw_update, clip_factor, global_norm, idle_experts
from qlora_hal_oracle.arithmetic import MagnitudeRecorder, RandomRounding
from qlora_hal_oracle.arrays import AnyFloat, Bool, Float64, TokenBatch
from qlora_hal_oracle.loss import count_tokens, token_losses

U32 = UNIT_ROUNDOFF["float32"]

ROUNDING_CONSTANT = 8.0
"""c of the forward and gradient bounds, one for all backends. Honest float32 programs were measured at c <= 1.7,
honest bfloat16 ones at c <= 2.5 with two layers; the rest is for amplification by norms and softmax in other draws."""

NOISE_WIDENING = 3.0
"""The error of a whole tensor, as a 2-norm, may be this many times that of a randomly rounded run. The run rounds each
stored value once; a program may round two or three times on the way (a norm before and after its weight, a rotation in
three parts), which is sqrt(3) in squares, and a run's own norm over hundreds of numbers is known to a tenth or so."""

LOSS_CURVE_WIDENING = 3.0
"""A loss curve may lie this many times as far from the exact one as the oracle's randomly rounded runs do."""
LOSS_CURVE_RUNS = 3
"""Randomly rounded runs behind an envelope; it never narrows along the steps, so few suffice."""

SMOOTHNESS = 2.0
"""AdamW's quotient is evaluated at both ends of the gradient's error interval; between the ends it may bulge."""
UPDATE_ROUNDINGS = 16.0
"""Float32 operations of one AdamW update on one number, each at most u32 relative to |p| or to the update."""
MOMENT_ROUNDINGS = 8.0
"""The same for a moment: two products, a sum, and a square."""

PROBE_SECONDS = 0.050
"""The detection budget: what a user waits for each backend at each start, on a machine that has time for it. The best
of several calls counts; a probe that computes, or asks a driver, takes longer in each of them."""

YOUNG_UPDATE_SHORTFALL = 0.5
"""The largest part of the exact change of the logits that the compute dtype may hide. Added onto an output that is
already rounded, an update below half a unit in the last place loses most of its effect (74 to 98 % seen); added before,
it loses none in the mean. The bound lies half-way: rounding's own noise was 5 to 7 % over the tokens of the case."""

OPERAND_SHORTFALL = 0.5
"""The largest part of an operand's rounding to E4M3 that may be missing, of what survives a randomly rounded run. An
honest program has 0.8 to 1.3 of that, one that rounds elsewhere or not at all has 0, give or take 0.05 (seen over the
case's tokens); the bound lies half-way."""
FOREIGN_SHARE = 0.25
"""The largest part of a rounding that nobody asked for: 0, give or take 0.05, where it is not made, 0.5 and more where
it is."""

SHARE_BY_CHANCE = 1.0 / 16.0
MASTER_SHORTFALL = 0.25
"""The largest part of many tiny updates that may be missing. A 16-bit master weight loses all of them, a float32 one
none; the gradient's own sign may be undecided for a few numbers out of a hundred."""

LEARNING_SHORTFALL = 0.5
"""The part of the exact fall of the loss that 8-bit moments, or a whole run's rounding, may cost. Dettmers et al.
2022 find none in the mean; eight steps are few, and a wrong sign, a frozen half or a tenth of the rate cost more."""

EIGHT_BIT_DRIFT = 0.1
"""Where gradients differ in their last bits, few 8-bit codes fall to the other side of a midpoint. Three steps from the
same codes then part by a few per cent of their way; from fresh or wrong moments by all of it."""

BINOMIAL_DEVIATIONS = 6.0
"""A count of independent draws leaves mean +- 6 standard deviations once in 5e8 runs."""

LEAK_SHARE = 0.5
"""A step that keeps one array of logits is a leak; half of that for every step is noise of the allocator."""

ESTIMATE_MARGIN = 1.1
"""A peak may be this many times the estimate. Users plan with it: a tenth is what allocators round up."""

GRID_LEVELS = 16
"""A 4-bit code has this many values."""


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """A number, or one for each place of an array, and the formula it came from."""

    value: float | Float64
    formula: str

    def plus(self, other: Bound) -> Bound:
        """The bound of a difference between two results that each keep their own bound."""
        return Bound(self.value + other.value, f"{self.formula} + {other.formula}")

    def times(self, factor: float, why: str) -> Bound:
        return Bound(self.value * factor, f"{factor:g} ({why}) * {self.formula}")


EXACT = Bound(0.0, "equal, bit for bit")


# forward and gradients ------------------------------------------------------------------------------------------------
def rounding(scale: ErrorScale, dtype: str) -> Bound:
    """c sqrt(depth) (u + u32 sqrt(k)) |L||R|: derived in `oracle.arithmetic.ErrorScale.bound`."""
    return Bound(
        scale.bound(UNIT_ROUNDOFF[dtype], constant=ROUNDING_CONSTANT),
        f"8 sqrt({scale.depth}) (u[{dtype}] + 2^-24 sqrt({scale.reduction_length})) * {scale.magnitude:.3g}",
    )


def logits_bound(oracle: OracleTrainer, batch: TokenBatch, dtype: str) -> Bound:
    """The rounding bound of the head's product."""
    recorder = MagnitudeRecorder()
    oracle.model.forward(batch, recorder)
    return rounding(recorder.scales["lm_head"], dtype)


def gradient_bounds(
    oracle: OracleTrainer, window: Sequence[TokenBatch], dtype: str, *, ranks: int = 1
) -> dict[str, Bound]:
    """The rounding bound of each adapter tensor's gradient; with that of `over_ranks` where some share the window."""
    scales = oracle.error_scales(window)
    bounds = {name: rounding(scales[name], dtype) for name in oracle.export_adapter()}
    if ranks == 1:
        return bounds
    crossing = over_ranks(oracle, window, ranks)
    return {name: bound.plus(crossing[name]) for name, bound in bounds.items()}


def over_ranks(oracle: OracleTrainer, window: Sequence[TokenBatch], ranks: int) -> dict[str, Bound]:
    """What the sum of R ranks' float32 gradients adds to that of one: R - 1 additions, each off by u32 of a partial
    sum, none of which is larger than the sum of the magnitudes of the micro-batches' gradients: (R - 1) u32 max(sum
    |g|). Each rank's own sum is one that the bound of one rank knows already, in another order."""
    tokens = count_tokens(window)
    magnitudes = {name: np.zeros_like(tensor) for name, tensor in oracle.export_adapter().items()}
    for batch in window:
        for name, gradient in oracle.window_gradients([batch], denominator=tokens).gradients.items():
            magnitudes[name] += np.abs(gradient)
    return {
        name: Bound((ranks - 1) * U32 * float(magnitude.max()), f"{ranks - 1} u32 max(sum |g of a micro-batch|)")
        for name, magnitude in magnitudes.items()
    }


def is_coarse(dtype: str) -> bool:
    """Whether the bound of the worst entry is as large as what it bounds: with u = 2^-8 it allows 8 sqrt(13) u, a tenth
    of |L||R|, and sums of a hundred terms of either sign are no larger. What rounding does to a whole tensor is far
    less, so a coarse dtype is judged by `logits_noise` and `gradient_noise` too."""
    return UNIT_ROUNDOFF[dtype] > U32


def logits_noise(oracle: OracleTrainer, batch: TokenBatch, dtype: str) -> Bound:
    """The 2-norm of what rounding does to all logits that are not padding: 3 times that of a randomly rounded run."""
    real = batch.segment_ids != 0
    rounded = oracle.rounded_logits(batch, UNIT_ROUNDOFF[dtype])
    apart = (rounded - oracle.logits(batch))[real]
    return Bound(NOISE_WIDENING * float(np.linalg.norm(apart)), f"3 |error of a run rounded at random to {dtype}|")


def gradient_noise(
    oracle: OracleTrainer,
    window: Sequence[TokenBatch],
    dtype: str,
    *,
    masks: Sequence[DropoutMasks] | None = None,
    denominator: float | None = None,
) -> dict[str, Bound]:
    """The same for each tensor's gradient: 3 times its own error in a randomly rounded run, or the part of its norm
    that rounding takes of all gradients together, where that is more: one tensor's may be small by luck."""
    exact = oracle.window_gradients(window, masks=masks, denominator=denominator).gradients
    rounded = oracle.rounded_gradients(window, UNIT_ROUNDOFF[dtype], masks=masks, denominator=denominator)
    apart = {name: float(np.linalg.norm(rounded[name] - exact[name])) for name in exact}
    part = math.hypot(*apart.values()) / max(global_norm(exact), float(np.finfo(np.float64).tiny))
    return {
        name: Bound(
            NOISE_WIDENING * max(apart[name], part * float(np.linalg.norm(exact[name]))),
            f"3 |error of a run rounded at random to {dtype}|",
        )
        for name in exact
    }


def loss_bound(oracle: OracleTrainer, window: Sequence[TokenBatch], dtype: str, *, ranks: int = 1) -> Bound:
    """2 b sqrt(n) + u32 n * mean loss, with b the bound of the logits and n the counted tokens.

    One token's loss is log sum exp(z) - z[label]; each term moves by at most the largest error of z, so by 2 b
    together. The tokens' errors are of either sign and b is never reached by many, hence sqrt(n) and not n. Summing
    n losses in float32 costs at most u32 n relative, and adding those of R ranks u32 (R - 1). In a coarse dtype b is
    the root mean square of `logits_noise`, three times what one logit's error is like: 2 b sqrt(n) is then 6 times the
    error that a sum of n label's logits has. Where a few logits tower over the others (a tied head finds its own
    token), their errors do too; so it may be 6 times the 2-norm of the tokens' own errors in a randomly rounded run,
    where that is more. A log-sum-exp, being convex, adds up to b^2 / 2 for each token.
    """
    losses = [oracle.evaluate([batch]) for batch in window]
    count = sum(tokens for _, tokens in losses)
    summing = U32 * (count + ranks - 1) * abs(sum(loss for loss, _ in losses))
    if is_coarse(dtype):
        b = max(_root_mean_square(oracle, batch, dtype) for batch in window)
        of_logits, of_tokens = 2.0 * b * math.sqrt(count), 2.0 * NOISE_WIDENING * _token_noise(oracle, window, dtype)
        by_logits, by_tokens = f"2 * {b:.3g} * sqrt({count})", "6 |error of tokens, rounded at random|"
        return Bound(
            max(of_logits, of_tokens) + count * b**2 / 2.0 + summing,
            f"{by_logits if of_logits >= of_tokens else by_tokens} + n * {b:.3g}^2 / 2 + 2^-24 * n * loss",
        )
    logits = max(float(logits_bound(oracle, batch, dtype).value) for batch in window)
    return Bound(2.0 * logits * math.sqrt(count) + summing, f"2 * {logits:.3g} * sqrt({count}) + 2^-24 * n * loss")


def _root_mean_square(oracle: OracleTrainer, batch: TokenBatch, dtype: str) -> float:
    numbers = int(np.count_nonzero(batch.segment_ids)) * oracle.model.shape.vocab_size
    return float(logits_noise(oracle, batch, dtype).value) / math.sqrt(max(numbers, 1))


def _token_noise(oracle: OracleTrainer, window: Sequence[TokenBatch], dtype: str) -> float:
    """The 2-norm of the error of each counted token's loss in a randomly rounded run."""
    apart = []
    for batch in window:
        rounded = oracle.rounded_logits(batch, UNIT_ROUNDOFF[dtype])
        apart.append(float(np.linalg.norm(token_losses(rounded, batch.labels) - oracle.token_losses(batch))))
    return math.hypot(*apart)


def norm_bound(bounds: Mapping[str, Bound], gradients: Mapping[str, Float64]) -> Bound:
    """sqrt(sum over tensors of size * bound^2): a norm moves by no more than the norm of the error. Plus its own
    float32 sum."""
    squares = sum(gradients[name].size * float(bound.value) ** 2 for name, bound in bounds.items())
    return Bound(math.sqrt(squares) + _summed(gradients), "sqrt(sum size * gradient bound^2) + (8 + sqrt(n)) u32 norm")


def norm_noise(noise: Mapping[str, Bound], gradients: Mapping[str, Float64]) -> Bound:
    """The same from what rounding does to whole tensors."""
    together = math.hypot(*(float(bound.value) for bound in noise.values()))
    return Bound(together + _summed(gradients), "sqrt(sum gradient noise^2) + (8 + sqrt(n)) u32 norm")


def _summed(gradients: Mapping[str, Float64]) -> float:
    """What a float32 sum of n squares, added in whatever order, may cost their root: sqrt(n) u32 of it, twice the mean
    of n roundings of either sign (Higham and Mary 2019), and 8 u32 for the numbers themselves."""
    numbers = sum(gradient.size for gradient in gradients.values())
    return (MOMENT_ROUNDINGS + math.sqrt(numbers)) * U32 * global_norm(gradients)


def summed(values: AnyFloat, terms: int) -> Bound:
    """A float32 sum of equal terms, n u32 |x| at each place (Higham, section 4.2); and the terms themselves may be made
    in another order each time, u32 max|x| of their own float32 sums."""
    magnitude = np.abs(np.asarray(values, dtype=np.float64))
    return Bound(terms * U32 * (magnitude + magnitude.max(initial=0.0)), f"{terms} u32 (|x| + max|x|)")


def summed_in_float64(magnitude: AnyFloat, terms: int) -> Bound:
    """A float64 sum of a few terms in whatever order: (n - 1) 2^-53 sum |x| (Higham, section 4.2)."""
    return Bound((terms - 1) * 2.0**-53 * np.asarray(magnitude, np.float64), f"{terms - 1} 2^-53 sum |x|")


def copied(values: AnyFloat) -> Bound:
    """One float32 rounding of values that were handed over."""
    return Bound(U32 * np.abs(np.asarray(values, dtype=np.float64)), "u32 |x|")


# quantization ---------------------------------------------------------------------------------------------------------
def stored_rounding(weight: AnyFloat, dtype: str) -> Float64:
    """What reading a weight into the compute dtype and writing the decoded one in it may cost: 2 u |w| and one
    subnormal."""
    tiny = 2.0**-25 if dtype == "float16" else 0.0
    rounded: Float64 = 2.0 * UNIT_ROUNDOFF[dtype] * np.abs(np.asarray(weight, dtype=np.float64)) + tiny
    return rounded


def format_error(codec_bound: Float64, weight: AnyFloat, dtype: str) -> Bound:
    """The codec's own bound (`oracle.four_bit`, `oracle.int8`, `oracle.mlx_affine`), and two roundings to the compute
    dtype: 2 u (|w| + codec bound)."""
    return Bound(
        codec_bound * (1.0 + 2.0 * UNIT_ROUNDOFF[dtype]) + stored_rounding(weight, dtype),
        f"codec bound of the block + 2 u[{dtype}] |w|",
    )


def decoded_exactly(decoded: AnyFloat, dtype: str) -> Bound:
    """A product of a code and a scale in float32, perhaps with an offset: 4 u32 |w|; then one rounding to the compute
    dtype."""
    magnitude = np.abs(np.asarray(decoded, dtype=np.float64))
    largest = magnitude.max(initial=0.0)
    return Bound(4.0 * U32 * largest + stored_rounding(decoded, dtype) / 2.0, f"4 u32 max|w| + u[{dtype}] |w|")


def codebook_distance(dtype: str) -> Bound:
    """How far decoded / absmax may lie from a codebook entry: both are rounded to the compute dtype, the quotient of
    two such numbers is off by 2 u + 4 u32."""
    return Bound(2.0 * UNIT_ROUNDOFF[dtype] + 4.0 * U32, f"2 u[{dtype}] + 4 u32")


def nearest_entry(absmax: Float64, weight: AnyFloat, dtype: str) -> Bound:
    """How much further than the nearest entry the chosen one may lie: where a value is within rounding of a midpoint
    the encoder may take either neighbour. 8 u32 a, and the value itself is rounded to the compute dtype first, as is
    absmax: 4 u a."""
    return Bound(
        (8.0 * U32 + 4.0 * UNIT_ROUNDOFF[dtype]) * absmax + 2.0 * stored_rounding(weight, dtype),
        f"(8 u32 + 4 u[{dtype}]) absmax + 4 u |w|",
    )


def grid_spacing(step: Float64, dtype: str) -> Bound:
    """Levels of an affine code are whole steps apart, up to rounding of the levels to float16 scales and the dtype."""
    return Bound(GRID_LEVELS * (UNIT_ROUNDOFF["float16"] + UNIT_ROUNDOFF[dtype]) * step, f"16 (u16 + u[{dtype}]) step")


def solver_error(group: AnyFloat, codes: int) -> Bound:
    """The root mean square error of a group that a GPTQ solver may leave: one step of a min-max grid, asymmetric or
    symmetric. Plain rounding leaves 0.29 steps; the solver trades error between columns for a better product."""
    values = np.asarray(group, dtype=np.float64)
    reach = np.maximum(values.max(axis=1) - values.min(axis=1), 2.0 * np.abs(values).max(axis=1))
    return Bound(reach / (codes - 1), "one step of the group's grid")


# optimizer ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """What one AdamW update is given."""

    learning_rate: float
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


@dataclass(frozen=True, slots=True, eq=False)
class UpdateBounds:
    """Bounds after one step, by tensor name: parameters, and moments under `<tensor>.exp_avg` / `.exp_avg_sq`."""

    parameters: dict[str, Bound]
    moments: dict[str, Bound]


def update_bounds(
    oracle: OracleTrainer, window: Sequence[TokenBatch], dtype: str, given: UpdateSettings, *, ranks: int = 1
) -> UpdateBounds:
    """Bounds of the step that `oracle` is about to take, of a window that so many ranks share.

    Let e be the gradient's bound. The clip factor f moves by at most f * (norm bound / norm), so the clipped gradient
    by E = f (e + |g| norm bound / norm). The update is evaluated at g - E, g and g + E; the larger distance, twice
    (SMOOTHNESS), is the bound: where |g| <= E an early Adam step has an undecided sign, and this says so by itself. The
    gradient of an expert without tokens is no result of sums: E is 0. Float32 adds 16 u32 (|p| + |update|). Moments:
    (1 - b1) E and (1 - b2) (2 |g| E + E^2), plus 8 u32.
    """
    gradients = oracle.gradients(window)
    bounds = gradient_bounds(oracle, window, dtype, ranks=ranks)
    norm = global_norm(gradients)
    relative_norm = float(norm_bound(bounds, gradients).value) / norm
    factor = clip_factor(norm, given.max_grad_norm)
    center = {name: gradient * factor for name, gradient in gradients.items()}
    idle = idle_experts(gradients)
    error = {
        name: np.where(
            idle.get(name, np.False_), 0.0, factor * (float(bounds[name].value) + np.abs(gradient) * relative_norm)
        )
        for name, gradient in gradients.items()
    }
    start, (step, moments) = oracle.export_adapter(), oracle.export_optimizer()
    exact, state = _updated(start, center, step, moments, given)
    low, _ = _updated(start, {n: center[n] - error[n] for n in center}, step, moments, given)
    high, _ = _updated(start, {n: center[n] + error[n] for n in center}, step, moments, given)
    parameters: dict[str, Bound] = {}
    of_moments: dict[str, Bound] = {}
    for name, gradient in center.items():
        bulge = np.maximum(np.abs(low[name] - exact[name]), np.abs(high[name] - exact[name]))
        own = UPDATE_ROUNDINGS * U32 * (np.abs(start[name]) + np.abs(exact[name] - start[name]))
        parameters[name] = Bound(SMOOTHNESS * bulge + own, "2 |update(g +- E) - update(g)| + 16 u32 (|p| + |update|)")
        first, second = state.exp_avg[name], state.exp_avg_sq[name]
        kept_first = np.abs(moments[f"{name}.exp_avg"])
        of_moments[f"{name}.exp_avg"] = Bound(
            (1 - given.beta1) * error[name] + MOMENT_ROUNDINGS * U32 * (np.abs(first) + kept_first + np.abs(gradient)),
            "(1 - b1) E + 8 u32 (|m| + |g|)",
        )
        squares = 2.0 * np.abs(gradient) * error[name] + error[name] ** 2
        of_moments[f"{name}.exp_avg_sq"] = Bound(
            (1 - given.beta2) * squares + MOMENT_ROUNDINGS * U32 * (second + moments[f"{name}.exp_avg_sq"]),
            "(1 - b2) (2 |g| E + E^2) + 8 u32 v",
        )
    return UpdateBounds(parameters, of_moments)


@dataclass(frozen=True, slots=True, eq=False)
class OwnUpdate:
    """What one AdamW update is by the moments it left behind: the clipped gradient, the second moments and the
    parameters that belong to it, and bounds for them."""

    gradients: dict[str, Float64]
    gradient_bounds: dict[str, Bound]
    second: dict[str, Float64]
    second_bounds: dict[str, Bound]
    parameters: dict[str, Float64]
    parameter_bounds: dict[str, Bound]
    norm_bound: Bound


def own_update(
    start: Mapping[str, AnyFloat], before: OptimizerSnapshot, after: OptimizerSnapshot, given: UpdateSettings
) -> OwnUpdate:
    """The gradient is (m1 - b1 m0) / (1 - b1), known to e = 8 u32 (|m1| + |m0|) / (1 - b1). It must have left
    v1 = b2 v0 + (1 - b2) g^2, to (1 - b2) (2 |g| e + e^2) + 8 u32 v; and m1 and v1 as they stand must have moved the
    parameters, to 16 u32 (|p| + |update|) and what a float32 1 - b^step is off by, u32 / (1 - b^step) of the update. An
    expert of which no moment moved had no tokens: it has no gradient, and its parameters may not have moved either."""
    step, still = after.step, _still_experts(before, after)
    corrections = (1.0 - given.beta1**step, 1.0 - given.beta2**step)
    own = UPDATE_ROUNDINGS * U32 + sum(U32 / correction for correction in corrections)
    exact = OwnUpdate({}, {}, {}, {}, {}, {}, Bound(0.0, ""))
    unsure = 0.0
    for name, tensor in start.items():
        p0 = np.asarray(tensor, dtype=np.float64)
        (m0, v0), (m1, v1) = (
            tuple(held.moments[f"{name}.{kind}"].astype(np.float64) for kind in ("exp_avg", "exp_avg_sq"))
            for held in (before, after)
        )
        gradient = (m1 - given.beta1 * m0) / (1.0 - given.beta1)
        error = MOMENT_ROUNDINGS * U32 * (np.abs(m1) + np.abs(m0)) / (1.0 - given.beta1)
        second = given.beta2 * v0 + (1.0 - given.beta2) * gradient**2
        of_second = (1.0 - given.beta2) * (2.0 * np.abs(gradient) * error + error**2)
        update = m1 / corrections[0] / (np.sqrt(v1 / corrections[1]) + given.epsilon)
        update = given.learning_rate * (update + given.weight_decay * p0)
        if name in still:
            gradient, error, of_second, update = (
                np.where(still[name], 0.0, values) for values in (gradient, error, of_second, update)
            )
            second = np.where(still[name], v0, second)
        exact.gradients[name], exact.second[name], exact.parameters[name] = gradient, second, p0 - update
        exact.second_bounds[name] = Bound(
            of_second + MOMENT_ROUNDINGS * U32 * (second + v0), "(1 - b2) (2 |g| e + e^2) + 8 u32 v"
        )
        exact.parameter_bounds[name] = Bound(
            UPDATE_ROUNDINGS * U32 * np.abs(p0) + own * np.abs(update),
            "16 u32 (|p| + |update|) + u32 |update| / (1 - b^step)",
        )
        exact.gradient_bounds[name] = Bound(float(np.linalg.norm(error)), "|e|")
        unsure = math.hypot(unsure, float(np.linalg.norm(error)))
    of_norm = Bound(unsure + _summed(exact.gradients), "|e| + (8 + sqrt(n)) u32 norm")
    return replace(exact, norm_bound=of_norm)


def _still_experts(before: OptimizerSnapshot, after: OptimizerSnapshot) -> dict[str, Bool]:
    """`[experts, 1, 1]` by name of an adapter tensor of a stack: whether the first moments of A and of B are what they
    were, to the last bit."""
    changes = {
        name.removesuffix(".exp_avg"): (after.moments[name] - moment).astype(np.float64)
        for name, moment in before.moments.items()
        if name.endswith(".exp_avg")
    }
    return idle_experts(changes)


def first_update(learning_rate: float, parameters: AnyFloat) -> Bound:
    """AdamW's first step without decay is rate * g / (|g| + eps): at most the rate. Plus 16 u32 (|p| + rate)."""
    own = UPDATE_ROUNDINGS * U32 * (np.abs(np.asarray(parameters, dtype=np.float64)) + learning_rate)
    return Bound(learning_rate + own, "learning rate + 16 u32 (|p| + rate)")


def resumed_bounds(
    oracle: OracleTrainer,
    windows: Sequence[Sequence[TokenBatch]],
    dtype: str,
    given: UpdateSettings | Sequence[UpdateSettings],
    *,
    ranks: int = 1,
) -> dict[str, Bound]:
    """For a backend that does not claim equal bits: two runs of several steps from one state part by at most the sum,
    over the steps, of twice the bound of that step. `oracle` walks along. An error of one step also bends the gradient
    of the next; it is far below that step's own rounding bound, because a bound of an update is far below a weight.
    What is `given` may differ from step to step; so many `ranks` share each window."""
    total: dict[str, Bound] = {}
    of_each = [given] * len(windows) if isinstance(given, UpdateSettings) else given
    for window, settings in zip(windows, of_each, strict=True):
        step = update_bounds(oracle, window, dtype, settings, ranks=ranks).parameters
        for name, bound in step.items():
            twice = bound.times(2.0, "two runs")
            total[name] = twice if name not in total else total[name].plus(twice)
        oracle.train_step(
            window,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
        )
    return {name: Bound(bound.value, "sum over steps of 2 * bound of one step") for name, bound in total.items()}


def _updated(
    start: Mapping[str, Float64],
    gradients: Mapping[str, Float64],
    step: int,
    moments: Mapping[str, Float64],
    given: UpdateSettings,
) -> tuple[dict[str, Float64], AdamWState]:
    parameters = {name: tensor.copy() for name, tensor in start.items()}
    state = AdamWState(
        step,
        {name: moments[f"{name}.exp_avg"] for name in start},
        {name: moments[f"{name}.exp_avg_sq"] for name in start},
    )
    adamw_update(
        parameters,
        gradients,
        state,
        learning_rate=given.learning_rate,
        weight_decay=given.weight_decay,
        betas=(given.beta1, given.beta2),
        eps=given.epsilon,
    )
    return parameters, state


# counts, memory, time -------------------------------------------------------------------------------------------------
def loss_curve_bound(envelope: LossCurveEnvelope, tokens: int) -> Bound:
    """3 times the widest deviation that the oracle's randomly rounded runs showed up to each step, and what summing n
    losses in float32 costs, which those runs do not know of: 2 sqrt(n) u32 * loss."""
    summing = 2.0 * math.sqrt(tokens) * U32 * np.abs(envelope.exact)
    return Bound(
        LOSS_CURVE_WIDENING * envelope.deviation + summing,
        f"3 * deviation of randomly rounded runs + 2 sqrt({tokens}) u32 loss",
    )


def kept_share(draws: int, probability: float) -> Bound:
    """6 sqrt(p (1 - p) / n): six standard deviations of a share of n independent draws."""
    deviation = math.sqrt(probability * (1.0 - probability) / draws)
    return Bound(BINOMIAL_DEVIATIONS * deviation, f"6 sqrt(p (1 - p) / {draws})")


def agreement_of_chance(probability: float) -> float:
    """How often two independent masks agree: p^2 + (1 - p)^2."""
    return probability**2 + (1.0 - probability) ** 2


def agreement_above_chance(draws: int, probability: float) -> Bound:
    """Six standard deviations of the share of places where two independent masks agree."""
    expected = agreement_of_chance(probability)
    deviation = math.sqrt(expected * (1.0 - expected) / draws)
    return Bound(BINOMIAL_DEVIATIONS * deviation, f"6 deviations of a share of {draws} places")


def memory_growth(logits_bytes: int, steps: int) -> Bound:
    """Half of one array of logits for every step."""
    return Bound(LEAK_SHARE * logits_bytes * steps, f"0.5 * {logits_bytes} bytes of logits * {steps} steps")


def estimated_peak(estimated_bytes: int) -> Bound:
    """What the memory estimate allows."""
    return Bound(ESTIMATE_MARGIN * estimated_bytes, f"{ESTIMATE_MARGIN} * {estimated_bytes} estimated bytes")


def young_update() -> Bound:
    return Bound(YOUNG_UPDATE_SHORTFALL, "half of the exact change of the logits")


def operand_part(survives: float) -> Bound:
    """E4M3 takes v to v + e with |e| <= q / 2, half a step. An input that is off by d from the oracle's falls to the
    neighbouring number with probability |d| / q; where it does, v lies next to a midpoint and e turns from about q / 2
    to -q / 2. Of the effect <e, e> = q^2 / 12 a flip takes q^2 / 2, so 1 - 6 E|d| / q survives: 0.9 where d is one
    rounding to bfloat16, less behind other products. A randomly rounded run of the oracle shows how much; half of that
    may be missing."""
    return Bound(1.0 - OPERAND_SHORTFALL * survives, f"1 - 0.5 * {survives:.2f} found in a run rounded at random")


def foreign_part() -> Bound:
    return Bound(FOREIGN_SHARE, "a quarter of that rounding's effect")


def beside_bfloat16(in_fp8: Sequence[Sequence[float]], without: Sequence[Sequence[float]]) -> Bound:
    """How far a loss curve with 8-bit products may lie from the one without: 3 times as far as the oracle's are apart,
    up to each step, or as all of them are in the mean of squares: at one step a few may be close by luck. All of its
    runs are rounded at random, and pairs share no roundings."""
    apart = np.abs(np.asarray(in_fp8) - np.asarray(without))
    widest = np.maximum(np.maximum.accumulate(apart.max(axis=0)), np.sqrt((apart**2).mean()))
    return Bound(LOSS_CURVE_WIDENING * widest, "3 |oracle in fp8 - oracle without|, rounded at random")


@dataclass(frozen=True, slots=True)
class StartSigns:
    """Bounds of the share of B's entries that start the other way, and of how far B's gradient is off."""

    share: Bound
    gradient: Bound


def start_signs(in_fp8: OracleTrainer, without: OracleTrainer, window: Sequence[TokenBatch], dtype: str) -> StartSigns:
    """3 times what it is between the oracle's two gradients, each of a run rounded at random."""
    found = [
        oracle.window_gradients(window, arithmetic=RandomRounding(UNIT_ROUNDOFF[dtype], seed)).gradients
        for seed, oracle in enumerate((in_fp8, without))
    ]
    one, other = (
        np.concatenate([gradients[name].ravel() for name in sorted(gradients) if "lora_B" in name])
        for gradients in found
    )
    share = float(np.mean(np.sign(one) != np.sign(other)))
    apart = float(np.linalg.norm(one - other) / np.linalg.norm(other))
    formula = "3 |oracle in fp8 - oracle without|, both rounded at random"
    return StartSigns(Bound(NOISE_WIDENING * share, formula), Bound(NOISE_WIDENING * apart, formula))


def drift_of_steps(
    exact: OracleTrainer, rounded: OracleTrainer, steps: Sequence[Callable[[OracleTrainer], object]]
) -> dict[str, Bound]:
    """How far two runs of the same steps may part where equal bits are not claimed: 3 times as far as the oracle's run
    and one that rounds at random, as 2-norms of tensors. Both oracles are left at the end of the steps."""
    for step in steps:
        for oracle in (exact, rounded):
            step(oracle)
    found, expected = rounded.export_adapter(), exact.export_adapter()
    return {
        name: Bound(
            NOISE_WIDENING * float(np.linalg.norm(found[name] - expected[name])),
            "3 |steps of the oracle, rounded at random - steps of the oracle|",
        )
        for name in expected
    }


def learning_shortfall() -> Bound:
    return Bound(LEARNING_SHORTFALL, "half of the exact fall of the loss")


def eight_bit_drift() -> Bound:
    return Bound(EIGHT_BIT_DRIFT, "a tenth of the way")


def master_weights() -> Bound:
    return Bound(MASTER_SHORTFALL, "a quarter of the distance of all updates")


def values_of_the_compute_dtype() -> Bound:
    """Of float32 values whose last digits are as good as drawn, one in 2^13 is a float16 and one in 2^16 a bfloat16; of
    a tensor that was kept in one of them, all are."""
    return Bound(SHARE_BY_CHANCE, "a sixteenth of the values: chance gives one in 2^13")


def probe_time() -> Bound:
    return Bound(PROBE_SECONDS, "50 ms")
