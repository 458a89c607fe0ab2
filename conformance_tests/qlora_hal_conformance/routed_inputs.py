"""Batches for mixtures of experts in which no rounding decides where a token goes.

Which experts are chosen is no continuous function: two scores that rounding brings past each other give another
result, and no bound could say so. So tokens are drawn until every choice of every layer is far from its alternative.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlora_hal.contract.values import IGNORE_LABEL, PADDING_SEGMENT, Batch
from qlora_hal_conformance.random_inputs import draw_batch, with_field
from qlora_hal_oracle import EXACT, UNIT_ROUNDOFF, OracleTrainer, RandomRounding
from qlora_hal_oracle.arithmetic import Arithmetic
from qlora_hal_oracle.arrays import Bool, Float32, Float64
from qlora_hal_oracle.llama import ForwardPass
from qlora_hal_oracle.mixture import MixtureTrace
from qlora_hal_oracle.random_models import FIRST_ORDINARY_TOKEN

MARGIN_DEVIATIONS = 12.0
"""How many standard deviations of a randomly rounded run's scores a choice is away from the next. Two scores move, each
perhaps three times as much as in that run (`tolerances.NOISE_WIDENING`): 3 sqrt(2) of it, and what is left is for the
few hundred choices of a case."""
NORMAL_MEDIAN = 0.6745
"""The median of |x| of a normal distribution, in standard deviations."""
ROUNDS = 400
"""Each draws the undecided tokens anew. About half of all tokens are decided in every layer, so a handful suffice."""


def draw_routed(
    random: np.random.Generator,
    oracle: OracleTrainer,
    dtype: str,
    *,
    lengths: Sequence[int] = (24, 17),
    time: int | None = None,
    prompt: int | None = None,
) -> Batch:
    """As `draw_batch`, with every real token decided in every layer for a backend that computes in `dtype`.

    A token sees only those before it, so those that are decided in front of the first undecided one stay so.
    """
    batch = draw_batch(random, oracle.model.shape, lengths=lengths, time=time, prompt=prompt)
    for _ in range(ROUNDS):
        undecided = _undecided(oracle, batch, dtype)
        if not undecided.any():
            return batch
        drawn = random.integers(FIRST_ORDINARY_TOKEN, oracle.model.shape.vocab_size, batch.input_ids.shape)
        input_ids = np.where(undecided, drawn, batch.input_ids).astype(np.int32)
        labels = np.where(batch.labels == IGNORE_LABEL, IGNORE_LABEL, input_ids)
        batch = with_field(batch, input_ids=input_ids, labels=labels)
    raise AssertionError(f"no batch was found in {ROUNDS} rounds in which {dtype} decides every token")


def draw_routed_window(random: np.random.Generator, oracle: OracleTrainer, dtype: str) -> list[Batch]:
    """As `random_inputs.draw_window`: two micro-batches with very different numbers of counted tokens."""
    long = draw_routed(random, oracle, dtype, lengths=(int(random.integers(18, 24)), int(random.integers(12, 18))))
    short = draw_routed(random, oracle, dtype, lengths=(int(random.integers(5, 8)),), time=12, prompt=2)
    return [long, short]


def mixtures_of(forward: ForwardPass) -> list[MixtureTrace]:
    """What each layer with experts left, in order."""
    return [layer.fed for layer in forward.layers if isinstance(layer.fed, MixtureTrace)]


def tokens_of_experts(oracle: OracleTrainer, window: Sequence[Batch]) -> list[set[int]]:
    """For each layer with experts, those that get a real token of the window."""
    found: list[set[int]] = []
    for batch in window:
        real = (batch.segment_ids != PADDING_SEGMENT).reshape(-1)
        chosen = [
            set(trace.routing.chosen[real].ravel().tolist()) for trace in mixtures_of(oracle.model.forward(batch))
        ]
        found = [one | other for one, other in zip(found, chosen, strict=True)] if found else chosen
    return found


def without_choice(tensors: dict[str, Float32], routers: Sequence[str]) -> dict[str, Float32]:
    """The model with routers, and their corrections, of zeros: all experts tie for every token, in any arithmetic."""
    endings = tuple(f".{name}" for name in routers)
    return {name: np.zeros_like(tensor) if name.endswith(endings) else tensor for name, tensor in tensors.items()}


def _undecided(oracle: OracleTrainer, batch: Batch, dtype: str) -> Bool:
    """`[batch, time]`: real tokens whose choice in some layer is nearer to another than `MARGIN_DEVIATIONS`."""
    exact, rounded = (
        mixtures_of(oracle.model.forward(batch, arithmetic)) for arithmetic in _arithmetics(UNIT_ROUNDOFF[dtype])
    )
    real = batch.segment_ids != PADDING_SEGMENT
    undecided = np.zeros(batch.input_ids.shape, dtype=np.bool_)
    for one, other in zip(exact, rounded, strict=True):
        # Few tokens go elsewhere in the rounded run, and have other scores behind that: the median does not see them.
        apart: Float64 = np.abs(one.routing.deciding - other.routing.deciding)[real.reshape(-1)]
        deviation = float(np.median(apart)) / NORMAL_MEDIAN
        undecided |= (one.routing.margin < MARGIN_DEVIATIONS * deviation).reshape(undecided.shape)
    found: Bool = undecided & real
    return found


def _arithmetics(unit_roundoff: float) -> tuple[Arithmetic, Arithmetic]:
    return EXACT, RandomRounding(unit_roundoff, seed=0)
