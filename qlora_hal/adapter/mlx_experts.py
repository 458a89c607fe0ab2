"""Stacks of experts under mlx-lm's names: `switch_mlp.gate_proj` for the hub's `experts.gate_proj` or, in Mixtral,
`experts.w1`. Its adapter tensors are `[experts, r, in]` and `[experts, out, r]` there too, not transposed (mlx-lm
0.32.2, `LoRASwitchLinear`)."""

from __future__ import annotations

import re

_OF_MLX = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_OF_HUB = {theirs: ours for ours, theirs in _OF_MLX.items()}
_HUB = re.compile(r"(?P<block>.+)\.experts\.(?P<projection>\w+)")
_MLX = re.compile(r"(?P<block>.+)\.switch_mlp\.(?P<projection>\w+)")
_BLOCK_WITH_NUMBERS = "block_sparse_moe"
"""The block whose projections the hub calls w1, w2, w3."""


def mlx_path(module: str) -> str:
    """mlx-lm's path of a module that we name as the hub does."""
    found = _HUB.fullmatch(module)
    if found is None:
        return module
    return f"{found['block']}.switch_mlp.{_OF_MLX.get(found['projection'], found['projection'])}"


def hub_path(module: str) -> str:
    """The inverse."""
    found = _MLX.fullmatch(module)
    if found is None:
        return module
    projection = found["projection"]
    if found["block"].rpartition(".")[2] == _BLOCK_WITH_NUMBERS:
        projection = _OF_HUB.get(projection, projection)
    return f"{found['block']}.experts.{projection}"
