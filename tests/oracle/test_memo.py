"""What the oracle gives again is what it would compute again: a key holds all that a result depends on."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch
from qlora_hal_oracle import UNIT_ROUNDOFF, LoraScale, OracleTrainer
from qlora_hal_oracle.random_models import SHAPES, draw_tensors


@pytest.fixture
def trainer() -> OracleTrainer:
    random = np.random.default_rng(4)
    adapter = draw_adapter(random, SHAPES[0], rank=2)
    scale = LoraScale(adapter.config.alpha, adapter.config.r)
    return OracleTrainer(SHAPES[0], draw_tensors(SHAPES[0], random), adapter.tensors, scale)


def test_equal_questions_are_computed_once_and_nobody_writes_into_the_answer(trainer: OracleTrainer) -> None:
    batch = draw_batch(np.random.default_rng(5), SHAPES[0])
    logits, gradients = trainer.logits(batch), trainer.gradients([batch])
    assert trainer.logits(batch) is logits
    assert all(trainer.gradients([batch])[name] is gradient for name, gradient in gradients.items())
    with pytest.raises(ValueError, match="read-only"):
        logits += 1.0


def test_a_step_and_tokens_overwritten_in_place_are_other_questions(trainer: OracleTrainer) -> None:
    batch = draw_batch(np.random.default_rng(5), SHAPES[0])
    before, rounded = trainer.logits(batch), trainer.rounded_logits(batch, UNIT_ROUNDOFF["bfloat16"])
    assert not np.array_equal(before, rounded)
    batch.input_ids[0, 0] = batch.input_ids[0, 0] % (SHAPES[0].vocab_size - 4) + 3
    other = trainer.logits(batch)
    assert not np.array_equal(other, before)
    trainer.train_step([batch], learning_rate=1e-2)
    assert not np.array_equal(trainer.logits(batch), other)
    assert np.array_equal(trainer.logits(batch), trainer.model.forward(batch).logits)


def test_masks_and_denominators_are_part_of_the_question(trainer: OracleTrainer) -> None:
    batch = draw_batch(np.random.default_rng(5), SHAPES[0])
    module = "model.layers.0.self_attn.q_proj"
    mask = np.ones((*batch.input_ids.shape, SHAPES[0].hidden_size))
    mask[..., ::2] = 0.0
    plain = trainer.window_gradients([batch])
    masked = trainer.window_gradients([batch], masks=[{module: mask}])
    halved = trainer.window_gradients([batch], denominator=2.0 * plain.token_count)
    name = f"base_model.model.{module}.lora_A.weight"
    assert not np.array_equal(plain.gradients[name], masked.gradients[name])
    np.testing.assert_allclose(halved.gradients[name], plain.gradients[name] / 2.0, rtol=1e-12)
