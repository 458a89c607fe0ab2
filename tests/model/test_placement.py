"""The fastest choice that fits is taken; what it saves is arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import HIDDEN, VOCABULARY, write_model

from qlora_hal.config.schema import TrainingConfig
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.memory.estimate import estimate
from qlora_hal.memory.placement import HEAD_PIECE_BYTES, Placement, chosen_placement, with_base_offloaded
from qlora_hal.model.facts import read_facts

ALL = frozenset(Feature)
PEAKS = {"none": 100, "selective": 80, "full": 50, "offload": 40}
OFFLOADED = {(): 60, ("embeddings",): 50, ("embeddings", "layers"): 10, ("embeddings", "layers", "head"): 0}


def peak(placement: Placement) -> int:
    return PEAKS[placement.recompute] + OFFLOADED[placement.base_offload]


def chosen(memory: int | None, features: frozenset[Feature] = ALL, **settings: object) -> tuple[str, tuple[str, ...]]:
    found = chosen_placement(TrainingConfig(**settings), features, peak, memory)  # type: ignore[arg-type]
    return found.recompute, found.base_offload


@pytest.mark.parametrize(
    ("memory", "recompute"), [(160, "none"), (159, "selective"), (139, "full"), (109, "offload"), (5, "offload")]
)
def test_fastest_recomputation_that_fits_is_taken(memory: int, recompute: str) -> None:
    assert chosen(memory, recompute="auto") == (recompute, ())


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (160, ("none", ())),
        (100, ("offload", ())),
        (99, ("offload", ("embeddings",))),
        (89, ("full", ("embeddings", "layers"))),
        (3, ("offload", ("embeddings", "layers", "head"))),
    ],
)
def test_base_stays_on_the_device_as_long_as_recomputing_is_enough(
    memory: int, expected: tuple[str, tuple[str, ...]]
) -> None:
    assert chosen(memory, recompute="auto", base_offload="auto") == expected


def test_layers_that_stay_are_not_put_on_the_host() -> None:
    """Those with routed experts, and those that are spread over devices."""
    settings = TrainingConfig(recompute="auto", base_offload="auto")
    sizes = {**OFFLOADED, ("embeddings", "head"): 20}
    found = chosen_placement(
        settings, ALL, lambda one: PEAKS[one.recompute] + sizes[one.base_offload], 5, layers_stay=True
    )
    assert found.base_offload == ("embeddings", "head")


def test_auto_takes_no_more_than_the_backend_can() -> None:
    assert chosen(5, frozenset(), recompute="auto", base_offload="auto") == ("none", ())
    assert chosen(5, frozenset({Feature.GRADIENT_CHECKPOINTING}), recompute="auto") == ("full", ())


def test_where_memory_is_not_known_nothing_is_given_up_and_that_is_said() -> None:
    found = chosen_placement(TrainingConfig(recompute="auto"), ALL, peak, None)
    assert found.recompute == "none"
    assert "does not tell" in found.why


@pytest.mark.parametrize("given", [{}, {"gradient_checkpointing": True}, {"recompute": "selective"}])
def test_what_is_asked_for_is_not_weighed(given: dict[str, object]) -> None:
    expected = given.get("recompute", "full" if given else "none")
    assert chosen(1, **given) == (expected, ())


def test_parts_on_the_host_leave_what_is_read_of_them_at_a_time(tmp_path: Path) -> None:
    facts = read_facts(write_model(tmp_path, "llama", num_hidden_layers=5))
    whole = estimate(
        facts, weight_format=WeightFormat.NF4, block_size=64, double_quant=True, compute_dtype="bfloat16", r=4,
        targets={}, optimizer="adamw", batch_size=1, sequence_length=8, gradient_checkpointing=False,
    )  # fmt: skip
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
