"""L1: what people train. Relatives of Llama, unusual keys of config.json, and sizes that no list has.

A family that is declared must be computed. Any other model, and any unusual key, is computed as its architecture's code
computes it, or refused while it is loaded: trained differently it must never be.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from _pytest.mark.structures import ParameterSet

from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.values import Batch
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_gradients, judge_logits
from qlora_hal_conformance.fixtures import Opened, Opener
from qlora_hal_conformance.parameters import OracleOf, in_each_dtype
from qlora_hal_conformance.random_inputs import (
    at_real_tokens,
    draw_adapter,
    draw_batch,
    draw_window,
    packed,
    total_tokens,
    with_field,
)
from qlora_hal_conformance.subject import Family
from qlora_hal_conformance.tolerances import loss_bound, rounding
from qlora_hal_oracle import LlamaShape, OracleTrainer, read_shape
from qlora_hal_oracle.families import FAMILIES, MODEL_TYPES, VARIATIONS, Config, draw_config, vary
from qlora_hal_oracle.random_models import EMBEDDING, HEAD, draw_plain_shape, draw_tensors, tied

SIXTEEN_BITS = 65_536
LEFT_OUT = frozenset({"rms_norm_eps", "rope_theta", "hidden_act", "tie_word_embeddings"})
SMALL = 2.0**-9
BEYOND_THE_ORIGINAL_LENGTH = (44, 37)
"""Positions past the 32 of a drawn Phi-3: every token of the batch gets the other factors."""


def each_family() -> list[ParameterSet]:
    return [pytest.param(name, id=name, marks=pytest.mark.needs(Family(MODEL_TYPES[name]))) for name in FAMILIES]


def each_variation() -> list[ParameterSet]:
    return [
        pytest.param(name, id=name, marks=pytest.mark.needs(Family(MODEL_TYPES[variation.family], varied=True)))
        for name, variation in VARIATIONS.items()
    ]


# families -------------------------------------------------------------------------------------------------------------
@in_each_dtype
@pytest.mark.parametrize("family", each_family())
def test_a_family_equals_the_oracle(
    family: str, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Logits, losses, and every gradient, in rows longer than a window; packed rows too where they are declared."""
    shape, ready = _opened(opened, seeded, draw_config(family, seeded))
    window, reference = draw_window(seeded, shape), oracle(ready)
    judge_logits(ready, reference, window[0], judging)
    _judge_loss(ready, reference, window, judging)
    judge_gradients(ready.trained_gradient(window), reference, window, ready, judging)
    if opened.subject.declares(Feature.PACKING):
        together = [packed([draw_batch(seeded, shape, lengths=(13, 7, 16))], time=40)]
        judge_gradients(ready.trained_gradient(together), reference, together, ready, judging)


@pytest.mark.parametrize("name", each_variation())
def test_an_unusual_key_is_computed_or_refused(
    name: str, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, ready = _opened(opened, seeded, vary(name, seeded))
    _judge(ready, oracle(ready), draw_batch(seeded, shape), judging)


@pytest.mark.needs(Family("llama", varied=True))
def test_a_stored_head_of_a_tied_model_is_used_or_refused(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """config.json ties the head to the embeddings, and the checkpoint has another head: transformers takes that."""
    config = {**draw_config("llama", seeded), "tie_word_embeddings": True}
    shape = read_shape(config)
    untied = draw_tensors(replace(shape, tie_word_embeddings=False), seeded)
    assert HEAD in untied
    opened.models.define("head", shape, untied, config)
    ready = opened("head", adapter=draw_adapter(seeded, shape))
    _judge(ready, oracle(ready), draw_batch(seeded, shape), judging)


@pytest.mark.needs(Family("llama", varied=True))
def test_keys_left_out_have_the_defaults_of_their_architecture(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """The embeddings are small, so that the first norm's epsilon is much of what it is added to."""
    config = {key: value for key, value in draw_config("llama", seeded).items() if key not in LEFT_OUT}
    shape = read_shape(config)
    tensors = draw_tensors(shape, seeded)
    tensors[EMBEDDING] = tensors[EMBEDDING] * np.float32(SMALL)
    opened.models.define("sparse", shape, tensors, config)
    ready = opened("sparse", adapter=draw_adapter(seeded, shape))
    _judge(ready, oracle(ready), draw_batch(seeded, shape), judging)


@pytest.mark.needs(Family("phi3", varied=True))
def test_longrope_beyond_the_original_length_is_computed_or_refused(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    shape, ready = _opened(opened, seeded, draw_config("phi3", seeded))
    _judge(ready, oracle(ready), draw_batch(seeded, shape, lengths=BEYOND_THE_ORIGINAL_LENGTH), judging)


# sizes ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("queries", [3, 6, 7], ids=lambda queries: f"{queries}_queries")
def test_groups_of_queries(
    queries: int, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Groups that no power of two divides: neighbours share a key, not every second or third head."""
    shape = draw_plain_shape(seeded, num_attention_heads=4 * queries, num_key_value_heads=4, head_dim=32)
    ready = _opened_plain(opened, seeded, shape)
    _judge(ready, oracle(ready), draw_batch(seeded, shape), judging)


def test_many_layers(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """As many as small models have, all adapted."""
    shape = draw_plain_shape(seeded, num_hidden_layers=int(seeded.integers(12, 15)))
    ready = _opened_plain(opened, seeded, shape)
    _judge(ready, oracle(ready), draw_batch(seeded, shape), judging)


def test_large_vocabulary(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """Token ids of more than 16 bits, read and predicted."""
    shape = tied(
        draw_plain_shape(seeded, vocab_size=SIXTEEN_BITS + int(seeded.integers(1000, 3000)), num_hidden_layers=1)
    )
    ready = _opened_plain(opened, seeded, shape)
    _judge(ready, oracle(ready), _with_large_tokens(seeded, draw_batch(seeded, shape), shape), judging)


def test_high_rank(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """Beyond 64; each tensor has far more than 4096 numbers."""
    shape = draw_plain_shape(seeded)
    ready = _opened_plain(opened, seeded, shape, rank=int(seeded.choice((96, 160, 256))))
    _judge(ready, oracle(ready), draw_batch(seeded, shape), judging)


def test_rows_beyond_1024_tokens(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    shape = draw_plain_shape(seeded, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    ready = _opened_plain(opened, seeded, shape)
    lengths = (int(seeded.integers(1040, 1100)),)
    _judge(ready, oracle(ready), draw_batch(seeded, shape, lengths=lengths), judging)


def test_thirty_three_rows(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """One more than a warp, or than a batch of 32."""
    shape = draw_plain_shape(seeded)
    ready = _opened_plain(opened, seeded, shape)
    lengths = [int(length) for length in seeded.integers(4, 20, 33)]
    batch = draw_batch(seeded, shape, lengths=lengths)
    _judge(ready, oracle(ready), batch, judging)
    _judge_loss(ready, oracle(ready), [batch], judging)


# what the cases share -------------------------------------------------------------------------------------------------
def _opened(opened: Opener, seeded: np.random.Generator, config: Config) -> tuple[LlamaShape, Opened]:
    """The drawn model of a config.json, loaded, with an adapter in mid-training."""
    shape = read_shape(config)
    opened.models.define("drawn", shape, draw_tensors(shape, seeded), config)
    return shape, opened("drawn", adapter=draw_adapter(seeded, shape))


def _opened_plain(opened: Opener, seeded: np.random.Generator, shape: LlamaShape, *, rank: int | None = None) -> Opened:
    opened.models.define("sizes", shape, draw_tensors(shape, seeded))
    return opened("sizes", adapter=draw_adapter(seeded, shape, rank=rank))


def _with_large_tokens(seeded: np.random.Generator, batch: Batch, shape: LlamaShape) -> Batch:
    large = seeded.integers(SIXTEEN_BITS, shape.vocab_size, batch.input_ids.shape).astype(np.int32)
    chosen = seeded.random(batch.input_ids.shape) < 0.5
    input_ids = np.where(chosen, large, batch.input_ids)
    return with_field(batch, input_ids=input_ids, labels=np.where(batch.labels >= 0, input_ids, batch.labels))


def _judge(ready: Opened, reference: OracleTrainer, batch: Batch, judging: Judge) -> None:
    """Logits and every gradient of one batch."""
    scales = reference.error_scales([batch])
    found, expected = (
        at_real_tokens(logits, batch) for logits in (ready.trainer.logits(batch), reference.logits(batch))
    )
    judging.within("logits", found, expected, rounding(scales["lm_head"], ready.dtype))
    gradients, exact = ready.trained_gradient([batch]), reference.gradients([batch])
    bounds = {name: rounding(scales[name], ready.dtype) for name in exact}
    judging.all_within("gradients", gradients, exact, bounds)


def _judge_loss(ready: Opened, reference: OracleTrainer, window: list[Batch], judging: Judge) -> None:
    found = ready.trainer.evaluate(window)
    assert found.token_count == total_tokens(window)
    expected, bound = np.array(reference.evaluate(window)[0]), loss_bound(reference, window, ready.dtype)
    judging.within("loss sum", np.array(found.loss_sum), expected, bound)
