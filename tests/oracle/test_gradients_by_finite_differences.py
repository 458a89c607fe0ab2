"""The hand-written gradient is the derivative of the loss: five-point differences in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from qlora_hal.contract.values import Batch
from qlora_hal_oracle import LlamaShape, LoraScale, OracleTrainer, lora_a_name
from qlora_hal_oracle.arrays import Float64

Tensors = dict[str, Float64]

STEP = 1e-4
# The five-point difference (8 f(h) - 8 f(-h) - f(2h) + f(-2h)) / 12 h is off by h^4/30 times the fifth derivative, and
# by the rounding of f itself, 1.5 * 2^-53 |f| / h. The mean loss is near 4; a fifth derivative of 1e6 (each layer
# multiplies rates of change of a few units) gives 3e-12 and 7e-12. Two orders are left for a wilder tied model.
DIFFERENCE_ERROR = 1e-9


def five_point_difference(loss_at: Callable[[float], float]) -> float:
    """Derivative at 0."""
    near, far = loss_at(STEP) - loss_at(-STEP), loss_at(2 * STEP) - loss_at(-2 * STEP)
    return (8 * near - far) / (12 * STEP)


def mean_loss(trainer: OracleTrainer, window: list[Batch]) -> float:
    loss_sum, token_count = trainer.evaluate(window)
    return loss_sum / token_count


def measured_slope(trainer: OracleTrainer, window: list[Batch], name: str, change: Float64) -> float:
    """Derivative of the mean loss when one adapter tensor moves along `change`."""
    here = trainer.export_adapter()

    def loss_at(distance: float) -> float:
        trainer.import_adapter({**here, name: here[name] + distance * change})
        return mean_loss(trainer, window)

    slope = five_point_difference(loss_at)
    trainer.import_adapter(here)
    return slope


def largest_error_along_random_directions(trainer: OracleTrainer, window: list[Batch]) -> float:
    random = np.random.default_rng(5)
    errors = []
    for name, gradient in trainer.gradients(window).items():
        for _ in range(3):
            direction = random.normal(size=gradient.shape)
            direction /= np.linalg.norm(direction)
            measured = measured_slope(trainer, window, name, direction)
            errors.append(abs(measured - float((gradient * direction).sum())))
    return max(errors)


def test_every_element_of_every_adapter_tensor_has_the_right_gradient(
    shape: LlamaShape, make_base: Callable[..., Tensors], make_adapter: Callable[..., Tensors], window: list[Batch]
) -> None:
    one_layer = dataclasses.replace(shape, num_hidden_layers=1)
    trainer = OracleTrainer(one_layer, make_base(one_layer), make_adapter(one_layer, rank=2), LoraScale(4.0, 2))
    gradients = trainer.gradients(window)
    assert gradients.keys() == trainer.export_adapter().keys()
    for name, gradient in gradients.items():
        for place in np.ndindex(gradient.shape):
            one_element = np.zeros_like(gradient)
            one_element[place] = 1.0
            error = measured_slope(trainer, window, name, one_element) - gradient[place]
            assert abs(error) < DIFFERENCE_ERROR


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_gradients_are_right_for_tied_and_untied_heads_and_both_scales(
    tied: bool,
    rank_stabilized: bool,
    shape: LlamaShape,
    make_base: Callable[..., Tensors],
    make_adapter: Callable[..., Tensors],
    window: list[Batch],
) -> None:
    tied_shape = dataclasses.replace(shape, tie_word_embeddings=tied)
    scale = LoraScale(6.0, 3, rank_stabilized=rank_stabilized)
    trainer = OracleTrainer(tied_shape, make_base(tied_shape), make_adapter(tied_shape), scale)
    assert largest_error_along_random_directions(trainer, window) < DIFFERENCE_ERROR


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_gradients_are_right_however_many_query_heads_share_a_key(
    key_heads: int,
    shape: LlamaShape,
    make_base: Callable[..., Tensors],
    make_adapter: Callable[..., Tensors],
    window: list[Batch],
) -> None:
    grouped = dataclasses.replace(shape, num_key_value_heads=key_heads)
    trainer = OracleTrainer(grouped, make_base(grouped), make_adapter(grouped), LoraScale(6.0, 3))
    assert largest_error_along_random_directions(trainer, window) < DIFFERENCE_ERROR


def test_gradients_are_right_with_attention_bias_and_adapters_on_few_modules_and_the_head(
    shape: LlamaShape, make_base: Callable[..., Tensors], make_adapter: Callable[..., Tensors], window: list[Batch]
) -> None:
    adapter = make_adapter(shape, wanted=("q_proj", "down_proj", "lm_head"))
    trainer = OracleTrainer(shape, make_base(shape, attention_bias=True), adapter, LoraScale(6.0, 3))
    assert lora_a_name("lm_head") in trainer.gradients(window)
    assert largest_error_along_random_directions(trainer, window) < DIFFERENCE_ERROR


def test_gradients_with_dropout_masks_are_those_of_the_masked_forward_pass(
    shape: LlamaShape, make_base: Callable[..., Tensors], make_adapter: Callable[..., Tensors], window: list[Batch]
) -> None:
    base, adapter, scale = make_base(shape), make_adapter(shape), LoraScale(6.0, 3)
    module, keep = "model.layers.0.self_attn.q_proj", 0.75
    random = np.random.default_rng(6)
    masks = [{module: (random.random((*batch.input_ids.shape, shape.hidden_size)) < keep) / keep} for batch in window]
    name = lora_a_name(module)
    direction = random.normal(size=adapter[name].shape)
    direction /= np.linalg.norm(direction)

    def loss_at(distance: float) -> float:
        moved = {**adapter, name: adapter[name] + distance * direction}
        result = OracleTrainer(shape, base, moved, scale).window_gradients(window, masks=masks)
        return result.loss_sum / result.token_count

    gradient = OracleTrainer(shape, base, adapter, scale).window_gradients(window, masks=masks).gradients[name]
    assert abs(five_point_difference(loss_at) - float((gradient * direction).sum())) < DIFFERENCE_ERROR
    assert loss_at(0.0) != mean_loss(OracleTrainer(shape, base, adapter, scale), window)
