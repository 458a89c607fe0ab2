"""L1: the forward pass. Logits and losses against the float64 oracle on the backend's own weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.contract.values import Adapter
from qlora_hal.formats.catalogue import record_of
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_change, judge_evaluation, judge_logits
from qlora_hal_conformance.fixtures import Opened, Opener
from qlora_hal_conformance.parameters import (
    ADAPTER_SCALES,
    OracleOf,
    each_format_and_dtype,
    each_packing,
    in_each_dtype,
)
from qlora_hal_conformance.random_inputs import (
    at_real_tokens,
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
from qlora_hal_conformance.tolerances import logits_bound
from qlora_hal_oracle import OracleTrainer
from qlora_hal_oracle.random_models import FIRST_ORDINARY_TOKEN, SHAPES, draw_tensors, linear_shapes

LARGE = 400.0
"""Gate and up projections this many times larger make products beyond 65504, the largest float16."""


@pytest.mark.parametrize(("weight_format", "dtype"), each_format_and_dtype())
def test_logits_equal_the_oracle(
    weight_format: WeightFormat,
    dtype: str,
    opened: Opener,
    oracle: OracleOf,
    seeded: np.random.Generator,
    judging: Judge,
) -> None:
    shape, _ = opened.models.drawn("main")
    ready = opened(weight_format=weight_format, dtype=dtype, adapter=draw_adapter(seeded, shape))
    judge_logits(ready, oracle(ready), draw_batch(seeded, shape), judging)


@pytest.mark.parametrize("layout", range(len(SHAPES)))
def test_every_head_layout(
    layout: int, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Two, four and all query heads to a key head; heads narrower and wider together than the hidden size."""
    shape = SHAPES[layout]
    opened.models.define(f"layout{layout}", shape, draw_tensors(shape, seeded))
    ready = opened(f"layout{layout}", adapter=draw_adapter(seeded, shape))
    judge_logits(ready, oracle(ready), draw_batch(seeded, shape), judging)


def test_widths_that_blocks_do_not_divide(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """The product sees the weights that `dequantized_weight` shows. In a format with groups, the unquantized model."""
    shape, _ = opened.models.drawn("uneven")
    chosen = opened.subject.main_format
    grouped = record_of(chosen).within_rows
    if grouped and not opened.subject.declares(WeightFormat.NONE):
        shape, _ = opened.models.drawn("main")
        ready = opened(adapter=draw_adapter(seeded, shape))
    else:
        ready = opened(
            "uneven", weight_format=WeightFormat.NONE if grouped else None, adapter=draw_adapter(seeded, shape)
        )
    judge_logits(ready, oracle(ready), draw_batch(seeded, shape), judging)


@in_each_dtype
def test_tied_head(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    shape, _ = opened.models.drawn("tied")
    ready = opened("tied", adapter=draw_adapter(seeded, shape))
    judge_logits(ready, oracle(ready), draw_batch(seeded, shape), judging)


@in_each_dtype
def test_long_rows(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """Far positions turn far: a wrong rotary frequency shows here, and one that bfloat16 rounded, exact up to 256."""
    shape, _ = opened.models.drawn("long")
    ready = opened("long", adapter=draw_adapter(seeded, shape))
    judge_logits(ready, oracle(ready), draw_batch(seeded, shape, lengths=(600, 257)), judging)


@in_each_dtype
def test_many_rows_at_once(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """A kernel may split a batch, or lose its mask, only where there are more rows than a test has."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    judge_logits(ready, oracle(ready), draw_many_rows(seeded, shape), judging)


@in_each_dtype
def test_deep_model(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """Four layers, wide heads, token ids of more than 15 bits."""
    shape, _ = opened.models.drawn("deep")
    ready = opened("deep", adapter=draw_adapter(seeded, shape))
    judge_logits(ready, oracle(ready), draw_batch(seeded, shape), judging)


@in_each_dtype
def test_special_tokens_are_tokens(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Pad, bos and eos in the text: what is padding is told by `segment_ids`, not by an id."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    judge_logits(ready, oracle(ready), with_special_tokens(seeded, draw_batch(seeded, shape)), judging)


def test_rows_of_one_and_two_tokens(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    judge_logits(ready, oracle(ready), draw_batch(seeded, shape, lengths=(1, 2), prompt=1), judging)


@pytest.mark.parametrize(("use_rslora", "rank"), ADAPTER_SCALES.values(), ids=ADAPTER_SCALES)
@in_each_dtype
def test_scale_of_the_adapter(
    use_rslora: bool, rank: int, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """alpha / r and alpha / sqrt(r), at ranks below and above the usual one."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape, use_rslora=use_rslora, rank=rank))
    batch = draw_batch(seeded, shape)
    found = judge_logits(ready, oracle(ready), batch, judging)
    config = ready.adapter.config  # type: ignore[union-attr]
    wrong = draw_adapter(seeded, shape, rank=rank)
    other = oracle_with_scale(ready, Adapter(ready.adapter.tensors, wrong.config), not use_rslora, config.alpha)  # type: ignore[union-attr]
    without = at_real_tokens(other.logits(batch), batch)
    judge_change("logits with the other scale", found, without, other, batch, ready, judging)


def oracle_with_scale(ready: Opened, adapter: Adapter, use_rslora: bool, alpha: float) -> OracleTrainer:
    from dataclasses import replace

    return ready.oracle(Adapter(adapter.tensors, replace(adapter.config, use_rslora=use_rslora, alpha=alpha)))


@in_each_dtype
def test_b_of_zero_changes_nothing(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Training starts at the base model: with B = 0 the logits are those of the base."""
    shape, _ = opened.models.drawn("main")
    adapter, batch = draw_adapter(seeded, shape), draw_batch(seeded, shape)
    ready = opened(adapter=with_zero(adapter, "B"))
    found = judge_logits(ready, oracle(ready), batch, judging)
    ready.attach(adapter)
    moved = at_real_tokens(ready.trainer.logits(batch), batch)
    judge_change("logits with B", moved, found, oracle(ready), batch, ready, judging)


@pytest.mark.parametrize("leaf", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
@in_each_dtype
def test_adapter_on_one_kind_of_module(
    leaf: str, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """A target module that is missed does not hide behind the others."""
    shape, _ = opened.models.drawn("main")
    targets = [module for module in linear_shapes(shape) if module.endswith(leaf)]
    ready, batch = opened(adapter=draw_adapter(seeded, shape, targets=targets)), draw_batch(seeded, shape)
    found = judge_logits(ready, oracle(ready), batch, judging)
    ready.attach(with_zero(ready.adapter, "B"))  # type: ignore[arg-type]
    without = at_real_tokens(ready.trainer.logits(batch), batch)
    judge_change(f"logits with {leaf}", found, without, oracle(ready), batch, ready, judging)


@in_each_dtype
def test_adapter_on_few_modules(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    shape, _ = opened.models.drawn("main")
    targets = seeded.choice(sorted(linear_shapes(shape)), size=3, replace=False).tolist()
    ready = opened(adapter=draw_adapter(seeded, shape, targets=targets))
    judge_logits(ready, oracle(ready), draw_batch(seeded, shape), judging)


@in_each_dtype
def test_what_stands_at_padding_does_not_matter(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready, batch = opened(adapter=draw_adapter(seeded, shape)), draw_batch(seeded, shape, lengths=(9, 20, 14))
    noise = seeded.integers(FIRST_ORDINARY_TOKEN, shape.vocab_size, batch.input_ids.shape)
    other = with_field(batch, input_ids=np.where(batch.segment_ids > 0, batch.input_ids, noise).astype(np.int32))
    bound = logits_bound(oracle(ready), batch, ready.dtype).times(2, "two results")
    found, again = (at_real_tokens(ready.trainer.logits(b), b) for b in (batch, other))
    judging.within("logits", found, again, bound)


@pytest.mark.needs(Feature.PACKING)
@in_each_dtype
def test_packed_samples_do_not_see_each_other(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    together = packed([draw_batch(seeded, shape, lengths=(11, 7, 13))], time=36)
    assert together.is_packed
    judge_logits(ready, oracle(ready), together, judging)


@pytest.mark.needs(Feature.PACKING)
@pytest.mark.parametrize("rows", each_packing())
@in_each_dtype
def test_rows_of_packed_samples(
    rows: Sequence[Sequence[int]], opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Several rows with samples of their own, ten samples in one, rows beyond 512 and 1024 tokens; what `evaluate`
    sums is the loss of the same logits."""
    model = model_for([sum(lengths) for lengths in rows])
    shape, _ = opened.models.drawn(model)
    ready, batch = opened(model, adapter=draw_adapter(seeded, shape)), draw_packed(seeded, shape, rows)
    reference = oracle(ready)
    judge_logits(ready, reference, batch, judging)
    judge_evaluation(ready, reference, [batch], judging)


@pytest.mark.needs(Feature.GRADIENT_CHECKPOINTING)
@in_each_dtype
def test_recomputation_changes_no_view(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """`logits` and `evaluate`, before and after a step, are those of the model, whatever training keeps."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(checkpointing=True, adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    for _ in range(2):
        reference = ready.oracle(ready.trainer.export_adapter())
        judge_logits(ready, reference, window[0], judging)
        judge_evaluation(ready, reference, window, judging)
        ready.step(window, 1e-2)


@pytest.mark.needs(Feature.GRADIENT_CHECKPOINTING, Feature.PACKING)
@pytest.mark.parametrize("rows", each_packing("several_rows", "beyond_512"))
@in_each_dtype
def test_recomputation_evaluates_packed_rows(
    rows: Sequence[Sequence[int]], opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    model = model_for([sum(lengths) for lengths in rows])
    shape, _ = opened.models.drawn(model)
    ready = opened(model, checkpointing=True, adapter=draw_adapter(seeded, shape))
    judge_evaluation(ready, oracle(ready), [draw_packed(seeded, shape, rows)], judging)


@in_each_dtype
def test_evaluation_sums_token_losses(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """A sum over all counted tokens of all batches, in nats."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    judge_evaluation(ready, oracle(ready), window, judging)


@in_each_dtype
def test_evaluation_of_many_batches(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    window = [batch for _ in range(5) for batch in draw_window(seeded, shape)]
    judge_evaluation(ready, oracle(ready), window, judging)


def test_evaluation_of_nothing_is_zero(opened: Opener, seeded: np.random.Generator) -> None:
    """A batch without a counted token adds nothing, and no NaN."""
    shape, _ = opened.models.drawn("main")
    ready, batch = opened(adapter=draw_adapter(seeded, shape)), draw_batch(seeded, shape)
    silent = with_field(batch, labels=np.full_like(batch.labels, -100))
    found = ready.trainer.evaluate([silent])
    assert (found.loss_sum, found.token_count) == (0.0, 0), f"{found}"


@pytest.mark.needs(Feature.LORA_DROPOUT)
@in_each_dtype
def test_evaluation_has_no_dropout(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Neither `evaluate` nor `logits`, not even after a step that had dropout."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape, dropout=0.5)), draw_window(seeded, shape)
    ready.step(window, 0.0, dropout_key=3)
    reference = oracle(ready)
    judge_evaluation(ready, reference, window, judging)
    judge_logits(ready, reference, window[0], judging)


@pytest.mark.needs("bfloat16")
def test_bfloat16_keeps_its_range(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Activations beyond 65504 are ordinary numbers in bfloat16, and infinities in a float16 in disguise."""
    shape, tensors = opened.models.drawn("main")
    factors = {"gate_proj": LARGE, "up_proj": LARGE, "down_proj": LARGE**-2}
    large = {
        name: (tensor * factors.get(name.split(".")[-2], 1.0)).astype(np.float32) for name, tensor in tensors.items()
    }
    opened.models.define("large", shape, large)
    ready = opened("large", dtype="bfloat16", adapter=draw_adapter(seeded, shape, targets=_attention(shape)))
    judge_logits(ready, oracle(ready), draw_batch(seeded, shape), judging)


def _attention(shape: object) -> list[str]:
    return [module for module in linear_shapes(shape) if "self_attn" in module]  # type: ignore[arg-type]
