"""The oracle's mixtures of experts beside transformers: logits, and the gradient of every weight; and the rules of
routing that transformers leaves open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_hal.contract.values import Batch
from qlora_hal_conformance.fixtures import make_oracle
from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch, stream
from qlora_hal_oracle import LlamaShape, MixtureShape, OracleTrainer, read_shape
from qlora_hal_oracle.families import MIXTURES, VARIATIONS_OF_MIXTURES, Config, draw_config, vary
from qlora_hal_oracle.random_models import draw_tensors, is_joined, stored_joined, write_model
from qlora_hal_oracle.routing import route, route_backward

from .test_families import AGREEMENT, in_float64, logits_and_gradients  # noqa: F401  # the fixture judges here too

LENGTHS = (24, 17)
EXPERTS = ".experts."


def in_names_of_transformers(tensors: dict[str, Any], shape: LlamaShape) -> dict[str, Any]:
    """As transformers 5 holds them."""
    if is_joined(shape):
        return stored_joined(tensors)
    return dict(of_transformers(name, tensors, shape) for name in tensors)


def of_transformers(name: str, tensors: dict[str, Any], shape: LlamaShape) -> tuple[str, Any]:
    """Name and values of a stack as transformers 5 holds it: gate and up in one tensor; other tensors as they are."""
    mixture = shape.mixture
    assert mixture is not None
    path, _, last = name.removesuffix(".weight").rpartition(".")
    if EXPERTS not in name:
        return name.replace("block_sparse_moe", "mlp"), tensors[name]
    path = path.replace("block_sparse_moe", "mlp")
    if last == mixture.down:
        return f"{path}.down_proj", tensors[name]
    both = [tensors[name.replace(f".{last}.", f".{part}.")] for part in (mixture.gate, mixture.up)]
    return f"{path}.gate_up_proj", np.concatenate(both, axis=-2)


def in_transformers(folder: Path, oracle: OracleTrainer) -> Any:
    """The model of the folder in float64, with the oracle's adapters added into its weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    updates = {}
    for layer in range(oracle.model.shape.num_hidden_layers):
        for name in oracle.model.shape.layer_linears(layer):
            linear = oracle.model.linear(f"model.layers.{layer}.{name}")
            assert linear.lora_a is not None
            assert linear.lora_b is not None
            updates[f"{linear.module}.weight"] = linear.scale * linear.lora_b @ linear.lora_a
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, update in in_names_of_transformers(updates, oracle.model.shape).items():
            named[name].add_(torch.from_numpy(update))
    return model


def compare(folder: Path, config: Config) -> None:
    shape, random = read_shape(config), stream(11, folder.name)
    tensors = draw_tensors(shape, stream(8, folder.name))
    write_model(folder, shape, tensors, config=config)
    batch = draw_batch(random, shape, lengths=LENGTHS)
    oracle = make_oracle(shape, tensors, draw_adapter(random, shape))
    expected, gradients = logits_and_gradients(in_transformers(folder, oracle), batch)
    real = batch.segment_ids > 0
    assert np.abs(oracle.logits(batch) - expected)[real].max() < AGREEMENT
    # With B A added into the weights their gradient is that of the base.
    found = oracle.window_gradients([batch], denominator=1.0, with_base=True).gradients
    base = {name: gradient for name, gradient in found.items() if "lora_" not in name}
    of_base = in_names_of_transformers(base, shape)
    assert of_base.keys() == gradients.keys()
    for name, gradient in of_base.items():
        assert np.abs(gradient - gradients[name]).max() < AGREEMENT * max(1.0, np.abs(gradient).max()), name
    assert any(np.any(found[name]) for name in base if EXPERTS in name)


@pytest.mark.parametrize("family", MIXTURES)
def test_logits_and_every_gradient_of_a_mixture_equal_transformers(family: str, tmp_path: Path) -> None:
    compare(tmp_path / family, draw_config(family, stream(7, family)))


@pytest.mark.parametrize("name", VARIATIONS_OF_MIXTURES)
def test_a_changed_key_of_a_mixture_means_what_transformers_makes_of_it(name: str, tmp_path: Path) -> None:
    compare(tmp_path / name, vary(name, stream(7, name)))


@pytest.mark.parametrize("family", MIXTURES)
def test_adapters_of_experts_have_the_gradients_that_finite_differences_find(family: str) -> None:
    """A and B of every stack, along one drawn direction each."""
    random = stream(5, family)
    shape = read_shape(draw_config(family, random))
    oracle = make_oracle(shape, draw_tensors(shape, random), draw_adapter(random, shape, rank=2))
    batch = draw_batch(random, shape, lengths=(9, 7))
    gradients = oracle.gradients([batch])
    for name in [name for name in gradients if EXPERTS in name or ".shared_expert" in name]:
        direction = random.normal(size=gradients[name].shape)
        slope = difference_quotient(oracle, batch, name, direction)
        assert slope == pytest.approx(float((gradients[name] * direction).sum()), rel=1e-5, abs=1e-8), name


def difference_quotient(oracle: OracleTrainer, batch: Batch, name: str, direction: Any, step: float = 1e-6) -> float:
    """Central difference of the mean loss: its own error is step^2, and 1e-16 / step of rounding."""
    start, losses = oracle.export_adapter(), []
    for sign in (1.0, -1.0):
        oracle.import_adapter({**start, name: start[name] + sign * step * direction})
        total, count = oracle.evaluate([batch])
        losses.append(total / count)
    oracle.import_adapter(start)
    return (losses[0] - losses[1]) / (2.0 * step)


# routing --------------------------------------------------------------------------------------------------------------
PLAIN = MixtureShape(experts=4, experts_per_token=2, inner=8)
GROUPED = MixtureShape(experts=6, experts_per_token=2, inner=8, scoring="sigmoid", groups=3, groups_chosen=1)


def test_of_equal_experts_the_lower_index_is_chosen() -> None:
    routing = route(PLAIN, np.array([[0.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 3.0, 0.0, 0.0]]), None)
    assert routing.chosen.tolist() == [[1, 2], [0, 1], [1, 0]]
    assert routing.margin.tolist() == [0.0, 0.0, 0.0]


def test_of_equal_groups_the_lower_index_is_chosen() -> None:
    logits = np.array([[0.0, 1.0, 0.5, 0.2, 1.0, 0.0]])
    assert route(GROUPED, logits, None).chosen.tolist() == [[1, 0]]


def test_a_correction_decides_and_weighs_nothing() -> None:
    logits = np.array([[0.0, 1.0, 2.0, 0.5, 0.5, 0.5]])
    corrected = route(GROUPED, logits, np.array([0.0, 0.0, 0.0, 0.0, 5.0, 0.0]))
    assert corrected.chosen.tolist() == [[4, 5]]
    assert corrected.weights.tolist() == [[0.5, 0.5]]


def test_the_margin_is_how_far_the_deciding_scores_are_apart() -> None:
    assert route(PLAIN, np.array([[0.0, 1.5, 1.0, 3.0]]), None).margin == pytest.approx([0.5])
    everyone = MixtureShape(experts=2, experts_per_token=2, inner=8)
    assert route(everyone, np.array([[0.0, 1.0]]), None).margin.tolist() == [np.inf]


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_gradient_of_routing_weights_is_that_of_finite_differences(scoring: str, normalized: bool) -> None:
    mixture = MixtureShape(experts=5, experts_per_token=3, inner=8, scoring=scoring, normalized=normalized, scaling=1.7)
    random = stream(3, f"{scoring}/{normalized}")
    logits, grad = random.normal(size=(4, 5)), random.normal(size=(4, 3))
    routing = route(mixture, logits, None)
    found = route_backward(mixture, grad, routing)
    step = 1e-6
    for place in np.ndindex(logits.shape):
        moved = [route(mixture, logits + sign * step * _unit(logits.shape, place), None) for sign in (1, -1)]
        assert all(np.array_equal(m.chosen, routing.chosen) for m in moved)
        quotient = float((grad * (moved[0].weights - moved[1].weights)).sum()) / (2 * step)
        assert found[place] == pytest.approx(quotient, abs=1e-8)


def _unit(shape: tuple[int, ...], place: tuple[int, ...]) -> Any:
    unit = np.zeros(shape)
    unit[place] = 1.0
    return unit


def test_more_experts_than_groups_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="in 1 of 3 groups"):
        MixtureShape(experts=6, experts_per_token=3, inner=8, groups=3, groups_chosen=1)
    with pytest.raises(ValueError, match="groups of one size"):
        MixtureShape(experts=7, experts_per_token=2, inner=8, groups=2, groups_chosen=2)


def test_noise_on_the_router_is_refused() -> None:
    config = {**draw_config("mixtral", stream(1, "jitter")), "router_jitter_noise": 0.1}
    with pytest.raises(ValueError, match="router_jitter_noise"):
        read_shape(config)


# idle experts ---------------------------------------------------------------------------------------------------------
def test_an_expert_without_tokens_keeps_its_adapter_and_moments_bit_for_bit() -> None:
    """Where others decay and go on by momentum: two tokens cannot reach all experts."""
    random = stream(6, "idle")
    shape = read_shape(draw_config("qwen3_moe", random))
    tensors = draw_tensors(shape, random)
    oracle = make_oracle(shape, tensors, draw_adapter(random, shape, rank=2))
    window = [draw_batch(random, shape, lengths=(9, 7))]
    oracle.train_step(window, learning_rate=1e-2, weight_decay=0.1)
    before, (_, moments_before) = oracle.export_adapter(), oracle.export_optimizer()
    one_token = [draw_batch(random, shape, lengths=(2,), prompt=1)]
    gradients = oracle.gradients(one_token)
    oracle.train_step(one_token, learning_rate=1e-2, weight_decay=0.1)
    after, (_, moments) = oracle.export_adapter(), oracle.export_optimizer()
    idle = busy = 0
    for name in [name for name in gradients if EXPERTS in name and "lora_A" in name]:
        pair = (name, name.replace("lora_A", "lora_B"))
        for expert in range(len(gradients[name])):
            has_gradient = any(gradients[n][expert].any() for n in pair)
            moved = [not np.array_equal(after[n][expert], before[n][expert]) for n in pair]
            for kind in ("exp_avg", "exp_avg_sq"):
                moved += [
                    not np.array_equal(moments[f"{n}.{kind}"][expert], moments_before[f"{n}.{kind}"][expert])
                    for n in pair
                ]
            assert all(moved) if has_gradient else not any(moved), (name, expert)
            idle, busy = idle + (not has_gradient), busy + has_gradient
    assert idle
    assert busy
