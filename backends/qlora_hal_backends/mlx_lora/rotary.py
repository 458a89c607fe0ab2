"""Scaled rotary positions, as transformers computes them.

mlx-lm 0.32 leaves scaling out in some models, and knows fewer of its settings than transformers 5.23 in others
(LongRoPE's short factors; YaRN's `attention_factor` and `truncate`). So wherever config.json asks for scaling, the
modules that rotate are replaced. Sources: `transformers.modeling_rope_utils`, and the papers named below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.base import Module
from mlx.nn.layers.positional_encoding import RoPE

from qlora_hal.model.facts import text_config
from qlora_hal_backends.mlx_lora.config_reading import Config

Periods = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scaling:
    """What is asked for. `rope` holds transformers' `rope_parameters`, `length` the model's longest row."""

    dims: int
    rope: Mapping[str, Any]
    length: int

    @property
    def factor(self) -> float:
        return float(self.rope.get("factor") or self.length / self.original_length)

    @property
    def original_length(self) -> int:
        return int(self.rope.get("original_max_position_embeddings") or self.length)

    def periods(self, base: float | None = None) -> Periods:
        """`[dims / 2]`: in how many tokens each pair of dimensions turns by one radian."""
        powers: Periods = np.arange(0, self.dims, 2) / self.dims
        return np.power(base or float(self.rope["rope_theta"]), powers)


class ScaledRoPE(Module):
    """Rotates by the periods that hold for the length of a row; `factor` scales what is rotated."""

    def __init__(self, scaling: Scaling, traditional: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Underscores: none of these is a parameter, nothing is stored for them.
        self._dims, self._traditional = scaling.dims, traditional
        self._periods = _PERIODS[scaling.rope["rope_type"]](scaling)
        self._factor = _attention_factor(scaling)

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        """`x` `[batch, heads, time, head_dim]`."""
        periods = mx.array(self._periods(x.shape[-2] + offset).astype(np.float32))
        if self._factor != 1.0:
            x = mx.concatenate([x[..., : self._dims] * self._factor, x[..., self._dims :]], axis=-1)
        rotated: mx.array = mx.fast.rope(
            x, self._dims, traditional=self._traditional, base=None, scale=1.0, offset=offset, freqs=periods
        )
        return rotated


def _linear(scaling: Scaling) -> Callable[[int], Periods]:
    """Position interpolation (Chen et al. 2023)."""
    periods = scaling.periods() * scaling.factor
    return lambda _: periods


def _dynamic(scaling: Scaling) -> Callable[[int], Periods]:
    """NTK-aware scaling that grows with rows beyond the model's longest."""
    theta, factor, length, dims = float(scaling.rope["rope_theta"]), scaling.factor, scaling.length, scaling.dims

    def periods(time: int) -> Periods:
        growth = factor * max(time, length) / length - (factor - 1.0)
        return scaling.periods(theta * growth ** (dims / (dims - 2)))

    return periods


def _llama3(scaling: Scaling) -> Callable[[int], Periods]:
    """Of Llama 3.1: slow pairs are interpolated, fast ones are not, and those between are blended."""
    rope, periods, factor = scaling.rope, scaling.periods(), scaling.factor
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = scaling.original_length / (2.0 * math.pi * periods)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    blended: Periods = 1.0 / ((1.0 - share) / (factor * periods) + share / periods)
    return lambda _: blended


def _yarn(scaling: Scaling) -> Callable[[int], Periods]:
    """YaRN (Peng et al. 2023), section 3.2: a ramp between interpolated and original pairs."""
    rope, periods = scaling.rope, scaling.periods()

    def pair_of(rotations: float) -> float:
        turns = math.log(scaling.original_length / (rotations * 2.0 * math.pi))
        return scaling.dims * turns / (2.0 * math.log(float(rope["rope_theta"])))

    low, high = pair_of(rope.get("beta_fast") or 32), pair_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, scaling.dims - 1)
    ramp = np.clip((np.arange(scaling.dims // 2) - low) / (high - low or 0.001), 0.0, 1.0)
    blended: Periods = 1.0 / (ramp / (scaling.factor * periods) + (1.0 - ramp) / periods)
    return lambda _: blended


def _longrope(scaling: Scaling) -> Callable[[int], Periods]:
    """LongRoPE (Ding et al. 2024): short factors up to the original length, long ones for longer rows."""
    short, long = (scaling.periods() * np.asarray(scaling.rope[name]) for name in ("short_factor", "long_factor"))
    return lambda time: long if time > scaling.original_length else short


_PERIODS: Mapping[str, Callable[[Scaling], Callable[[int], Periods]]] = {
    "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope,
}  # fmt: skip


def _attention_factor(scaling: Scaling) -> float:
    """Makes up for the entropy of attention over longer rows."""
    rope, factor = scaling.rope, scaling.factor
    if rope["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if factor <= 1.0:
        return 1.0
    if rope["rope_type"] == "longrope":
        return math.sqrt(1.0 + math.log(factor) / math.log(scaling.original_length))
    one, other = rope.get("mscale"), rope.get("mscale_all_dim")
    scales = [0.1 * scale * math.log(factor) + 1.0 for scale in ((one, other) if one and other else (1.0, 0.0))]
    return scales[0] / scales[1]


def put_rotary_positions_right(causal: Any, read: Config) -> None:
    """`read`: config.json as transformers reads it."""
    config = text_config(read)
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return
    # mlx-lm's first GLM rotates whole heads; a part of each is what the checkpoints were trained with.
    if read.get("model_type") == "glm":
        for layer in causal.layers:
            attention = layer.self_attn
            dims = int(attention.head_dim * rope.get("partial_rotary_factor", 1.0))
            attention.rope = RoPE(dims, traditional=True, base=rope["rope_theta"])
    if not any(isinstance(part, Mapping) for part in rope.values()):
        _replace_rotations(causal, rope, config)
        return
    for layer, kind in zip(causal.layers, config.get("layer_types") or (), strict=False):
        # transformers looks for `truncate` beside the kinds of layers, not within them.
        own = {**(rope.get(kind) or {}), "truncate": rope.get("truncate", True)}
        _replace_rotations(layer, own, config)


def _replace_rotations(part: Any, rope: Mapping[str, Any], config: Config) -> None:
    from mlx_lm.models import rope_utils

    if rope.get("rope_type") not in _PERIODS:
        return

    kinds = (
        RoPE, rope_utils.SuScaledRoPE, rope_utils.Llama3RoPE, rope_utils.YarnRoPE, rope_utils.DynamicNTKScalingRoPE,
    )  # fmt: skip
    for module in part.modules():
        for name, child in module.children().items():
            if isinstance(child, kinds):
                dims = getattr(child, "dims", None) or child.dim
                scaling = Scaling(dims, rope, config["max_position_embeddings"])
                setattr(module, name, ScaledRoPE(scaling, getattr(child, "traditional", False)))
