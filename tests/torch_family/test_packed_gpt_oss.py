"""gpt-oss with several samples in a row: attention with sinks and windows keeps them apart, in transformers' layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_models import model_types, write_drawn_model
from flash_on_a_cpu import flash_in_plain_torch
from live_tensors import peak_of
from published_mxfp4 import write_published_gpt_oss
from torch import Tensor
from trainers import OpenTrainer, largest_difference, moved_adapter, open_cpu_trainer, packed, random_batch, source_of

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import AdapterConfig, Batch
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal_backends.cpu_torch.trainer import open_trainer
from qlora_hal_backends.torch_family.attention import causal, sinks
from qlora_hal_backends.torch_family.attention.varlen import UnevenAttention
from qlora_hal_backends.torch_family.platform import ATTENTION_WITH_SINKS

FLOAT32 = 8 * 2048**0.5 * 2**-24
"""As in `test_forward_and_gradients.py`: sums of up to 2048 float32 products in another order, eight deep."""
WINDOW = 4
KEPT = Quantization(WeightFormat.MXFP4, 32)

Opened = Callable[..., OpenTrainer]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    write_published_gpt_oss(tmp_path, sliding_window=WINDOW)
    trainers = []

    def open_with(**compute: Any) -> OpenTrainer:
        trainer = open_trainer()
        trainer.load(source_of(tmp_path), KEPT, Compute(**compute))
        modules = trainer.linear_modules()
        adapter = moved_adapter(AdapterConfig(4, 8.0, 0.0, False, tuple(sorted(modules))), modules)
        trainer.attach(adapter)
        trainers.append(trainer)
        return OpenTrainer(trainer, adapter)

    yield open_with
    for trainer in trainers:
        trainer.close()


def samples() -> list[Batch]:
    """Of more tokens than the window, of as many, of fewer, and of a single one that is told by nothing before it."""
    return [random_batch(1, rows=2, time=12, padding=3), random_batch(2, rows=1, time=WINDOW), random_batch(3, 1, 3)]


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "offload"])
def test_loss_and_gradients_are_those_of_the_samples_apart(recompute: str, opened: Opened) -> None:
    again = recompute != "none"
    trainer = opened(gradient_checkpointing=again, **({"recompute": recompute} if again else {})).trainer
    apart, together = samples(), [packed(samples())]
    assert together[0].is_packed
    expected, found = trainer.evaluate(apart), trainer.evaluate(together)
    assert found.token_count == expected.token_count
    assert found.loss == pytest.approx(expected.loss, rel=FLOAT32)
    assert largest_difference(dict(trainer.gradients(together)), dict(trainer.gradients(apart))) <= FLOAT32


@pytest.mark.parametrize("recompute", ["none", "full", "offload"])
def test_flash_attention_gives_the_same_in_autograds_graph(
    recompute: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its operators in plain torch. What it keeps is kept by autograd's hooks, or recomputation would find it gone."""
    again = recompute != "none"
    trainer = opened(gradient_checkpointing=again, **({"recompute": recompute} if again else {})).trainer
    expected = dict(trainer.gradients(samples()))
    flash = UnevenAttention(causal.FlashVarlen(), "flash")
    monkeypatch.setattr(sinks, "proved_varlen", lambda *_, **__: flash)
    with flash_in_plain_torch():
        found = dict(trainer.gradients([packed(samples())]))
    assert largest_difference(found, expected) <= FLOAT32


def test_padding_behind_packed_samples_changes_nothing(opened: Opened) -> None:
    """Two rows of unequal fill, whose rest is padding."""
    trainer = opened().trainer
    rows = [packed([random_batch(seed, rows=2, time=9)]) for seed in (1, 2)]
    short = packed([random_batch(3, rows=2, time=5)])
    fill = [np.full((1, 8), value, np.int32) for value in (0, -100, 0, 0)]
    padded = Batch(
        *(
            np.concatenate([np.concatenate((getattr(short, name), rest), axis=1), getattr(rows[0], name)])
            for name, rest in zip(("input_ids", "labels", "position_ids", "segment_ids"), fill, strict=True)
        )
    )
    assert largest_difference(dict(trainer.gradients([padded])), dict(trainer.gradients([short, rows[0]]))) <= FLOAT32


def test_a_window_bites_and_sinks_take_their_share(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests above would compare attention that has neither."""
    trainer = opened().trainer
    batch = packed(samples())
    expected = dict(trainer.gradients([batch]))
    attend = causal.one_sample
    for forgotten in ({"window": None}, {"sinks": None}):
        with monkeypatch.context() as patched:
            patched.setattr(causal, "one_sample", lambda *parts: attend(*parts[:-1], replace(parts[-1], **forgotten)))  # noqa: B023
            assert largest_difference(dict(trainer.gradients([batch])), expected) > 1000 * FLOAT32


@pytest.mark.parametrize("wrong", ["one sample to a row", "a boundary off by one"])
def test_samples_that_see_each_other_would_be_noticed(
    wrong: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = opened().trainer
    apart, together = samples(), [packed(samples())]
    attend = causal.sample_by_sample

    def leaky(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], softmax: causal.Softmax) -> Tensor:
        first, second, *rest = lengths
        mixed = (sum(lengths),) if wrong == "one sample to a row" else (first + 1, second - 1, *rest)
        return attend(query, key, value, mixed, softmax)

    expected = dict(trainer.gradients(apart))
    monkeypatch.setattr(sinks, "sample_by_sample", leaky)
    assert largest_difference(dict(trainer.gradients(together)), expected) > 1000 * FLOAT32


def test_lengths_on_the_host_and_positions_on_the_device_mean_the_same(opened: Opened) -> None:
    """What calls the model without lengths, as the trial of a loaded model does, has the same samples."""
    batch = packed(samples())
    base = opened().trainer._base  # type: ignore[attr-defined]
    ids, positions = (torch.from_numpy(part).long() for part in (batch.input_ids, batch.position_ids))
    lengths = tuple(np.bincount(batch.segment_ids[0])[1:].tolist())
    with torch.no_grad():
        by_positions, by_lengths, neither = (
            base.body(input_ids=ids, use_cache=False, **told).last_hidden_state
            for told in (
                {"position_ids": positions},
                {"position_ids": positions, sinks.SAMPLE_LENGTHS: lengths},
                {},
            )
        )
    assert torch.equal(by_positions, by_lengths)
    assert not torch.allclose(by_positions, neither, rtol=1e-2)


@pytest.mark.parametrize("model_type", sorted(ATTENTION_WITH_SINKS))
def test_every_architecture_with_sinks_keeps_samples_apart(model_type: str, tmp_path: Path) -> None:
    if model_type not in model_types():
        pytest.skip("this version of transformers has no such architecture")
    write_drawn_model(tmp_path, model_type, {"sliding_window": WINDOW})
    trainer = open_cpu_trainer(tmp_path).trainer
    assert "sinks: " in trainer.device_facts().kernel_path
    assert (
        largest_difference(dict(trainer.gradients([packed(samples())])), dict(trainer.gradients(samples()))) <= FLOAT32
    )
    trainer.close()


@pytest.mark.parametrize("window", [None, 32])
def test_scores_of_all_pairs_of_tokens_are_never_held(window: int | None) -> None:
    """Nor kept for backward; transformers' eager attention makes them some five times."""
    heads, time, size = 16, 512, 8
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, heads, time, size, generator=generator, requires_grad=True) for _ in range(3)]
    with peak_of() as peak:
        found, _ = sinks.attend(None, *parts, None, scaling=0.3, s_aux=torch.zeros(heads), sliding_window=window)
        found.sum().backward()
    assert peak.bytes < heads * time * time * 4 / 2


def test_a_mask_is_refused_and_not_forgotten() -> None:
    heads = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="takes no mask"):
        sinks.attend(None, heads, heads, heads, torch.zeros(1, 1, 3, 3), scaling=1.0, s_aux=torch.zeros(2))


def test_a_continuation_from_cached_keys_is_that_of_the_whole_row(opened: Opened) -> None:
    """Past the window, whose layers keep its keys alone."""
    trainer = opened().trainer
    prompt = random_batch(4, rows=1, time=2 * WINDOW).input_ids[0]
    found = trainer.generate(prompt, max_new_tokens=6)
    for _ in range(6):
        row = prompt[None]
        ones = np.ones_like(row)
        batch = Batch(row, row.copy(), np.arange(row.shape[1], dtype=np.int32)[None], ones)
        prompt = np.append(prompt, trainer.logits(batch)[0, -1].argmax()).astype(np.int32)
    np.testing.assert_array_equal(found, prompt[2 * WINDOW :])


@pytest.mark.fault("B60")
def test_transformers_own_attention_mixes_samples_and_refuses_them(opened: Opened) -> None:
    """Chosen by name, it is kept; its layers are not told where samples begin."""
    eager = opened(options={"attention": "eager"})
    with pytest.raises(UnsupportedFeatureError, match="cannot train on packed rows") as refusal:
        eager.step([packed(samples())])
    assert refusal.value.code == "QH-B60"
    assert "sinks" not in eager.trainer.device_facts().kernel_path
    ours = opened().trainer
    assert ours.evaluate(samples()).loss == pytest.approx(eager.trainer.evaluate(samples()).loss, rel=FLOAT32)


def test_what_attends_is_said(opened: Opened) -> None:
    path = opened().trainer.device_facts().kernel_path
    assert "sinks: packed rows sample by sample (flash attention does not compute in float32)" in path


@pytest.mark.parametrize("window", [None, WINDOW])
def test_tokens_after_cached_keys_see_what_they_see_in_the_whole_row(window: int | None) -> None:
    """Several at once, whose cache holds more than their windows."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 11, 8, generator=generator)
    key, value = (torch.randn(2, 2, 11, 8, generator=generator) for _ in range(2))
    told: dict[str, Any] = {"scaling": 8**-0.5, "sliding_window": window, "s_aux": torch.randn(4, generator=generator)}
    whole, _ = sinks.attend(None, query, key, value, None, **told)
    last, _ = sinks.attend(None, query[:, :, -3:], key, value, None, **told)
    torch.testing.assert_close(last, whole[:, -3:])
