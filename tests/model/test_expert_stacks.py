"""Stacks of routed experts, found in the headers of a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_hal.contract.values import LinearShape
from qlora_hal.errors import ModelError
from qlora_hal.model import expert_stacks

PER_EXPERT = {f"model.layers.1.mlp.experts.{number}.up_proj": LinearShape(8, 16) for number in range(12)}


def test_the_experts_of_a_projection_are_one_module() -> None:
    others = {"model.layers.1.mlp.shared_expert.up_proj": LinearShape(8, 16)}
    found = expert_stacks.joined({**PER_EXPERT, **others}, {"num_experts": 12}, "m")
    assert found == {**others, "model.layers.1.mlp.experts.up_proj": LinearShape(8, 16, experts=12)}


def test_a_block_with_a_single_expert_stays_a_layer() -> None:
    alone = {"model.layers.1.mlp.experts.0.up_proj": LinearShape(8, 16)}
    assert expert_stacks.joined(alone, {}, "m") == alone


@pytest.mark.parametrize(
    ("changed", "config", "words"),
    [
        ({"model.layers.1.mlp.experts.14.up_proj": LinearShape(8, 16)}, {}, "Expert 12 of .* is not stored"),
        ({"model.layers.1.mlp.experts.3.up_proj": LinearShape(8, 15)}, {}, "different shapes"),
        ({}, {"num_local_experts": 16}, r"has 12 experts; by config.json \(num_local_experts\) there are 16"),
    ],
)
def test_contradictory_experts_are_refused(changed: Any, config: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words) as refusal:
        expert_stacks.joined({**PER_EXPERT, **changed}, config, "m")
    assert refusal.value.code == "QH-M50"


@pytest.mark.parametrize(
    ("gate_up", "down"), [([4, 20, 8], [4, 8, 10]), ([4, 8, 20], [4, 10, 8])], ids=["[out, in]", "[in, out]"]
)
def test_joined_weights_are_the_same_modules(gate_up: list[int], down: list[int]) -> None:
    block = "model.layers.0.mlp.experts"
    tensors = {f"{block}.gate_up_proj": gate_up, f"{block}.down_proj": down}
    assert expert_stacks.of_joined_tensors(tensors, {"hidden_size": 8, "num_local_experts": 4}, "m") == {
        f"{block}.gate_proj": LinearShape(8, 10, experts=4),
        f"{block}.up_proj": LinearShape(8, 10, experts=4),
        f"{block}.down_proj": LinearShape(10, 8, experts=4),
    }
    with pytest.raises(ModelError, match="has 4 experts"):
        expert_stacks.of_joined_tensors(tensors, {"hidden_size": 8, "num_local_experts": 5}, "m")


def test_the_halves_of_a_pair_know_each_other() -> None:
    assert expert_stacks.paired_with("a.experts.w3") == "a.experts.w1"
    assert expert_stacks.paired_with("a.experts.gate_proj") == "a.experts.up_proj"
    assert expert_stacks.paired_with("a.experts.down_proj") == ""


def test_a_path_is_put_together_as_it_was_taken_apart() -> None:
    path = "model.layers.0.block_sparse_moe.experts.13.w1"
    place = expert_stacks.place_of(path)
    assert place == expert_stacks.ExpertPlace("model.layers.0.block_sparse_moe.experts.w1", 13)
    assert expert_stacks.path_of(place.module, place.number) == path
