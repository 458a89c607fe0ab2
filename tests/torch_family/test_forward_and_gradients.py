"""The family's layers against the real transformers and the real PEFT, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, write_model
from trainers import OpenTrainer, largest_difference, packed, random_batch

from qlora_hal.contract.backend import Compute

# Two float32 programs of the same products in another order differ by about sqrt(k) * 2^-24 relative to the largest
# entry; k is at most 128 terms times 2 layers of about 8 products. 8 * sqrt(2048) * 2^-24 = 2.2e-5.
FLOAT32 = 8 * 2048**0.5 * 2**-24

Opened = Callable[..., OpenTrainer]


@pytest.mark.parametrize("family", FAMILIES)
def test_unquantized_logits_equal_those_of_transformers(family: str, tmp_path: Path, opened: Opened) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path, family)
    trainer = opened(folder)
    batch = random_batch(0, padding=4)
    for name, tensor in trainer.adapter.tensors.items():
        tensor *= "lora_A" in name  # B = 0: the base alone
    trainer.trainer.attach(trainer.adapter)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(
            torch.from_numpy(batch.input_ids).long(), attention_mask=torch.from_numpy(batch.segment_ids)
        ).logits.numpy()
    real = batch.segment_ids > 0
    assert np.abs(trainer.trainer.logits(batch) - expected)[real].max() <= FLOAT32 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_gradients_equal_those_of_peft(family: str, use_rslora: bool, tmp_path: Path, opened: Opened) -> None:
    from qlora_hal.adapter.peft_files import write_adapter

    folder = write_model(tmp_path / "model", family)
    trainer = opened(folder, use_rslora=use_rslora)
    batch = random_batch(0, padding=4)
    write_adapter(tmp_path / "adapter", trainer.adapter, base_name=str(folder), base_revision=None, provenance={})
    expected = _peft_gradients(folder, tmp_path / "adapter", batch)
    assert largest_difference(dict(trainer.trainer.gradients([batch])), expected) <= FLOAT32


def _peft_gradients(folder: Path, adapter: Path, batch) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def,type-arg]
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    model(
        torch.from_numpy(batch.input_ids).long(),
        attention_mask=torch.from_numpy(batch.segment_ids),
        labels=torch.from_numpy(batch.labels).long(),
    ).loss.backward()
    return {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def test_a_gradient_that_is_looked_at_in_float16_is_scaled_until_it_is_finite(llama: Path, opened: Opened) -> None:
    """As a step's is: the scale is halved until nothing overflows, and taken off again. The CPU has no float16, so the
    rule is tried in float32, with a scale that overflows there."""
    batch, ready = random_batch(0, padding=4), opened(llama)
    for name, tensor in ready.adapter.tensors.items():
        tensor *= 1.0 if "lora_A" in name else 256.0
    trainer = ready.trainer
    trainer.attach(ready.adapter)
    expected = trainer.gradients([batch])
    trainer._compute = Compute("float16")  # type: ignore[attr-defined]
    trainer._loss_scale = 2.0**127  # type: ignore[attr-defined]
    found = trainer.gradients([batch])
    assert 1.0 < trainer._loss_scale < 2.0**127  # type: ignore[attr-defined]
    assert largest_difference(dict(found), dict(expected)) <= FLOAT32


@pytest.mark.fault("N04")
@pytest.mark.parametrize("weight_format", ["none", "nf4", "int8"])
def test_window_of_unequal_batches_equals_one_batch(weight_format: str, llama: Path, opened: Opened) -> None:
    trainer = opened(llama, weight_format=weight_format).trainer
    one = random_batch(3, rows=3, time=16)
    rows = [_row(one, 0), _row(one, 1), _row(one, 2)]
    rows[1].labels[:, :12] = -100
    one.labels[1, :12] = -100
    assert largest_difference(dict(trainer.gradients(rows)), dict(trainer.gradients([one]))) <= FLOAT32


def _row(batch, row: int):  # type: ignore[no-untyped-def]
    from qlora_hal.run.loop import _rows

    return _rows(batch, slice(row, row + 1))


@pytest.mark.fault("D19")
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_samples_do_not_see_each_other(family: str, tmp_path: Path, opened: Opened) -> None:
    trainer = opened(write_model(tmp_path, family)).trainer
    apart = [random_batch(1, rows=2, time=12, padding=3), random_batch(2, rows=1, time=9)]
    together = packed(apart)
    assert together.is_packed
    assert trainer.evaluate([together]).token_count == trainer.evaluate(apart).token_count
    assert largest_difference(dict(trainer.gradients([together])), dict(trainer.gradients(apart))) <= FLOAT32


@pytest.mark.fault("N03")
def test_micro_batch_without_counted_tokens_changes_nothing(llama: Path, opened: Opened) -> None:
    trainer = opened(llama).trainer
    batch, silent = random_batch(1), random_batch(2)
    silent.labels[:] = -100
    alone, beside = trainer.gradients([batch]), trainer.gradients([silent, batch, silent])
    assert all(np.array_equal(alone[name], beside[name]) for name in alone)
    assert trainer.evaluate([silent]).token_count == 0


@pytest.mark.parametrize("weight_format", ["nf4", "fp4", "int8"])
def test_evaluation_and_generation_leave_gradients_bit_equal(weight_format: str, llama: Path, opened: Opened) -> None:
    """bitsandbytes' own 4-bit layer repacks itself in eval mode on AVX512-BF16 CPUs and then loses gradients."""
    trainer = opened(llama, weight_format=weight_format).trainer
    batch = random_batch(5)
    before = trainer.gradients([batch])
    trainer.evaluate([batch])
    trainer.logits(batch)
    trainer.generate(batch.input_ids[0], max_new_tokens=4)
    after = trainer.gradients([batch])
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.fault("N12")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_step(dropout: float, llama: Path, opened: Opened) -> None:
    window = [random_batch(1), random_batch(2, padding=5)]
    kept, recomputed = (opened(llama, dropout=dropout, checkpointing=on) for on in (False, True))
    for key in range(3):
        assert kept.step(window, dropout_key=key) == recomputed.step(window, dropout_key=key)
    left, right = (o.trainer.export_adapter().tensors for o in (kept, recomputed))
    assert all(np.array_equal(left[name], right[name]) for name in left)


def test_base_weights_are_the_same_bytes_after_training(llama: Path, opened: Opened) -> None:
    trainer = opened(llama, weight_format="nf4")
    modules = list(trainer.trainer.linear_modules())
    before = {module: trainer.trainer.dequantized_weight(module) for module in modules}
    for _ in range(3):
        trainer.step([random_batch(1)])
    assert all(np.array_equal(before[module], trainer.trainer.dequantized_weight(module)) for module in modules)


def test_untargeted_modules_carry_no_adapter(llama: Path, opened: Opened) -> None:
    targets = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    trainer = opened(llama, weight_format="nf4", targets=targets)
    trainer.step([random_batch(1)])
    assert {name.split(".lora_")[0] for name in trainer.trainer.export_adapter().tensors} == {
        f"base_model.model.{target}" for target in targets
    }
