"""Where a mixture of experts sends tokens, on MLX: transformers' scores, and the contract's rule for equal ones.

The experts with the highest scores are chosen, of equal ones those with the lower index, and no expert is ever full.
mlx-lm takes them with `argpartition`, which promises no order of equal values; in DeepSeek's groups it gives experts of
other groups a score of zero, above a corrected score that is negative.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from qlora_hal_backends.mlx_lora.config_reading import Config

NEVER = float("-inf")
SUM_EPSILON = 1e-20
"""What transformers adds to a sum of sigmoids before it divides by it."""


@dataclass(frozen=True, slots=True)
class Routing:
    """`number` experts for a token, with softmax or sigmoid scores. With `normalized` the weights of the chosen ones
    are divided by their sum; all are multiplied with `scaling`. Of `groups` of neighbouring experts only those of the
    best `groups_chosen` can be chosen."""

    number: int
    normalized: bool
    is_sigmoid: bool = False
    scaling: float = 1.0
    groups: int = 1
    groups_chosen: int = 1

    def __call__(self, logits: mx.array, correction: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """(indices, weights), both `[tokens, number]`, for the router's logits `[tokens, experts]`. `correction` is
        added to the scores for the choice alone. Weights are float32, and carry the router's gradient."""
        logits = logits.astype(mx.float32)
        scores = mx.sigmoid(logits) if self.is_sigmoid else mx.softmax(logits, axis=-1)
        deciding = mx.stop_gradient(scores if correction is None else scores + correction.astype(mx.float32))
        indices = best(self._in_best_groups(deciding), self.number)
        weights = mx.take_along_axis(scores, indices, axis=-1)
        if self.normalized:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + (SUM_EPSILON if self.is_sigmoid else 0.0))
        return indices, weights * self.scaling

    def _in_best_groups(self, deciding: mx.array) -> mx.array:
        """The scores, minus infinity in all but the groups whose two best have the highest sums."""
        if self.groups_chosen == self.groups:
            return deciding
        grouped = mx.unflatten(deciding, -1, (self.groups, -1))
        chosen = best(mx.sort(grouped, axis=-1)[..., -2:].sum(axis=-1), self.groups_chosen)
        is_chosen = (mx.arange(self.groups)[:, None] == chosen[:, None, :]).any(axis=-1)
        return mx.where(is_chosen[..., None], grouped, NEVER).flatten(-2, -1)


def best(values: mx.array, number: int) -> mx.array:
    """The places of the highest values of each row, of equal ones the first."""
    found = []
    for _ in range(number):
        # Every device of MLX gives the first of equal values here (`tests/mlx_lora/test_experts.py`).
        found.append(mx.argmax(values, axis=-1, keepdims=True))
        values = mx.put_along_axis(values, found[-1], mx.array(NEVER, values.dtype), axis=-1)
    return mx.stop_gradient(mx.concatenate(found, axis=-1))


def softmax_routing(config: Config, *, normalized: bool | None = None) -> Routing:
    """Mixtral's and Qwen's. `normalized` None is what `norm_topk_prob` says."""
    asked = bool(config.get("norm_topk_prob")) if normalized is None else normalized
    return Routing(_integer(config, "num_experts_per_tok"), asked)


def sigmoid_routing(config: Config) -> Routing:
    """DeepSeek-V3's, as GLM-4 has it too."""
    return Routing(
        _integer(config, "num_experts_per_tok"),
        bool(config.get("norm_topk_prob")),
        is_sigmoid=True,
        scaling=float(str(config.get("routed_scaling_factor", 1.0))),
        groups=_integer(config, "n_group"),
        groups_chosen=_integer(config, "topk_group"),
    )


def _integer(config: Mapping[str, object], key: str) -> int:
    return int(str(config[key]))
