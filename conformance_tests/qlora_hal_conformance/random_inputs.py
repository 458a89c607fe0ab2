"""Fresh inputs: every case draws its own from the run's seed and its id, so none depends on another's order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qlora_hal.adapter.naming import lora_a_key, lora_b_key
from qlora_hal.contract.values import IGNORE_LABEL, PADDING_SEGMENT, Adapter, AdapterConfig, Batch, Float32, Int32
from qlora_hal_oracle import LlamaShape
from qlora_hal_oracle.random_models import EMBEDDING, FIRST_ORDINARY_TOKEN, draw_tensors, linear_shapes

RANKS = (2, 4, 8)
SCALES = (0.75, 1.5, 3.0)
"""alpha / r. None is 1, 2 or a power that would make a dropped or a squared scale look right."""


SPECIAL_SHARE = 0.4

PACKINGS: Mapping[str, Sequence[Sequence[int]]] = {
    "several_rows": ((11, 7, 13), (9, 5), (6, 4, 12, 3)),
    "ten_samples": ((4, 6, 3, 5, 7, 4, 3, 6, 5, 4), (20, 9)),
    "beyond_512": ((300, 170, 90),),
    "beyond_1024": ((380, 420, 240, 60),),
}
"""Lengths of the samples of each packed row. Attention takes other kernels for long rows, and masks are cut by the
number of samples and of rows."""
LONG_ROW = 512
SHORT_PACKINGS = ("several_rows", "ten_samples")


def stream(seed: int, name: str) -> np.random.Generator:
    """The generator of one case or model: a function of the run's seed and the name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def draw_batch(
    random: np.random.Generator,
    shape: LlamaShape,
    *,
    lengths: Sequence[int] = (24, 17),
    time: int | None = None,
    prompt: int | None = None,
) -> Batch:
    """One sample to a row, padded on the right to `time`; each row's first `prompt` tokens carry no loss (at least
    one, by default drawn). Padding holds random tokens: they must not matter."""
    width = time or max(lengths)
    input_ids = random.integers(FIRST_ORDINARY_TOKEN, shape.vocab_size, (len(lengths), width)).astype(np.int32)
    places = np.arange(width, dtype=np.int32)
    segment_ids = (places < np.asarray(lengths)[:, None]).astype(np.int32)
    labels = np.where(segment_ids > 0, input_ids, IGNORE_LABEL).astype(np.int32)
    for row in range(len(lengths)):
        labels[row, : int(random.integers(1, 5)) if prompt is None else prompt] = IGNORE_LABEL
    return Batch(input_ids, labels, (places * segment_ids).astype(np.int32), segment_ids)


def draw_two_tokens_seen(random: np.random.Generator, shape: LlamaShape) -> Batch:
    """One row whose only counted token is predicted from two that differ. Of equal tokens the values are equal, so
    whatever attention makes of them is the same, and the gradient of a query is nothing but rounding."""
    while True:
        batch = draw_batch(random, shape, lengths=(3,), prompt=2)
        if batch.input_ids[0, 0] != batch.input_ids[0, 1]:
            return batch


def draw_many_rows(random: np.random.Generator, shape: LlamaShape, rows: int = 16) -> Batch:
    """As many rows as a GPU gets at once, short ones, so that all lengths occur."""
    return draw_batch(random, shape, lengths=[int(length) for length in random.integers(4, 20, rows)])


def with_special_tokens(random: np.random.Generator, batch: Batch) -> Batch:
    """Pad, bos and eos in the middle of the text, where they are tokens like any other: `segment_ids` says what is
    padding, and labels say what counts."""
    special = random.integers(0, FIRST_ORDINARY_TOKEN, batch.input_ids.shape).astype(np.int32)
    chosen = random.random(batch.input_ids.shape) < SPECIAL_SHARE
    chosen[0, 2:5] = True
    special[0, 2:5] = range(FIRST_ORDINARY_TOKEN)
    counted = batch.labels != IGNORE_LABEL
    counted[0, 2:5] = True
    input_ids = np.where(chosen, special, batch.input_ids)
    return with_field(batch, input_ids=input_ids, labels=np.where(counted, input_ids, IGNORE_LABEL))


def draw_window(random: np.random.Generator, shape: LlamaShape) -> list[Batch]:
    """Two micro-batches with very different numbers of counted tokens: a mean of means would show."""
    long = draw_batch(random, shape, lengths=(int(random.integers(20, 28)), int(random.integers(14, 20))))
    short = draw_batch(random, shape, lengths=(int(random.integers(5, 8)),), time=12, prompt=2)
    return [long, short]


def rows_of(batch: Batch) -> list[Batch]:
    """Each row as a batch of its own."""
    return [
        replace(
            batch,
            input_ids=batch.input_ids[row : row + 1],
            labels=batch.labels[row : row + 1],
            position_ids=batch.position_ids[row : row + 1],
            segment_ids=batch.segment_ids[row : row + 1],
            rows=None if batch.rows is None else batch.rows[row : row + 1],
        )
        for row in range(len(batch.labels))
    ]


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches of one length in one."""
    fields = ("input_ids", "labels", "position_ids", "segment_ids", "rows")
    return Batch(**{name: np.concatenate([getattr(batch, name) for batch in batches]) for name in fields})


def packed(batches: Sequence[Batch], *, time: int | None = None) -> Batch:
    """Every row of every batch, without its padding, in one row; padded to `time`."""
    pieces = [(row, int(np.count_nonzero(row.segment_ids))) for batch in batches for row in rows_of(batch)]
    width = time or sum(length for _, length in pieces)
    joined = [np.zeros((1, width), np.int32) for _ in range(4)]
    input_ids, labels, position_ids, segment_ids = joined
    labels[:] = IGNORE_LABEL
    start = 0
    for number, (row, length) in enumerate(pieces, start=1):
        place = slice(start, start + length)
        input_ids[0, place], labels[0, place] = row.input_ids[0, :length], row.labels[0, :length]
        position_ids[0, place], segment_ids[0, place] = row.position_ids[0, :length], number
        start += length
    return Batch(input_ids, labels, position_ids, segment_ids)


def draw_packed(
    random: np.random.Generator, shape: LlamaShape, rows: Sequence[Sequence[int]], *, time: int | None = None
) -> Batch:
    """Rows of several samples each, of these lengths, padded to the longest row or to `time`."""
    width = time or max(sum(lengths) for lengths in rows)
    alone = [packed([draw_batch(random, shape, lengths=lengths)], time=width) for lengths in rows]
    fields = ("input_ids", "labels", "position_ids", "segment_ids")
    return Batch(**{name: np.concatenate([getattr(row, name) for row in alone]) for name in fields})


def with_field(batch: Batch, **fields: Int32) -> Batch:
    """The batch with copies of some arrays replaced; the others are copied too."""
    names = ("input_ids", "labels", "position_ids", "segment_ids")
    ids, labels, positions, segments = (
        np.array(fields.get(name, getattr(batch, name)), dtype=np.int32) for name in names
    )
    return Batch(ids, labels, positions, segments, batch.rows, batch.weights)


def draw_adapter(
    random: np.random.Generator,
    shape: LlamaShape,
    *,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    use_rslora: bool = False,
    rank: int | None = None,
) -> Adapter:
    """An adapter in mid-training: with B = 0 half of all mistakes are invisible. Its product is about a quarter of
    the base's: A keeps the variance of its input, B brings it to 1/4 / scale."""
    linears = linear_shapes(shape)
    modules = tuple(sorted(linears if targets is None else targets))
    r = int(random.choice(RANKS)) if rank is None else rank
    config = AdapterConfig(r, float(random.choice(SCALES)) * r, dropout, use_rslora, modules)
    spread = 0.25 / (config.scale * r**0.5)
    tensors = {}
    for module in modules:
        linear = linears[module]
        a, b = random.normal(size=linear.lora_a(r)) / linear.inputs**0.5, spread * random.normal(size=linear.lora_b(r))
        tensors[lora_a_key(module)], tensors[lora_b_key(module)] = a.astype(np.float32), b.astype(np.float32)
    return Adapter(tensors, config)


def attentive(tensors: Mapping[str, Float32]) -> dict[str, Float32]:
    """The model with attention that chooses: scores four times as far apart, and twice as much of what is chosen."""
    factors = {"q_proj": 2.0, "k_proj": 2.0, "o_proj": 2.0}
    return {
        name: (tensor * np.float32(factors.get(name.split(".")[-2], 1.0))).astype(np.float32)
        for name, tensor in tensors.items()
    }


WIDE_EPSILON = 1e-2
"""Next to it the mean square of a small embedding is nothing: such rows stay small behind a norm."""
WEIGHT_OCTAVES, EMBEDDING_OCTAVES = 6, 8
ZERO_ROWS = 3
"""So many rows of each weight, from the second on in steps of seven, and the embedding of the first ordinary token."""


def draw_wide_rows(random: np.random.Generator, shape: LlamaShape) -> tuple[LlamaShape, dict[str, Float32]]:
    """A model of which the rows of weights and of embeddings differ widely in size, and some are zeros."""
    wide = replace(shape, rms_norm_eps=WIDE_EPSILON)
    tensors = draw_tensors(wide, random)
    linears = {f"{module}.weight" for module in linear_shapes(wide)}
    for name in (*sorted(linears), EMBEDDING):
        octaves = WEIGHT_OCTAVES if name in linears else EMBEDDING_OCTAVES
        sizes = 2.0 ** -random.integers(0, octaves + 1, (len(tensors[name]), 1)).astype(np.float64)
        tensors[name] = (tensors[name] * sizes).astype(np.float32)
    for name in linears:
        tensors[name][1 : 1 + 7 * ZERO_ROWS : 7] = 0.0
    tensors[EMBEDDING][FIRST_ORDINARY_TOKEN] = 0.0
    return wide, tensors


def model_for(lengths: Sequence[int]) -> str:
    """The model for rows of these lengths: one of few heads where a row is long."""
    return "long" if max(lengths) > LONG_ROW else "main"


def with_zero(adapter: Adapter, half: str) -> Adapter:
    """The adapter with every A, or every B, set to zero."""
    ending = f".lora_{half}.weight"
    return Adapter(
        {n: np.zeros_like(t) if n.endswith(ending) else t.copy() for n, t in adapter.tensors.items()}, adapter.config
    )


def total_tokens(window: Sequence[Batch]) -> int:
    return sum(batch.counted_tokens for batch in window)


def at_real_tokens(values: npt.NDArray[np.floating], batch: Batch) -> Float32:
    """Rows of `values` `[batch, time, ...]` that are not padding: what stands at padding is nobody's business."""
    real: Float32 = values[batch.segment_ids != PADDING_SEGMENT]
    return real
