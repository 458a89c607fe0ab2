"""L1: the gradient of every adapter tensor, and what must not have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.contract.values import IGNORE_LABEL, Batch
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_gradients, judge_greedy
from qlora_hal_conformance.fixtures import Opened, Opener, placed
from qlora_hal_conformance.parameters import (
    ADAPTER_SCALES,
    OracleOf,
    each_format,
    each_format_and_dtype,
    each_packing,
    in_each_dtype,
)
from qlora_hal_conformance.random_inputs import (
    SHORT_PACKINGS,
    draw_adapter,
    draw_batch,
    draw_many_rows,
    draw_packed,
    draw_window,
    model_for,
    packed,
    with_field,
    with_special_tokens,
    with_zero,
)
from qlora_hal_conformance.tolerances import Bound, gradient_bounds
from qlora_hal_oracle import OracleTrainer
from qlora_hal_oracle.random_models import FIRST_ORDINARY_TOKEN, linear_shapes

DROP = 0.4
DROPOUT_KEY = 2**40 + 11
COUNTED_SHARE = 0.4


@pytest.mark.parametrize(("weight_format", "dtype"), each_format_and_dtype())
def test_every_gradient_equals_the_oracle(
    weight_format: WeightFormat,
    dtype: str,
    opened: Opener,
    oracle: OracleOf,
    seeded: np.random.Generator,
    judging: Judge,
) -> None:
    shape, _ = opened.models.drawn("main")
    ready = opened(weight_format=weight_format, dtype=dtype, adapter=draw_adapter(seeded, shape))
    window = draw_window(seeded, shape)
    judge_gradients(ready.trainer.gradients(window), oracle(ready), window, ready, judging)


@in_each_dtype
def test_each_window_has_its_own_gradient(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Asked again with another window, a trainer that remembers its first answer would give that."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    for window in (draw_window(seeded, shape), draw_window(seeded, shape)):
        judge_gradients(ready.trainer.gradients(window), oracle(ready), window, ready, judging)


@pytest.mark.parametrize("weight_format", each_format())
def test_a_training_step_uses_the_same_gradient(
    weight_format: WeightFormat, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """What `gradients` shows is what `train_step` trains with: read back from the first moment."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(weight_format=weight_format, adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    judge_gradients(ready.trained_gradient(window), oracle(ready), window, ready, judging)


@pytest.mark.needs(Feature.GRADIENT_CHECKPOINTING)
@in_each_dtype
def test_checkpointing_changes_no_gradient(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Recomputed activations give the same gradient, and every tensor gets one."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(checkpointing=True, adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    reference = oracle(ready)
    judge_gradients(ready.trained_gradient(window), reference, window, ready, judging)
    judge_gradients(ready.trainer.gradients(window), reference, window, ready, judging)


@pytest.mark.needs(Feature.GRADIENT_CHECKPOINTING)
@in_each_dtype
def test_checkpointing_of_long_rows(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """What is worth recomputing: long rows, where another kernel may be taken the second time."""
    shape, _ = opened.models.drawn("long")
    ready = opened("long", checkpointing=True, adapter=draw_adapter(seeded, shape))
    window = [draw_batch(seeded, shape, lengths=(540, 330))]
    judge_gradients(ready.trained_gradient(window), oracle(ready), window, ready, judging)


@pytest.mark.needs(Feature.GRADIENT_CHECKPOINTING, Feature.PACKING)
@pytest.mark.parametrize("rows", each_packing("several_rows", "ten_samples", "beyond_512"))
@in_each_dtype
def test_checkpointing_of_packed_rows(
    rows: Sequence[Sequence[int]], opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """The mask of the samples is there in the second forward pass too."""
    model = model_for([sum(lengths) for lengths in rows])
    shape, _ = opened.models.drawn(model)
    ready = opened(model, checkpointing=True, adapter=draw_adapter(seeded, shape))
    window = [draw_packed(seeded, shape, rows)]
    judge_gradients(ready.trained_gradient(window), oracle(ready), window, ready, judging)


@pytest.mark.needs(Feature.GRADIENT_CHECKPOINTING, Feature.PACKING, Feature.LORA_DROPOUT)
@pytest.mark.parametrize("rows", each_packing(*SHORT_PACKINGS))
@in_each_dtype
def test_checkpointing_of_packed_rows_with_dropout(
    rows: Sequence[Sequence[int]], opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """The second forward pass has the masks of the first, of samples and of dropout."""
    shape, _ = opened.models.drawn("main")
    ready = opened(checkpointing=True, adapter=draw_adapter(seeded, shape, dropout=DROP))
    _judge_with_dropout(ready, oracle(ready), [draw_packed(seeded, shape, rows)], judging)


@pytest.mark.needs(Feature.GRADIENT_CHECKPOINTING, Feature.GENERATE)
@in_each_dtype
def test_checkpointing_leaves_generation_and_the_next_gradient_alone(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """A cache of keys and a recomputed layer do not go together; generating must not switch either off for good."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(checkpointing=True, adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    prompt, reference = window[0].input_ids[0, :8], oracle(ready)
    for _ in range(2):
        tokens = ready.trainer.generate(prompt, max_new_tokens=4)
        assert tokens.shape == (4,), f"{tokens.shape} new tokens of 4"
        judge_greedy(ready, prompt, tokens, judging)
        judge_gradients(ready.trained_gradient(window), reference, window, ready, judging)


@pytest.mark.needs(Feature.GRADIENT_CHECKPOINTING, Feature.LORA_DROPOUT)
@in_each_dtype
def test_checkpointing_draws_the_same_dropout_again(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """A mask drawn anew in the recomputation would train with another function than the loss was taken of."""
    shape, _ = opened.models.drawn("main")
    ready = opened(checkpointing=True, adapter=draw_adapter(seeded, shape, dropout=DROP))
    _judge_with_dropout(ready, oracle(ready), draw_window(seeded, shape), judging)


@in_each_dtype
def test_tied_head_has_no_gradient_of_its_own(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("tied")
    ready, window = opened("tied", adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    judge_gradients(ready.trainer.gradients(window), oracle(ready), window, ready, judging)


@pytest.mark.parametrize(("use_rslora", "rank"), ADAPTER_SCALES.values(), ids=ADAPTER_SCALES)
@in_each_dtype
def test_scale_of_the_adapter(
    use_rslora: bool, rank: int, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape, use_rslora=use_rslora, rank=rank))
    window = draw_window(seeded, shape)
    judge_gradients(ready.trainer.gradients(window), oracle(ready), window, ready, judging)


@in_each_dtype
def test_young_adapter(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """At B = 0 every A has a gradient of exactly zero, and every B one that is not."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=with_zero(draw_adapter(seeded, shape), "B")), draw_window(seeded, shape)
    found = ready.trainer.gradients(window)
    judge_gradients(found, oracle(ready), window, ready, judging)
    for name, gradient in found.items():
        assert gradient.any() == ("lora_B" in name), f"{name} has {'no' if 'lora_B' in name else 'a'} gradient"


@in_each_dtype
def test_adapter_on_few_modules(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """Only the targets get gradients; one below others gets its own through them."""
    shape, _ = opened.models.drawn("main")
    targets = seeded.choice(sorted(linear_shapes(shape)), size=4, replace=False).tolist()
    ready = opened(adapter=draw_adapter(seeded, shape, targets=targets))
    window = draw_window(seeded, shape)
    judge_gradients(ready.trainer.gradients(window), oracle(ready), window, ready, judging)


@pytest.mark.parametrize("prompt", [1, 6, 15], ids=["short", "medium", "long"])
@in_each_dtype
def test_prompt_tokens_do_not_count(
    prompt: int, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    window = [draw_batch(seeded, shape, lengths=(20, 18), prompt=prompt)]
    judge_gradients(ready.trainer.gradients(window), oracle(ready), window, ready, judging)


@in_each_dtype
def test_many_rows_at_once(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), [draw_many_rows(seeded, shape)]
    judge_gradients(ready.trained_gradient(window), oracle(ready), window, ready, judging)


@in_each_dtype
def test_long_rows(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """Every label far from the start counts, and every token sees the first."""
    shape, _ = opened.models.drawn("long")
    ready, batch = opened("long", adapter=draw_adapter(seeded, shape)), draw_batch(seeded, shape, lengths=(600, 257))
    labels = np.where(batch.position_ids < 520, IGNORE_LABEL, batch.labels).astype(np.int32)
    for window in ([batch], [with_field(batch, labels=labels)]):
        judge_gradients(ready.trained_gradient(window), oracle(ready), window, ready, judging)


@in_each_dtype
def test_deep_model(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """Four layers, wide heads, token ids of more than 15 bits."""
    shape, _ = opened.models.drawn("deep")
    ready, window = opened("deep", adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    judge_gradients(ready.trained_gradient(window), oracle(ready), window, ready, judging)


@in_each_dtype
def test_special_tokens_are_tokens(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Pad, bos and eos are trained where their labels count."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    window = [with_special_tokens(seeded, batch) for batch in draw_window(seeded, shape)]
    judge_gradients(ready.trained_gradient(window), oracle(ready), window, ready, judging)


@in_each_dtype
def test_scattered_labels(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """Any token may or may not count, as in conversations with several turns."""
    shape, _ = opened.models.drawn("main")
    ready, batch = opened(adapter=draw_adapter(seeded, shape)), draw_batch(seeded, shape)
    counts = seeded.random(batch.labels.shape) < COUNTED_SHARE
    counts[:, 3] = True
    scattered = with_field(batch, labels=np.where(counts, batch.labels, IGNORE_LABEL).astype(np.int32))
    judge_gradients(ready.trainer.gradients([scattered]), oracle(ready), [scattered], ready, judging)


@in_each_dtype
def test_last_token_is_trained(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """The end of the text is what teaches a model to stop: rows where it alone counts, in full and padded rows."""
    shape, _ = opened.models.drawn("main")
    ready, batch = opened(adapter=draw_adapter(seeded, shape)), draw_batch(seeded, shape, lengths=(16, 11))
    labels = np.full_like(batch.labels, IGNORE_LABEL)
    input_ids = batch.input_ids.copy()
    for row, last in enumerate((15, 10)):
        input_ids[row, last] = labels[row, last] = 2
    window = [with_field(batch, labels=labels, input_ids=input_ids)]
    found = ready.trainer.gradients(window)
    judge_gradients(found, oracle(ready), window, ready, judging)
    assert any(gradient.any() for gradient in found.values()), "the last token has no gradient"


@in_each_dtype
def test_what_stands_at_padding_does_not_matter(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready, batch = opened(adapter=draw_adapter(seeded, shape)), draw_batch(seeded, shape, lengths=(9, 20, 14))
    noise = seeded.integers(FIRST_ORDINARY_TOKEN, shape.vocab_size, batch.input_ids.shape)
    other = with_field(batch, input_ids=np.where(batch.segment_ids > 0, batch.input_ids, noise).astype(np.int32))
    bounds = _widened(gradient_bounds(oracle(ready), [batch], ready.dtype), 2.0)
    found, again = (ready.trainer.gradients([b]) for b in (batch, other))
    judging.all_within("gradients", found, again, bounds)


@in_each_dtype
def test_width_of_the_padding_does_not_matter(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready, state = opened(adapter=draw_adapter(seeded, shape)), seeded.bit_generator.state
    window = [draw_batch(seeded, shape, lengths=(9, 14))]
    seeded.bit_generator.state = state
    narrow = window[0]
    wide = [_padded(narrow, 40)]
    bounds = _widened(gradient_bounds(oracle(ready), window, ready.dtype), 2.0)
    judging.all_within("gradients", ready.trainer.gradients(wide), ready.trainer.gradients(window), bounds)


def _padded(batch: Batch, time: int) -> Batch:
    more = ((0, 0), (0, time - batch.labels.shape[1]))
    return Batch(
        np.pad(batch.input_ids, more),
        np.pad(batch.labels, more, constant_values=IGNORE_LABEL),
        np.pad(batch.position_ids, more),
        np.pad(batch.segment_ids, more),
    )


@pytest.mark.needs(Feature.PACKING)
@in_each_dtype
def test_packed_samples_equal_separate_ones(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Cross-sample attention, or positions that go on, would show."""
    shape, _ = opened.models.drawn("main")
    ready, apart = opened(adapter=draw_adapter(seeded, shape)), [draw_batch(seeded, shape, lengths=(11, 7, 13))]
    together = [packed(apart, time=36)]
    reference = oracle(ready)
    judge_gradients(ready.trainer.gradients(together), reference, together, ready, judging)
    judge_gradients(ready.trained_gradient(together), reference, apart, ready, judging)


@pytest.mark.needs(Feature.PACKING)
@pytest.mark.parametrize("rows", each_packing())
@in_each_dtype
def test_packed_rows(
    rows: Sequence[Sequence[int]], opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Several rows with samples of their own, ten samples in one, rows beyond 512 and 1024 tokens."""
    model = model_for([sum(lengths) for lengths in rows])
    shape, _ = opened.models.drawn(model)
    ready, window = opened(model, adapter=draw_adapter(seeded, shape)), [draw_packed(seeded, shape, rows)]
    judge_gradients(ready.trained_gradient(window), oracle(ready), window, ready, judging)


@pytest.mark.needs(Feature.PACKING, Feature.LORA_DROPOUT)
@pytest.mark.parametrize("rows", each_packing(*SHORT_PACKINGS))
@in_each_dtype
def test_packed_rows_with_dropout(
    rows: Sequence[Sequence[int]], opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """A dropout mask goes by row and place in the row, whosever sample stands there."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape, dropout=DROP))
    window = [draw_packed(seeded, shape, rows), draw_packed(seeded, shape, ((5, 6),))]
    _judge_with_dropout(ready, oracle(ready), window, judging)


@in_each_dtype
def test_looking_leaves_the_next_gradient_alone(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Evaluation and logits between two steps: a layer that repacks itself in evaluation loses gradients."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    ready.trainer.evaluate(window)
    ready.trainer.logits(window[0])
    reference = oracle(ready)
    judge_gradients(ready.trainer.gradients(window), reference, window, ready, judging)
    ready.trainer.evaluate(window)
    judge_gradients(ready.trained_gradient(window), reference, window, ready, judging)


@pytest.mark.needs(Feature.GENERATE)
@in_each_dtype
def test_generation_leaves_the_next_gradient_alone(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    for adapter in (True, False):
        ready.trainer.generate(window[0].input_ids[0, :8], max_new_tokens=3, adapter=adapter)
    judge_gradients(ready.trained_gradient(window), oracle(ready), window, ready, judging)


@in_each_dtype
def test_gradients_twice_are_not_added_up(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    for _ in range(2):
        found = ready.trainer.gradients(window)
    reference = oracle(ready)
    judge_gradients(found, reference, window, ready, judging)
    judge_gradients(ready.trained_gradient(window), reference, window, ready, judging)


@in_each_dtype
def test_looking_changes_no_state(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Adapter and moments are the same bits after every view."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    ready.step(window, 1e-3)
    adapter, moments = ready.trainer.export_adapter().tensors, ready.trainer.export_optimizer().moments
    ready.trainer.gradients(window)
    ready.trainer.evaluate(window)
    ready.trainer.logits(window[0])
    judging.equal("adapter", ready.trainer.export_adapter().tensors, adapter)
    judging.equal("moments", ready.trainer.export_optimizer().moments, moments)


def _judge_with_dropout(ready: Opened, reference: OracleTrainer, window: Sequence[Batch], judging: Judge) -> None:
    window = placed(window)
    found = ready.trained_gradient(window, dropout_key=DROPOUT_KEY)
    masks = [ready.masks(batch, DROPOUT_KEY) for batch in window]
    judge_gradients(found, reference, window, ready, judging, masks=masks)


def _widened(bounds: Mapping[str, Bound], factor: float) -> dict[str, Bound]:
    return {name: bound.times(factor, "two results") for name, bound in bounds.items()}
