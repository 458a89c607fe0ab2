"""Attention over samples that lie end to end, against a dense mask in float64; and batches without their padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flash_on_a_cpu import dense, flash_in_plain_torch
from fused_models import DEVICE, SAME_FUNCTION, Model, load, packed, relative
from torch import Tensor
from trainers import random_batch

from qlora_hal.contract import dropout
from qlora_hal.contract.values import Batch
from qlora_hal_backends.torch_family import step
from qlora_hal_backends.torch_family.attention.causal import (
    Attention,
    CausalAttention,
    FlashVarlen,
    HeadCounts,
    SampleBySample,
    Samples,
    Softmax,
)
from qlora_hal_backends.torch_family.attention.varlen import (
    LARGEST_ERROR,
    SAMPLE_BY_SAMPLE,
    UnevenAttention,
    largest_error,
    proved_varlen,
)
from qlora_hal_backends.torch_family.fused.attach import attach_with
from qlora_hal_backends.torch_family.fused.body import FusedBody
from qlora_hal_backends.torch_family.fused.end_to_end import without_padding
from qlora_hal_backends.torch_family.fused.reference import ReferenceOperations
from qlora_hal_backends.torch_family.lora_linear import words_on

CPU = torch.device("cpu")
HEADS = HeadCounts(query=6, key_value=2, size=16)
SCALE = 0.3
LENGTHS = {"unequal": (3, 7, 1, 12), "equal": (6, 6, 6), "one": (9,), "single tokens": (1, 1)}


@pytest.fixture
def flash_on_a_cpu() -> Iterator[None]:
    with flash_in_plain_torch():
        yield


@pytest.fixture(params=[SampleBySample, FlashVarlen], ids=["sample by sample", "flash"])
def uneven(request: pytest.FixtureRequest, flash_on_a_cpu: None) -> Attention:
    attention: Attention = request.param()
    return attention


def projected(rows: int, seed: int = 0) -> Tensor:
    """Queries, keys and values side by side with a tail, as a group's product leaves them."""
    columns = HEADS.query_columns + 2 * HEADS.key_columns
    return torch.randn(rows, columns + 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads_of(buffer: Tensor) -> list[Tensor]:
    parts = buffer.split((HEADS.query_columns, HEADS.key_columns, HEADS.key_columns, 8), dim=1)[:3]
    return [part.unflatten(1, (-1, HEADS.size)) for part in parts]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("sinks", [None, torch.linspace(-2.0, 3.0, HEADS.query)], ids=["no sinks", "sinks"])
def test_a_token_sees_its_own_sample_before_it_and_nothing_else(
    uneven: Attention, lengths: tuple[int, ...], window: int | None, sinks: Tensor | None
) -> None:
    rows = sum(lengths)
    buffer = projected(rows)
    mixed = CausalAttention(uneven)(
        *heads_of(buffer), Samples.of(lengths, CPU), Softmax(SCALE, window, sinks), with_graph=True
    )
    gradient = projected(rows, seed=1)[:, : HEADS.query_columns].contiguous()
    found = [part.transpose(1, 2).flatten(0, 1) for part in mixed.backward(gradient)]
    leaves = [part.detach().requires_grad_() for part in heads_of(buffer)]
    expected = dense(*leaves, lengths, window, SCALE, sinks)
    # Sums of some ten float64 terms in two orders.
    torch.testing.assert_close(mixed.output, expected.detach().flatten(1), rtol=1e-12, atol=1e-12)
    for one, other in zip(found, torch.autograd.grad(expected, leaves, gradient.view_as(expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_evaluation_keeps_nothing(uneven: Attention) -> None:
    samples = Samples.of((3, 5), CPU)
    mixed = CausalAttention(uneven)(*heads_of(projected(8)), samples, Softmax(SCALE), with_graph=False)
    assert not mixed.output.requires_grad
    assert mixed.output.shape == (8, HEADS.query_columns)


# which attention serves -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("heads", "dtype", "words"),
    [
        (HEADS, torch.float32, "does not compute in float32"),
        (HeadCounts(2, 2, 320), torch.bfloat16, "no heads of 320"),
        (HEADS, torch.bfloat16, "flash attention does not run here: NotImplementedError"),
    ],
    ids=["dtype", "head size", "device"],
)
def test_what_flash_attention_cannot_do_goes_sample_by_sample_and_says_so(
    heads: HeadCounts, dtype: torch.dtype, words: str
) -> None:
    served = proved_varlen(CPU, heads, dtype)
    assert isinstance(served.attention, SampleBySample)
    assert served.words.startswith("packed rows sample by sample (")
    assert words in served.words


class SeesItsNeighbour:
    """`SampleBySample` with the first sample's end moved by one token."""

    def __call__(self, *parts, **settings):  # type: ignore[no-untyped-def]
        *heads, samples, softmax = parts
        first, second, *rest = samples.lengths
        moved = replace(samples, lengths=(first + 1, second - 1, *rest))
        return SampleBySample()(*heads, moved, softmax, **settings)


class ForgetsItsWindow:
    def __call__(self, *parts, **settings):  # type: ignore[no-untyped-def]
        return SampleBySample()(*parts[:-1], replace(parts[-1], window=None), **settings)


class ForgetsItsSinks:
    def __call__(self, *parts, **settings):  # type: ignore[no-untyped-def]
        return SampleBySample()(*parts[:-1], replace(parts[-1], sinks=None), **settings)


@pytest.mark.parametrize(
    ("wrong", "with_sinks"),
    [(SeesItsNeighbour(), False), (ForgetsItsWindow(), False), (ForgetsItsSinks(), True)],
    ids=["neighbour", "window", "sinks"],
)
def test_the_trial_tells_a_wrong_attention_from_a_rounded_one(wrong: Attention, with_sinks: bool) -> None:
    class Rounded:
        def __call__(self, *parts, **settings):  # type: ignore[no-untyped-def]
            return SampleBySample()(*(p * (1 + 2**-7) if isinstance(p, Tensor) else p for p in parts), **settings)

    assert largest_error(Rounded(), CPU, HEADS, torch.bfloat16, with_sinks=with_sinks) < LARGEST_ERROR
    assert largest_error(wrong, CPU, HEADS, torch.bfloat16, with_sinks=with_sinks) > LARGEST_ERROR


# batches without padding ----------------------------------------------------------------------------------------------
def padded(lengths: Sequence[int], time: int, *, weighted: bool = False) -> Batch:
    batch = random_batch(5, rows=len(lengths), time=time)
    real = np.arange(time)[None] < np.array(lengths)[:, None]
    return replace(
        batch,
        labels=np.where(real, batch.labels, -100).astype(np.int32),
        segment_ids=real.astype(np.int32),
        position_ids=np.where(real, batch.position_ids, 0).astype(np.int32),
        weights=np.random.default_rng(2).uniform(0.5, 2, real.shape).astype(np.float32) if weighted else None,
    )


def body_of(model: Model, uneven: UnevenAttention = SAMPLE_BY_SAMPLE) -> FusedBody:
    return attach_with(ReferenceOperations(), model.base, model.flat, model.compute, uneven=uneven)


BATCHES: dict[str, Callable[[], Batch]] = {
    "rows of unequal length": lambda: padded((20, 7, 1), 20),
    "rows of one length": lambda: padded((12, 12), 16),
    "one row": lambda: padded((13,), 16),
    "an empty row": lambda: padded((9, 0, 14), 16),
    "weighted": lambda: padded((20, 7), 20, weighted=True),
    "packed": lambda: packed(random_batch(3, padding=5)),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("flash", [False, True], ids=["sample by sample", "flash"])
def test_loss_and_gradients_are_those_of_the_padded_batch(
    batch: Callable[[], Batch], flash: bool, flash_on_a_cpu: None, tmp_path: Path
) -> None:
    model = load(tmp_path)
    body = body_of(model, UnevenAttention(FlashVarlen(), "flash") if flash else SAMPLE_BY_SAMPLE)
    laid_out = body.laid_out(batch())
    assert laid_out.input_ids.shape == (1, batch().real_tokens)
    expected_loss, expected = gradient(model, model.plain, batch())
    loss, found = gradient(model, body.batch_loss, laid_out)
    assert loss == pytest.approx(expected_loss, rel=SAME_FUNCTION)
    assert relative(found, expected) < SAME_FUNCTION


def gradient(model: Model, loss: step.BatchLoss, batch: Batch) -> tuple[list[float], Tensor]:
    """Of the sum that is minimised: weighted where tokens are."""
    model.flat.gradients.zero_()
    value = loss(step.to_device(batch, DEVICE), 1 / 40)
    step.minimised(value).backward()
    return value.detach().reshape(-1).tolist(), model.flat.gradients.clone()


def test_what_has_little_padding_keeps_its_rectangle() -> None:
    batch = padded((64, 62), 64)
    assert without_padding(batch) is batch
    assert without_padding(padded((64, 56), 64)).input_ids.shape == (1, 120)


def test_what_has_no_padding_or_nothing_else_is_left_as_it_is() -> None:
    for batch in (random_batch(1), padded((0, 0), 8)):
        assert without_padding(batch) is batch


def test_samples_keep_their_order_and_their_numbers() -> None:
    laid_out = without_padding(packed(random_batch(3, padding=5)))
    assert laid_out.segment_ids.tolist() == [[1] * 10 + [2] * 5 + [3] * 10 + [4] * 10]
    assert (laid_out.position_ids == 0).sum() == 4
    assert step.to_device(laid_out, CPU).lengths == (10, 5, 10, 10)


def test_views_that_answer_for_each_place_are_given_the_whole_batch(tmp_path: Path) -> None:
    model = load(tmp_path)
    batch = packed(random_batch(3, padding=5))
    with torch.no_grad():
        states = body_of(model).hidden_states(step.to_device(batch, DEVICE))
        expected = step.hidden_states(model.base, step.to_device(batch, DEVICE))
    assert states.shape == expected.shape
    real = torch.from_numpy(batch.segment_ids > 0)
    assert relative(states[real], expected[real]) < SAME_FUNCTION


@pytest.mark.parametrize("lengths", [(7, 20, 3), (20, 19)], ids=["laid out", "as it is"])
def test_dropout_of_a_batch_is_the_same_without_its_padding(lengths: tuple[int, ...], tmp_path: Path) -> None:
    model = load(tmp_path, dropout=0.3)
    body, batch = body_of(model), padded(lengths, 20)
    rows = np.arange(len(batch.input_ids), dtype=np.int32)
    words = dropout.token_words(2**50 + 9, rows, batch.input_ids.shape[1])
    model.flat.switches.token_words = words_on(words.reshape(-1), CPU)
    expected_loss, expected = gradient(model, model.plain, batch)
    model.flat.switches.token_words = words_on(body.laid_out_words(batch, words), CPU)
    loss, found = gradient(model, body.batch_loss, body.laid_out(batch))
    assert loss == pytest.approx(expected_loss, rel=SAME_FUNCTION)
    assert relative(found, expected) < SAME_FUNCTION


# on a GPU -------------------------------------------------------------------------------------------------------------
@pytest.mark.needs_cuda
@pytest.mark.parametrize(
    "heads", [HeadCounts(32, 8, 128), HeadCounts(8, 8, 64), HeadCounts(8, 4, 256), HeadCounts(32, 32, 96)], ids=str
)
def test_flash_attention_proves_itself_on_this_gpu(heads: HeadCounts) -> None:
    """On Ampere and later; its words would say why not."""
    for with_sinks in (False, True):
        served = proved_varlen(torch.device("cuda"), heads, torch.bfloat16, with_sinks=with_sinks)
        assert served.words == "packed rows by flash attention"


@pytest.mark.needs_cuda
@pytest.mark.parametrize("window", [None, 100])
def test_flash_attention_errs_no_more_than_torch_on_long_samples(window: int | None) -> None:
    device, heads, lengths = torch.device("cuda"), HeadCounts(32, 8, 128), (1, 700, 2, 45, 1300)
    rows, columns = sum(lengths), heads.query_columns + 2 * heads.key_columns
    exact = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device)
    upstream = torch.randn(rows, heads.query_columns, generator=torch.Generator().manual_seed(1)).to(device)
    found: dict[str, list[Tensor]] = {}
    for name, attention, dtype in (
        ("exact", SampleBySample(), torch.float32),
        ("torch", SampleBySample(), torch.bfloat16),
        ("flash", FlashVarlen(), torch.bfloat16),
    ):
        parts = exact.bfloat16().to(dtype).split((heads.query_columns, heads.key_columns, heads.key_columns), dim=1)
        mixed = attention(
            *(part.unflatten(1, (-1, heads.size)) for part in parts),
            Samples.of(lengths, device),
            Softmax(heads.size**-0.5, window),
            with_graph=True,
        )
        found[name] = [mixed.output, *mixed.backward(upstream.bfloat16().to(dtype))]
    for flash, plain, expected in zip(found["flash"], found["torch"], found["exact"], strict=True):
        # Two draws of the same rounding noise; half as much again is a bound on the draw.
        assert relative(flash, expected) < 1.5 * relative(plain, expected) + 2.0**-12


@pytest.mark.needs_cuda
def test_packed_and_padded_batches_of_a_fused_model_train_as_the_plain_layers_do(tmp_path: Path) -> None:
    from qlora_hal_backends.torch_family.fused import FusedBody, try_attach

    model = load(tmp_path, "qwen3", dtype="bfloat16")
    exact = load(tmp_path / "exact", "qwen3")
    device = torch.device("cuda")
    body = try_attach(model.base, model.flat, model.compute, device)
    assert isinstance(body, FusedBody), body
    assert body.words == "fused layers, packed rows by flash attention"
    for batch in (packed(random_batch(3, padding=5)), padded((20, 7, 1), 20)):
        _, expected = exact.gradient(exact.plain, batch)
        _, plain = model.gradient(model.plain, batch)
        _, found = model.gradient(body.batch_loss, body.laid_out(batch))
        assert relative(found, expected) < 1.5 * relative(plain, expected)
