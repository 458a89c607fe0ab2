"""Small models and windows for the oracle's own tests. Everything is drawn from fixed seeds."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from qlora_hal.contract.values import Batch
from qlora_hal_oracle import IGNORE_LABEL, LlamaShape, lora_a_name, lora_b_name
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.lora import ATTENTION_MODULES, MLP_MODULES

# Read by the libraries when they are first imported, which the test modules do after this file. No test may reach a
# network; gptqmodel refuses to start on two cores unless it is told the number of its workers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

Tensors = dict[str, Float64]
SHAPE = LlamaShape(
    vocab_size=23,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rope_theta=500.0,
    rms_norm_eps=1e-5,
)


@pytest.fixture
def shape() -> LlamaShape:
    """Two layers, two query heads to each key head, and heads wider together (16) than the hidden size (12)."""
    return SHAPE


@pytest.fixture
def no_compiler() -> Iterator[None]:
    """bitsandbytes and gptqmodel would send small decoders through torch.compile: seconds for nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def linear_sizes(shape: LlamaShape) -> dict[str, tuple[int, int]]:
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size
    outs_and_ins = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    outs_and_ins += [(inner, hidden), (inner, hidden), (hidden, inner)]
    of_layer = dict(zip(ATTENTION_MODULES + MLP_MODULES, outs_and_ins, strict=True))
    sizes = {
        f"model.layers.{layer}.{name}": size
        for layer in range(shape.num_hidden_layers)
        for name, size in of_layer.items()
    }
    return {**sizes, "lm_head": (shape.vocab_size, hidden)}


@pytest.fixture
def make_base() -> Callable[..., Tensors]:
    """Random base weights of a shape; with `attention_bias` also biases of the four attention projections."""

    def make(shape: LlamaShape, *, attention_bias: bool = False, seed: int = 1) -> Tensors:
        random = np.random.default_rng(seed)
        base = {"model.embed_tokens.weight": random.normal(size=(shape.vocab_size, shape.hidden_size))}
        for module, (out_features, in_features) in linear_sizes(shape).items():
            if module == "lm_head" and shape.tie_word_embeddings:
                continue
            base[f"{module}.weight"] = random.normal(size=(out_features, in_features)) / np.sqrt(in_features)
            if attention_bias and "self_attn" in module:
                base[f"{module}.bias"] = 0.3 * random.normal(size=out_features)
        norms = ["model.norm"]
        for layer in range(shape.num_hidden_layers):
            norms += [f"model.layers.{layer}.{place}_layernorm" for place in ("input", "post_attention")]
        for name in norms:
            base[f"{name}.weight"] = 1.0 + 0.2 * random.normal(size=shape.hidden_size)
        return base

    return make


@pytest.fixture
def make_adapter() -> Callable[..., Tensors]:
    """Random adapter tensors, B not zero, for the modules whose last name is wanted (all but the head by default)."""

    def make(shape: LlamaShape, *, rank: int = 3, seed: int = 2, wanted: tuple[str, ...] | None = None) -> Tensors:
        random = np.random.default_rng(seed)
        adapter = {}
        for module, (out_features, in_features) in linear_sizes(shape).items():
            last_name = module.rsplit(".", 1)[-1]
            if last_name != "lm_head" if wanted is None else last_name in wanted:
                adapter[lora_a_name(module)] = random.normal(size=(rank, in_features)) / np.sqrt(in_features)
                adapter[lora_b_name(module)] = 0.3 * random.normal(size=(out_features, rank))
        return adapter

    return make


@pytest.fixture
def window() -> list[Batch]:
    """Two micro-batches with 8 and 3 counted tokens: packed samples, masked prompts and padding."""
    random = np.random.default_rng(3)
    packed = segments_to_batch([[5, 4], [6]], time=11, random=random)
    short = segments_to_batch([[4]], time=6, random=random)
    packed.labels[1, :4] = IGNORE_LABEL
    packed.labels[0, 2] = IGNORE_LABEL
    return [packed, short]


def segments_to_batch(rows: list[list[int]], *, time: int, random: np.random.Generator) -> Batch:
    """Rows of packed samples of the given lengths, padded on the right with random tokens (which must not matter)."""
    batch = np.zeros((4, len(rows), time), dtype=np.int32)
    input_ids, labels, position_ids, segment_ids = batch
    input_ids[:] = random.integers(0, SHAPE.vocab_size, size=input_ids.shape)
    labels[:] = IGNORE_LABEL
    for row, lengths in enumerate(rows):
        start = 0
        for segment, length in enumerate(lengths, start=1):
            place = slice(start, start + length)
            position_ids[row, place] = np.arange(length)
            segment_ids[row, place] = segment
            labels[row, start + 1 : start + length] = input_ids[row, start + 1 : start + length]
            start += length
    return Batch(input_ids, labels, position_ids, segment_ids)


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Packed rows of the given sample lengths."""

    def make(rows: list[list[int]], *, time: int, seed: int = 4) -> Batch:
        return segments_to_batch(rows, time=time, random=np.random.default_rng(seed))

    return make
