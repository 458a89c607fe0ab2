"""The oracle as a trainer: windows, packing, padding, state, and what it refuses."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qlora_hal.contract.values import Batch
from qlora_hal_oracle import IGNORE_LABEL, LlamaShape, LoraScale, OracleTrainer, lora_b_name, read_shape
from qlora_hal_oracle.arrays import Float64

Tensors = dict[str, Float64]
MakeTensors = Callable[..., Tensors]
SCALE = LoraScale(6.0, 3)
# The same float64 sums (at most some 1000 terms of size 10 or less) in another order: sqrt(1000) * 10 * 2^-53, tripled.
REORDERED = 1e-13
STEP: dict[str, Any] = {"learning_rate": 0.05, "weight_decay": 0.01, "max_grad_norm": 1.0}


@pytest.fixture
def trainer(shape: LlamaShape, make_base: MakeTensors, make_adapter: MakeTensors) -> OracleTrainer:
    return OracleTrainer(shape, make_base(shape), make_adapter(shape), SCALE)


def assert_equal_gradients(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert np.abs(left[name] - right[name]).max() < REORDERED, name


def joined(batches: list[Batch]) -> Batch:
    """One batch of all rows, the shorter ones padded."""
    time = max(batch.input_ids.shape[1] for batch in batches)

    def pad(name: str, filler: int) -> Any:
        arrays = [getattr(batch, name) for batch in batches]
        padded = [np.pad(a, ((0, 0), (0, time - a.shape[1])), constant_values=filler) for a in arrays]
        return np.concatenate(padded)

    return Batch(pad("input_ids", 0), pad("labels", IGNORE_LABEL), pad("position_ids", 0), pad("segment_ids", 0))


def test_a_window_of_unequal_micro_batches_equals_one_batch(trainer: OracleTrainer, window: list[Batch]) -> None:
    apart, together = trainer.window_gradients(window), trainer.window_gradients([joined(window)])
    assert [batch.counted_tokens for batch in window] == [8, 3]
    assert apart.token_count == together.token_count == 11
    assert apart.loss_sum == pytest.approx(together.loss_sum, rel=REORDERED)
    assert_equal_gradients(apart.gradients, together.gradients)


def test_shares_of_a_window_with_the_global_token_count_add_up_to_the_whole(
    trainer: OracleTrainer, window: list[Batch]
) -> None:
    whole = trainer.window_gradients(window)
    shares = [trainer.window_gradients([batch], denominator=whole.token_count) for batch in window]
    summed = {name: shares[0].gradients[name] + shares[1].gradients[name] for name in whole.gradients}
    assert_equal_gradients(summed, whole.gradients)


def test_packed_samples_do_not_see_each_other(trainer: OracleTrainer, make_batch: Callable[..., Batch]) -> None:
    packed = make_batch([[5, 4]], time=11)

    def alone(place: slice) -> Batch:
        arrays = [packed.input_ids, packed.labels, packed.position_ids, np.minimum(packed.segment_ids, 1)]
        return Batch(*(array[:, place] for array in arrays))

    samples = [alone(slice(0, 5)), alone(slice(5, 9))]
    logits = np.concatenate([trainer.logits(sample) for sample in samples], axis=1)
    assert np.abs(trainer.logits(packed)[:, :9] - logits).max() < REORDERED
    assert_equal_gradients(trainer.gradients([packed]), trainer.gradients(samples))


def test_the_tokens_in_the_padding_do_not_matter_and_give_no_nan(
    trainer: OracleTrainer, make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch([[4], []], time=9)
    other_padding = np.where(batch.segment_ids == 0, (batch.input_ids + 7) % 23, batch.input_ids).astype(np.int32)
    changed = dataclasses.replace(batch, input_ids=other_padding)
    assert np.isfinite(trainer.logits(batch)).all()
    assert trainer.evaluate([batch]) == trainer.evaluate([changed])
    assert_equal_gradients(trainer.gradients([batch]), trainer.gradients([changed]))


def test_the_logits_at_t_are_scored_against_the_label_at_t_plus_1(
    trainer: OracleTrainer, make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch([[6]], time=6)
    batch.labels[:] = IGNORE_LABEL
    batch.labels[0, 3] = 11
    logits = trainer.logits(batch)[0, 2]
    loss_sum, token_count = trainer.evaluate([batch])
    assert token_count == 1
    assert loss_sum == pytest.approx(np.log(np.exp(logits).sum()) - logits[11], rel=REORDERED)


def test_an_adapter_whose_b_is_zero_changes_nothing(
    shape: LlamaShape, make_base: MakeTensors, make_adapter: MakeTensors, window: list[Batch]
) -> None:
    fresh = {name: tensor * (".lora_B." not in name) for name, tensor in make_adapter(shape).items()}
    with_adapter = OracleTrainer(shape, make_base(shape), fresh, SCALE)
    without = OracleTrainer(shape, make_base(shape), {}, SCALE)
    assert np.array_equal(with_adapter.logits(window[0]), without.logits(window[0]))


def test_rank_stabilized_scaling_divides_by_the_root_of_the_rank() -> None:
    assert LoraScale(16.0, 4).factor == 4.0
    assert LoraScale(16.0, 4, rank_stabilized=True).factor == 8.0


def test_a_run_continued_from_exported_state_equals_the_unbroken_run_bit_for_bit(
    shape: LlamaShape, make_base: MakeTensors, make_adapter: MakeTensors, window: list[Batch]
) -> None:
    base, adapter = make_base(shape), make_adapter(shape)
    unbroken = OracleTrainer(shape, base, adapter, SCALE)
    whole = [unbroken.train_step(window, **STEP) for _ in range(6)]

    first = OracleTrainer(shape, base, adapter, SCALE)
    halves = [first.train_step(window, **STEP) for _ in range(3)]
    second = OracleTrainer(shape, base, {name: 0 * tensor for name, tensor in adapter.items()}, SCALE)
    second.import_adapter(first.export_adapter())
    second.import_optimizer(*first.export_optimizer())
    halves += [second.train_step(window, **STEP) for _ in range(3)]

    assert halves == whole
    assert second.export_optimizer()[0] == 6
    for name, tensor in unbroken.export_adapter().items():
        assert np.array_equal(second.export_adapter()[name], tensor)


def test_exported_state_is_a_copy_and_the_given_adapter_is_not_trained(
    shape: LlamaShape, make_base: MakeTensors, make_adapter: MakeTensors, window: list[Batch]
) -> None:
    given = make_adapter(shape)
    before = {name: tensor.copy() for name, tensor in given.items()}
    trainer = OracleTrainer(shape, make_base(shape), given, SCALE)
    exported = trainer.export_adapter()
    trainer.train_step(window, **STEP)
    for name, tensor in before.items():
        assert np.array_equal(given[name], tensor)
        assert np.array_equal(exported[name], tensor)
        assert not np.array_equal(trainer.export_adapter()[name], tensor)


def test_a_step_whose_gradient_is_not_finite_is_reported_and_not_applied(
    trainer: OracleTrainer, window: list[Batch]
) -> None:
    name = lora_b_name("model.layers.0.mlp.up_proj")
    poisoned = trainer.export_adapter()
    poisoned[name][0, 0] = np.nan
    trainer.import_adapter(poisoned)
    step = trainer.train_step(window, **STEP)
    assert not step.applied
    assert not np.isfinite(step.grad_norm)
    assert trainer.export_optimizer()[0] == 0
    assert np.array_equal(trainer.export_adapter()[name], poisoned[name], equal_nan=True)


def test_a_window_without_counted_tokens_is_refused(trainer: OracleTrainer, window: list[Batch]) -> None:
    window[1].labels[:] = IGNORE_LABEL
    with pytest.raises(ValueError, match="no token of this window carries loss"):
        trainer.train_step([window[1]], **STEP)


def test_state_with_wrong_names_or_shapes_is_refused_and_changes_nothing(trainer: OracleTrainer) -> None:
    adapter = trainer.export_adapter()
    name = next(iter(adapter))
    with pytest.raises(ValueError, match="adapter tensors missing"):
        trainer.import_adapter({**adapter, "stray": np.zeros(1)})
    with pytest.raises(ValueError, match="another shape"):
        trainer.import_adapter({**adapter, name: adapter[name].T})
    with pytest.raises(ValueError, match="optimizer tensors missing"):
        trainer.import_optimizer(3, {})
    assert trainer.export_optimizer()[0] == 0


def test_wrong_base_weights_and_adapters_are_refused_by_name(
    shape: LlamaShape, make_base: MakeTensors, make_adapter: MakeTensors
) -> None:
    base, adapter = make_base(shape), make_adapter(shape)
    del base["model.norm.weight"]
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\]"):
        OracleTrainer(shape, base, adapter, SCALE)
    moved = {name.replace("layers.0", "layers.9"): t for name, t in adapter.items() if "0.mlp.up_proj" in name}
    with pytest.raises(ValueError, match=r"unknown modules \['model.layers.9.mlp.up_proj'\]"):
        OracleTrainer(shape, make_base(shape), moved, SCALE)
    with pytest.raises(ValueError, match="not of a pair"):
        OracleTrainer(shape, make_base(shape), dict(list(adapter.items())[:1]), SCALE)


HUGGING_FACE_CONFIG = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}]
)
def test_a_config_of_either_transformers_generation_is_read(rope: dict[str, object]) -> None:
    shape = read_shape({**HUGGING_FACE_CONFIG, **rope})
    assert (shape.rope_theta, shape.head_dim, shape.tie_word_embeddings) == (5e5, 8, False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 9}}, "max_position_embeddings"),
        ({"hidden_act": "swish_of_ours"}, "hidden_act is 'swish_of_ours'"),
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"model_type": "mistral", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "phi3", "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "8 query heads cannot share 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
    ],
)
def test_a_config_the_oracle_cannot_compute_is_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_shape({**HUGGING_FACE_CONFIG, **change})


def test_the_oracle_imports_no_tensor_library() -> None:
    code = "import sys, qlora_hal_oracle; print({m.split('.')[0] for m in sys.modules})"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'numpy'" in names
    for library in ("torch", "mlx", "transformers", "peft", "bitsandbytes", "gptqmodel"):
        assert f"'{library}'" not in names
