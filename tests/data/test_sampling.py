"""Windows are a pure function of (seed, epoch, step), and every row takes part once in each epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_hal.contract.values import IGNORE_LABEL, PADDING_SEGMENT, Batch
from qlora_hal.contract.world import World
from qlora_hal.data import ChatTokenizer, PreparedData, TokenStore, WindowSampler, evaluation_batches
from qlora_hal.data.tokens.order import Purpose, permutation
from qlora_hal.data.tokens.packing import pack
from qlora_hal.errors import DataError

CAPACITY = 32


def store_of(lengths: list[int], counted: list[int] | None = None) -> TokenStore:
    """Rows whose tokens tell where they come from: row r holds 1000 r, 1000 r + 1, ..."""
    sizes = np.array(lengths, np.int64)
    stops = np.cumsum(sizes)
    starts = stops - sizes
    tokens = np.concatenate([1000 * row + np.arange(size) for row, size in enumerate(lengths)]).astype(np.int32)
    trained = np.zeros(len(tokens), np.uint8)
    for row, size in enumerate(lengths):
        number = (size - 1) if counted is None else counted[row]
        trained[stops[row] - number : stops[row]] = 1
    counts = np.array([int(trained[a:b].sum()) for a, b in zip(starts, stops, strict=True)], np.int32)
    numbers = np.arange(1, len(lengths) + 1)
    return TokenStore(tokens, trained, starts, stops, numbers, counts, numbers.astype(np.uint64))


def sampler_of(store: TokenStore, **changes: Any) -> WindowSampler:
    settings: dict[str, Any] = {
        "batch_size": 3, "accumulation": 2, "seed": 5, "shuffle": True, "group_by_length": True, "packing": False,
        "max_seq_length": CAPACITY, "pad_id": 0,
    }  # fmt: skip
    return WindowSampler(store, **{**settings, **changes})


def samples(batch: Batch) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """(tokens, labels, positions) of each segment."""
    for line in range(len(batch.input_ids)):
        for segment in range(1, int(batch.segment_ids[line].max()) + 1):
            here = batch.segment_ids[line] == segment
            yield tuple(field[line][here].tolist() for field in (batch.input_ids, batch.labels, batch.position_ids))


cases = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(2, CAPACITY), min_size=1, max_size=60),
        "batch_size": st.integers(1, 4),
        "accumulation": st.integers(1, 3),
        "ranks": st.integers(1, 3),
        "seed": st.integers(0, 2**63 - 1),
        "shuffle": st.booleans(),
        "group_by_length": st.booleans(),
        "packing": st.booleans(),
        "tokens_per_batch": st.none() | st.integers(CAPACITY, 6 * CAPACITY),
    }
)


@pytest.mark.fault("N03", "N05", "D19")
@settings(deadline=None, max_examples=150)
@given(case=cases, epoch=st.integers(0, 3))
def test_every_row_takes_part_once_an_epoch_with_all_its_tokens(case: dict[str, Any], epoch: int) -> None:
    lengths, ranks = case.pop("lengths"), case.pop("ranks")
    store = store_of(lengths)
    samplers = [sampler_of(store, **case, world=World(rank, ranks)) for rank in range(ranks)]
    first = samplers[0]
    seen: Counter[int] = Counter()
    counted = 0
    for step in range(epoch * first.steps_per_epoch, (epoch + 1) * first.steps_per_epoch):
        window = [batch for sampler in samplers for batch in sampler.window(step)]
        tokens_of_step = sum(batch.counted_tokens for batch in window)
        assert tokens_of_step == first.token_count(step) > 0
        counted += tokens_of_step
        rows = Counter(
            tokens[0] // 1000
            for batch in window
            for tokens, labels, _ in samples(batch)
            if any(label != IGNORE_LABEL for label in labels)
        )
        assert sorted(row + 1 for row in rows) == first.rows_of(step)
        seen += rows
        for batch in window:
            assert batch.input_ids.shape[1] % 8 == 0
            for tokens, labels, positions in samples(batch):
                assert labels[0] == IGNORE_LABEL
                assert positions == list(range(len(tokens)))
            padding = batch.segment_ids == PADDING_SEGMENT
            assert (batch.labels[padding] == IGNORE_LABEL).all()
            assert (batch.input_ids[padding] == 0).all()
    assert seen == Counter(range(len(lengths)))
    assert counted == store.counted_tokens


@settings(deadline=None, max_examples=60)
@given(case=cases, step=st.integers(0, 40))
def test_window_is_a_pure_function_of_seed_and_step(case: dict[str, Any], step: int) -> None:
    store = store_of(case.pop("lengths"))
    case.pop("ranks")
    walked, direct = sampler_of(store, **case), sampler_of(store, **case)
    for earlier in range(step):
        walked.window(earlier)
    for one, other in zip(walked.window(step), direct.window(step), strict=True):
        for field in ("input_ids", "labels", "position_ids", "segment_ids"):
            assert np.array_equal(getattr(one, field), getattr(other, field))


@settings(deadline=None, max_examples=60)
@given(case=cases, step=st.integers(0, 12))
def test_rows_of_a_window_do_not_depend_on_how_it_is_split(case: dict[str, Any], step: int) -> None:
    store = store_of(case.pop("lengths"))
    case.pop("ranks")
    case.update(batch_size=4, accumulation=3)
    whole = sampler_of(store, **case)
    for batch_size, accumulation, ranks in ((12, 1, 1), (2, 3, 2), (1, 4, 3)):
        case.update(batch_size=batch_size, accumulation=accumulation)
        assert sampler_of(store, **case, world=World(0, ranks)).rows_of(step) == whole.rows_of(step)


@settings(deadline=None, max_examples=100)
@given(case=cases, step=st.integers(0, 12), tokens=st.integers(CAPACITY, 6 * CAPACITY))
def test_micro_batches_by_tokens_cut_the_same_window_elsewhere(case: dict[str, Any], step: int, tokens: int) -> None:
    """The rows, their order and so their places in the window, which dropout's masks are drawn by, are the same."""
    store = store_of(case.pop("lengths"))
    case.pop("ranks")
    by_rows = sampler_of(store, **{**case, "tokens_per_batch": None}).window(step)
    by_tokens = sampler_of(store, **{**case, "tokens_per_batch": tokens}).window(step)
    assert rows_in_order(by_tokens) == rows_in_order(by_rows)
    for batch in by_tokens:
        assert batch.input_ids.size <= tokens or len(batch.input_ids) == 1
    for batch, following in pairwise(by_tokens):
        width = max(batch.input_ids.shape[1], -(-int((following.segment_ids[0] > 0).sum()) // 8) * 8)
        assert (len(batch.input_ids) + 1) * width > tokens, "the next row would have found room"


def rows_in_order(window: Sequence[Batch]) -> list[tuple[int, list[int]]]:
    """(place in the window, tokens without padding) of each sequence."""
    return [
        (int(place), tokens[segments > 0].tolist())
        for batch in window
        for place, tokens, segments in zip(batch.rows, batch.input_ids, batch.segment_ids, strict=True)
    ]


def test_short_rows_take_fewer_micro_batches_by_tokens() -> None:
    store = store_of([8] * 24)
    assert len(sampler_of(store, batch_size=2, accumulation=12).window(0)) == 12
    assert len(sampler_of(store, batch_size=2, accumulation=12, tokens_per_batch=64).window(0)) == 3


def test_order_changes_with_the_epoch_and_the_seed_only_when_shuffled() -> None:
    store = store_of([8] * 40)

    def orders(**changes: Any) -> list[list[list[int]]]:
        sampler = sampler_of(store, **changes)
        return [[sampler.rows_of(step + epoch * 7) for step in range(7)] for epoch in (0, 1)]

    shuffled = orders()
    assert shuffled[0] != shuffled[1]
    assert shuffled != orders(seed=6)
    assert shuffled == orders()
    plain = orders(shuffle=False)
    assert plain[0] == plain[1] == [list(range(at + 1, min(at + 6, 40) + 1)) for at in range(0, 40, 6)]


def philox_block(counter: int, key: tuple[int, int]) -> list[int]:
    """One block of Philox4x64-10 (Salmon et al. 2011, section 5.3; multipliers and Weyl constants of table 2)."""
    words, mask = [counter, 0, 0, 0], 2**64 - 1
    for _ in range(10):
        first, second = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
        words = [(second >> 64) ^ words[1] ^ key[0], second & mask, (first >> 64) ^ words[3] ^ key[1], first & mask]
        key = ((key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask)
    return words


def test_order_is_fixed_for_all_releases() -> None:
    """Against Philox4x64-10 written out from the paper; another order would break resuming."""
    key = (7, (int(Purpose.ROWS) << 48) | 2)
    draws = [draw for block in (1, 2) for draw in philox_block(block, key)]
    assert permutation(8, 7, Purpose.ROWS, 2).tolist() == sorted(range(8), key=draws.__getitem__)
    assert permutation(8, 7, Purpose.ROWS, 1).tolist() != permutation(8, 7, Purpose.ROWS, 0).tolist()
    assert permutation(8, 7, Purpose.WINDOWS, 0).tolist() != permutation(8, 7, Purpose.ROWS, 0).tolist()


def test_grouping_saves_padding_and_keeps_windows_mixed() -> None:
    lengths = np.random.Generator(np.random.Philox(1)).integers(2, CAPACITY + 1, 3000).tolist()
    store = store_of(lengths)

    def padded(**changes: Any) -> tuple[int, list[float]]:
        sampler = sampler_of(store, batch_size=4, accumulation=2, **changes)
        windows = [sampler.window(step) for step in range(sampler.steps_per_epoch)]
        means = [sum(batch.real_tokens for batch in window) / 8 for window in windows]
        return sum(batch.input_ids.size for window in windows for batch in window), means

    grouped, means = padded()
    alone, _ = padded(group_by_length=False)
    real = int(store.lengths.sum())
    assert grouped - real < 0.6 * (alone - real)  # rounding up to 8 alone costs about 3.5 positions a row of 17
    # A sorted epoch would have neighbouring windows of nearly equal length: correlation near 1.
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


@pytest.mark.fault("N05")
def test_last_partial_window_is_used_by_its_tokens() -> None:
    store = store_of([5] * 8)
    sampler = sampler_of(store, batch_size=2, accumulation=3)
    assert sampler.steps_per_epoch == 2
    assert [len(sampler.window(step)) for step in (0, 1)] == [3, 1]
    assert [sampler.token_count(step) for step in (0, 1)] == [24, 8]


@pytest.mark.fault("N03", "N05")
def test_rank_without_a_share_of_the_last_window_gets_tokens_without_loss() -> None:
    store = store_of([5] * 5)
    ranks = [sampler_of(store, batch_size=2, accumulation=1, world=World(rank, 4)) for rank in range(4)]
    windows = [sampler.window(0) for sampler in ranks]
    assert [sum(batch.counted_tokens for batch in window) for window in windows] == [8, 8, 4, 0]
    assert windows[3][0].real_tokens > 0  # a row of padding alone would have nothing to attend to
    assert all(sampler.token_count(0) == 20 for sampler in ranks)


@pytest.mark.fault("N03")
def test_row_that_nothing_is_learnt_from_never_enters_a_window() -> None:
    with pytest.raises(DataError, match=r"QH-D05.*1 of 2 rows have no trained token \(row 2\)"):
        sampler_of(store_of([4, 4], counted=[2, 0]))


def test_total_steps_round_up_and_never_by_rounding_error() -> None:
    sampler = sampler_of(store_of([4] * 60), batch_size=2, accumulation=1)
    assert sampler.steps_per_epoch == 30
    assert [sampler.total_steps(epochs, None) for epochs in (1.0, 0.1, 2.5, 0.01)] == [30, 3, 75, 1]
    assert sampler.total_steps(1.0, 7) == 7
    assert sampler.epoch_of(45) == 1.5


def test_evaluation_has_every_row_once_longest_first() -> None:
    lengths = [3, 9, 5, 30, 7, 2, 2]
    store = store_of(lengths)
    batches = list(evaluation_batches(store, 3, pad_id=0))
    assert [batch.input_ids.shape for batch in batches] == [(3, 32), (3, 8), (1, 8)]
    assert Counter(tokens[0] // 1000 for batch in batches for tokens, _, _ in samples(batch)) == Counter(range(7))
    shares = [list(evaluation_batches(store, 3, pad_id=0, world=World(rank, 2))) for rank in range(2)]
    assert sum(batch.counted_tokens for share in shares for batch in share) == store.counted_tokens


@settings(deadline=None, max_examples=200)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80), capacity=st.integers(8, 40))
def test_packs_hold_every_row_once_and_are_few(lengths: list[int], capacity: int) -> None:
    sizes = np.array(lengths, np.int64)
    packs = pack(sizes, capacity, np.arange(len(lengths)))
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or int(sizes[rows].sum()) <= capacity for rows in packs)
    fitting = [size for size in lengths if size <= capacity]
    least = -(-sum(fitting) // capacity) + len(lengths) - len(fitting)
    # Any two half-empty packs would have been one: at most twice the least number, plus one.
    assert len(packs) <= 2 * least + 1


def reference_loss(batch: Batch) -> tuple[float, int]:
    """Sum of token losses of a small causal model that sees positions, and its own segment only.

    State at t: running mean over the segment's tokens up to t of an embedding of (token, position); logits: its product
    with an output matrix. Any leak of tokens or positions between samples changes the sum.
    """
    draw = np.random.Generator(np.random.Philox(3))
    token, position, output = draw.normal(size=(64, 8)), draw.normal(size=(64, 8)), draw.normal(size=(8, 64))
    total, count = 0.0, 0
    for line in range(len(batch.input_ids)):
        ids, labels = batch.input_ids[line] % 64, batch.labels[line]
        for t in range(len(ids) - 1):
            if labels[t + 1] == IGNORE_LABEL:
                continue
            seen = (batch.segment_ids[line, : t + 1] == batch.segment_ids[line, t]).nonzero()[0]
            state = np.mean([token[ids[s]] * position[batch.position_ids[line, s]] for s in seen], axis=0)
            logits = state @ output
            total += float(np.log(np.exp(logits).sum()) - logits[labels[t + 1] % 64])
            count += 1
    return total, count


@pytest.mark.fault("D19")
@pytest.mark.parametrize("seed", range(3))
def test_packed_loss_equals_unpacked_loss(seed: int) -> None:
    draw = np.random.Generator(np.random.Philox(seed))
    store = store_of(draw.integers(2, 20, 24).tolist())
    sums = []
    for packing in (False, True):
        sampler = sampler_of(store, packing=packing)
        batches = [batch for step in range(sampler.steps_per_epoch) for batch in sampler.window(step)]
        assert any(batch.is_packed for batch in batches) is packing
        parts = [reference_loss(batch) for batch in batches]
        sums.append((sum(part[0] for part in parts), sum(part[1] for part in parts)))
    assert sums[0][1] == sums[1][1] == store.counted_tokens
    # The same terms in another order: float64 sums of under 500 terms below 20 differ by less than 500 * 20 * 2**-52.
    assert abs(sums[0][0] - sums[1][0]) < 500 * 500 * 20 * 2**-52


def test_prepared_rows_pack_with_reported_efficiency(
    prepared: Callable[..., PreparedData], conversation: Callable[..., dict[str, Any]], chatml: ChatTokenizer
) -> None:
    data = prepared([conversation("a", "one two " * (n % 5)) for n in range(40)], packing=True, max_seq_length=128)
    assert data.report.packing_efficiency is not None
    sampler = sampler_of(data.train, packing=True, max_seq_length=128, pad_id=chatml.pad_id)
    assert data.report.packing_efficiency == pytest.approx(
        int(data.train.lengths.sum()) / (sampler.sequences * 128), rel=1e-12
    )
    assert any(line.startswith("packing: ") for line in data.report.lines())


@pytest.mark.parametrize("changes", [{"batch_size": 10**12}, {"accumulation": 10**30}, {"batch_size": 2**63 - 1}])
@pytest.mark.parametrize("packing", [False, True])
def test_a_window_beyond_all_rows_takes_no_more_memory_than_they_do(changes: dict[str, int], packing: bool) -> None:
    store = store_of([3, 5, 4, 6, 2])
    sampler = sampler_of(store, packing=packing, **changes)
    exact = sampler_of(store, packing=packing, batch_size=sampler.sequences, accumulation=1)
    assert sampler.steps_per_epoch == 1
    assert sampler.rows_of(3) == [1, 2, 3, 4, 5]
    assert sum(batch.counted_tokens for batch in sampler.window(3)) == exact.token_count(3)
    assert "each step has all of them" in sampler.notes[0]
