"""Products in 8-bit floats, taken apart: what the rounding of each operand does to a result, and how much is there.

Rounding to E4M3 moves a result by a few per cent; so does an input that is off by bfloat16's rounding, because it may
fall to the other side of a midpoint. The size of a difference to the oracle therefore tells little; its direction does.
The oracle with the rounding of one operand differs by D from the one without. Of what a backend's result differs from
the oracle without any rounding, the part along D is much the same for every honest program, and 0 for one that rounds
elsewhere or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from qlora_hal.contract.values import Adapter, Batch, Float32
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.fixtures import Opened, make_oracle
from qlora_hal_conformance.random_inputs import at_real_tokens
from qlora_hal_conformance.tolerances import foreign_part, operand_part
from qlora_hal_oracle import EXACT, UNIT_ROUNDOFF, DropoutMasks, Fp8Products, OracleTrainer, RandomRounding
from qlora_hal_oracle.arrays import AnyFloat, Float64
from qlora_hal_oracle.fp8 import row_scaled
from qlora_hal_oracle.random_models import HEAD

NONE = Fp8Products(weights=False, inputs=False, gradients=False)
WEIGHTS = Fp8Products(inputs=False, gradients=False)
WEIGHTS_AND_INPUTS = Fp8Products(gradients=False)
ALL = Fp8Products()


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """What a window gives: logits of its real tokens, and each tensor's gradient."""

    logits: Float64
    gradients: Mapping[str, AnyFloat]

    def flat_logits(self) -> Float64:
        """All of them in one row."""
        return self.logits.ravel()

    def flat_gradients(self, sizes: Mapping[str, float]) -> Float64:
        """All of them in one row, each divided by its size, so that none outweighs the others."""
        return np.concatenate([np.asarray(self.gradients[name], np.float64).ravel() / sizes[name] for name in sizes])


@dataclass(frozen=True, slots=True, eq=False)
class TakenApart:
    """The oracle of one opened trainer, with all, some or none of the operands rounded."""

    ready: Opened
    base: Mapping[str, Float32]
    adapter: Adapter
    window: Sequence[Batch]
    masks: Sequence[DropoutMasks]

    @classmethod
    def of(cls, ready: Opened, window: Sequence[Batch], key: int) -> TakenApart:
        assert ready.adapter is not None
        return cls(ready, ready.own_base(), ready.adapter, window, [ready.masks(batch, key) for batch in window])

    def found(self, key: int) -> Results:
        """The backend's."""
        logits = [at_real_tokens(self.ready.trainer.logits(batch), batch) for batch in self.window]
        return Results(
            np.concatenate(logits).astype(np.float64), self.ready.trained_gradient(self.window, dropout_key=key)
        )

    def oracle(self, fp8: Fp8Products, *, rounded: bool = False) -> OracleTrainer:
        arithmetic = RandomRounding(UNIT_ROUNDOFF[self.ready.dtype], seed=0) if rounded else EXACT
        return make_oracle(self.ready.model.shape, self.base, self.adapter, arithmetic, fp8=fp8)

    def results(self, oracle: OracleTrainer, *, adapters_too: bool = False) -> Results:
        """An oracle's; with `adapters_too` as if the adapters read what the products with the base read."""
        views: Sequence[DropoutMasks] = [{}] * len(self.window)  # of logits, without dropout
        masks = self.masks
        if adapters_too:
            views, masks = (self._rounding_inputs(oracle, given) for given in (views, masks))
        logits = [
            at_real_tokens(oracle.model.forward(batch, oracle.arithmetic, view).logits, batch)
            for batch, view in zip(self.window, views, strict=True)
        ]
        return Results(np.concatenate(logits), oracle.window_gradients(self.window, masks=masks).gradients)

    def with_rounded_head(self) -> TakenApart:
        """As if the head were one of the base's linear layers."""
        head = np.asarray(self.base[HEAD], np.float64)
        return replace(self, base={**self.base, HEAD: row_scaled(head).values.astype(np.float32)})

    def _rounding_inputs(self, oracle: OracleTrainer, masks: Sequence[DropoutMasks]) -> list[DropoutMasks]:
        """Masks that make of each adapter's input the one that its product with the base sees."""
        found: list[DropoutMasks] = []
        for batch, given in zip(self.window, masks, strict=True):
            ratios: dict[str, Float64] = {}
            for at, layer in enumerate(oracle.model.forward(batch, masks=given).layers):
                for name, trace in layer.linears.items():
                    x, path = trace.x, f"model.layers.{at}.{name}"
                    ratio = np.divide(row_scaled(x).values, x, out=np.ones_like(x), where=x != 0.0)
                    ratios[path] = ratio * given.get(path, 1.0)
            found.append(ratios)
        return found


def judge_parts(ready: Opened, window: Sequence[Batch], judging: Judge, *, key: int = 0) -> None:
    """The roundings of weights, inputs and gradients are there, in logits and gradients; those of the head's weight and
    of the adapters' inputs are not."""
    apart = TakenApart.of(ready, window, key)
    stages = [apart.results(apart.oracle(fp8)) for fp8 in (NONE, WEIGHTS, WEIGHTS_AND_INPUTS, ALL)]
    # What is foreign is added where inputs are not rounded: a changed input would turn others at their midpoints.
    smooth = stages[1]
    foreign = {
        "the head": apart.results(apart.with_rounded_head().oracle(WEIGHTS)),
        "adapters' inputs": apart.results(apart.oracle(WEIGHTS), adapters_too=True),
    }
    rounded, found = apart.results(apart.oracle(ALL, rounded=True)), apart.found(key)
    sizes = {name: float(np.linalg.norm(gradient)) for name, gradient in smooth.gradients.items()}
    sizes = {name: size for name, size in sizes.items() if size > 0.0}
    views: Mapping[str, Callable[[Results], Float64]] = {
        "logits": Results.flat_logits,
        "gradients": partial(Results.flat_gradients, sizes=sizes),
    }
    for what, view in views.items():
        exact = [view(stage) for stage in stages]
        asked = dict(zip(("weights", "inputs", "gradients"), np.diff(exact, axis=0), strict=True))
        if what == "logits":
            del asked["gradients"]
        extra = {name: view(results) - view(smooth) for name, results in foreign.items()}
        directions = [*asked.values(), *extra.values()]
        parts, expected = (_parts(view(results) - exact[0], directions) for results in (found, rounded))
        for operand, part, survives in zip(asked, parts, expected, strict=False):
            judging.at_most(f"{what}: missing of the rounding of {operand}", 1.0 - part, operand_part(survives))
        for operand, part in zip(extra, parts[len(asked) :], strict=True):
            judging.at_most(f"{what}: found of a rounding of {operand}", abs(part), foreign_part())


def judge_evaluated_parts(ready: Opened, rows: Sequence[Batch], judging: Judge) -> None:
    """The roundings of weights and inputs, together, are there in the loss that `evaluate` gives of each row."""
    apart = TakenApart.of(ready, rows, key=0)
    without, with_all, rounded = (
        np.array([oracle.evaluate([row])[0] for row in rows])
        for oracle in (apart.oracle(NONE), apart.oracle(ALL), apart.oracle(ALL, rounded=True))
    )
    found = np.array([ready.trainer.evaluate([row]).loss_sum for row in rows])
    [part], [survives] = (_parts(losses - without, [with_all - without]) for losses in (found, rounded))
    judging.at_most("losses: missing of the roundings of weights and inputs", 1.0 - part, operand_part(survives))


def turned(one: AnyFloat, other: AnyFloat) -> float:
    """The share of entries whose signs differ."""
    return float(np.mean(np.sign(np.asarray(one)) != np.sign(np.asarray(other))))


def _parts(apart: Float64, directions: Sequence[Float64]) -> list[float]:
    """How much of each direction is in a difference (least squares); NaN where it is not finite."""
    if not np.isfinite(apart).all():
        return [float("nan")] * len(directions)
    found, *_ = np.linalg.lstsq(np.stack(directions, axis=1), apart, rcond=None)
    return [float(part) for part in found]
