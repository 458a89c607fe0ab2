"""The least costly choice that fits is taken; what it saves is arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import HIDDEN, VOCABULARY, write_model

from qlora_hal.config.schema import TrainingConfig
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.contract.values import MemoryEstimate
from qlora_hal.memory.estimate import estimate
from qlora_hal.memory.fitting import Needs, Room, chosen_placement
from qlora_hal.memory.placement import (
    HEAD_PIECE_BYTES,
    Moves,
    Placement,
    host_bytes,
    with_base_offloaded,
)
from qlora_hal.memory.time_prices import PassChoice
from qlora_hal.model.facts import ModelFacts, read_facts

ALL = frozenset(Feature)
PEAKS = {"none": 100, "selective": 80, "full": 50, "offload": 40}
OFFLOADED = {
    (): 60, ("embeddings",): 50, ("embeddings", "head"): 40, ("embeddings", "layers"): 10,
    ("embeddings", "layers", "head"): 0,
}  # fmt: skip


def needs(placement: Placement) -> Needs:
    """What is not on the device is on the host."""
    device = PEAKS[placement.recompute] + OFFLOADED[placement.base_offload]
    on_host = 60 - OFFLOADED[placement.base_offload] + (10 if placement.recompute == "offload" else 0)
    return Needs(device, on_host)


def price(placement: Placement) -> PassChoice:
    """Of a pass whose copies hide behind its computation."""
    return PassChoice(8192, placement.recompute, placement.base_offload)


def chosen(
    memory: int | None, features: frozenset[Feature] = ALL, host: int | None = None, **settings: object
) -> tuple[str, tuple[str, ...]]:
    room = None if memory is None else Room(memory, host)
    found = chosen_placement(TrainingConfig(**settings), features, needs, price, room)  # type: ignore[arg-type]
    return found.recompute, found.base_offload


@pytest.mark.parametrize(
    ("memory", "recompute"), [(160, "none"), (159, "selective"), (139, "full"), (109, "offload"), (5, "offload")]
)
def test_least_costly_recomputation_that_fits_is_taken(memory: int, recompute: str) -> None:
    assert chosen(memory, recompute="auto") == (recompute, ())


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (160, ("none", ())),
        (150, ("none", ("embeddings",))),
        (149, ("selective", ())),
        (139, ("selective", ("embeddings",))),
        (129, ("full", ())),
        (109, ("offload", ())),
        (99, ("offload", ("embeddings",))),
        (89, ("selective", ("embeddings", "layers", "head"))),
        (79, ("full", ("embeddings", "layers"))),
        (3, ("offload", ("embeddings", "layers", "head"))),
    ],
)
def test_embeddings_leave_before_anything_is_computed_again_and_layers_last(
    memory: int, expected: tuple[str, tuple[str, ...]]
) -> None:
    """A row of the embeddings crosses for each token, and layers whole."""
    assert chosen(memory, recompute="auto", base_offload="auto") == expected


def test_what_the_host_has_no_memory_for_stays() -> None:
    both = {"recompute": "auto", "base_offload": "auto"}
    assert chosen(89, host=60, **both) == ("selective", ("embeddings", "layers", "head"))
    assert chosen(89, host=59, **both) == ("full", ("embeddings", "layers"))
    assert chosen(89, host=40, **both) == ("offload", ("embeddings", "head"))


def test_where_nothing_fits_the_least_is_what_the_host_can_hold() -> None:
    both = {"recompute": "auto", "base_offload": "auto"}
    assert chosen(5, host=None, **both) == ("offload", ("embeddings", "layers", "head"))
    assert chosen(5, host=19, **both) == ("offload", ())
    assert chosen(5, host=9, **both) == ("full", ())


def test_nothing_goes_to_a_host_whose_memory_is_the_devices() -> None:
    both = TrainingConfig(recompute="auto", base_offload="auto")
    found = chosen_placement(both, ALL, needs, price, Room(5), moves=Moves(to_host=False))
    assert (found.recompute, found.base_offload) == ("full", ())
    assert Placement("offload", ("layers",)).in_one_memory() == Placement("full", ())


def test_layers_that_cannot_go_stay() -> None:
    both = TrainingConfig(recompute="auto", base_offload="auto")
    found = chosen_placement(both, ALL, needs, price, Room(5), moves=Moves(layers=False))
    assert (found.recompute, found.base_offload) == ("offload", ("embeddings", "head"))


def test_auto_takes_no_more_than_the_backend_can() -> None:
    assert chosen(5, frozenset(), recompute="auto", base_offload="auto") == ("none", ())
    assert chosen(5, frozenset({Feature.GRADIENT_CHECKPOINTING}), recompute="auto") == ("full", ())


def test_where_memory_is_not_known_nothing_is_given_up_and_that_is_said() -> None:
    found = chosen_placement(TrainingConfig(recompute="auto"), ALL, needs, price, None)
    assert found.recompute == "none"
    assert "does not tell" in found.why


@pytest.mark.parametrize("given", [{}, {"gradient_checkpointing": True}, {"recompute": "selective"}])
def test_what_is_asked_for_is_not_weighed(given: dict[str, object]) -> None:
    expected = given.get("recompute", "full" if given else "none")
    assert chosen(1, **given) == (expected, ())


def whole_base(facts: ModelFacts) -> MemoryEstimate:
    return estimate(
        facts, weight_format=WeightFormat.NF4, block_size=64, double_quant=True, compute_dtype="bfloat16", r=4,
        targets={}, optimizer="adamw", batch_size=1, sequence_length=8, gradient_checkpointing=False,
    )  # fmt: skip


def test_parts_on_the_host_leave_what_is_read_of_them_at_a_time(tmp_path: Path) -> None:
    facts = read_facts(write_model(tmp_path, "llama", num_hidden_layers=5))
    whole = whole_base(facts)
    table = VOCABULARY * HIDDEN * 2
    without = {
        parts: with_base_offloaded(whole, facts, "bfloat16", parts).weights
        for parts in ((), ("embeddings",), ("layers",), ("head",), ("embeddings", "layers", "head"))
    }
    assert without[()] == whole.weights
    assert without[("embeddings",)] == whole.weights - table
    assert without[("head",)] == whole.weights, f"it is smaller than two pieces of {HEAD_PIECE_BYTES} bytes"
    norms = sum(t.shape[0] * 2 for name, t in facts.tensors.items() if "norm" in name)
    layers = whole.weights - 2 * table - norms
    assert without[("layers",)] == pytest.approx(whole.weights - 3 / 5 * layers, abs=2)


def test_the_host_has_what_the_device_is_spared(tmp_path: Path) -> None:
    facts = read_facts(write_model(tmp_path, "llama", num_hidden_layers=5))
    whole = whole_base(facts)
    table = VOCABULARY * HIDDEN * 2
    on_host = host_bytes(
        whole.weights, facts, "bfloat16", Placement("offload", ("embeddings", "layers", "head")), tokens=8
    )
    assert (on_host.tables, on_host.inputs) == (2 * table, 5 * 8 * HIDDEN * 2)
    norms = sum(t.shape[0] * 2 for name, t in facts.tensors.items() if "norm" in name)
    assert on_host.layers == whole.weights - 2 * table - norms
    assert host_bytes(whole.weights, facts, "bfloat16", Placement("full", ()), tokens=8).memory == 0
