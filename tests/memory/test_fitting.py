"""What fits, by an estimate that can be done in the head: a GiB for each row of 1024 tokens, a quarter recomputed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from qlora_hal.memory.fitting import (
    ACCUMULATION,
    AS_IT_IS,
    BASE_OFFLOAD,
    BATCH,
    LENGTH,
    RECOMPUTE,
    Asked,
    Needs,
    Room,
    Step,
    Verdict,
    cost,
    halves,
    largest_fits,
    remedy,
    smaller_batches,
    verdict,
)
from qlora_hal.memory.time_prices import PassChoice

GIB = 2**30
FULL = Step("activations recomputed", {RECOMPUTE: "full"})
EIGHT_BIT = Step("moments in 8 bits", {"training.optim": "adamw_8bit"}, "moments are rounded")
EMBEDDINGS = Step("embeddings on the host", {BASE_OFFLOAD: ("embeddings",)})
LAYERS = Step("embeddings and layers on the host", {BASE_OFFLOAD: ("embeddings", "layers")})
CHOICES = (
    tuple(smaller_batches(8, 2)),
    (AS_IT_IS, FULL),
    (AS_IT_IS, EMBEDDINGS, LAYERS),
    (AS_IT_IS, EIGHT_BIT),
)
OFFLOADED: Mapping[object, float] = {(): 0, ("embeddings",): 0.5, ("embeddings", "layers"): 3.5}


def settings_of(changes: Mapping[str, object]) -> dict[str, Any]:
    return {BATCH: 8, LENGTH: 1024, RECOMPUTE: "none", BASE_OFFLOAD: (), "training.optim": "adamw", **changes}


def needs(changes: Mapping[str, object]) -> Needs:
    """Of the device its peak, of the host what is there and not here."""
    return Needs(peak(changes), int(GIB * OFFLOADED[settings_of(changes)[BASE_OFFLOAD]]))


def peak(changes: Mapping[str, object]) -> int:
    """4 GiB of weights, half of one is embeddings, 1 of moments, and what the tokens take."""
    settings = settings_of(changes)
    kept = settings[BATCH] * settings[LENGTH] / 1024 / (4 if settings[RECOMPUTE] == "full" else 1)
    moments = 1 if settings["training.optim"] == "adamw" else 0
    return int(GIB * (4 - OFFLOADED[settings[BASE_OFFLOAD]] + moments + kept))


def price(changes: Mapping[str, object]) -> PassChoice:
    settings = settings_of(changes)
    return PassChoice(settings[BATCH] * settings[LENGTH], settings[RECOMPUTE], settings[BASE_OFFLOAD])


def test_classes_are_by_the_total_and_its_margin() -> None:
    assert verdict(8, 9, 9) is Verdict.FITS
    assert verdict(8, 9, 8) is Verdict.TIGHT
    assert verdict(8, 9, 7) is Verdict.TOO_SMALL


BOTH = ((AS_IT_IS, FULL),)


def test_the_largest_batch_and_the_longest_row_are_exact() -> None:
    found = largest_fits(needs, price, Room(8 * GIB), BOTH, Asked(1024, longest=4096))
    assert [(one.rows, one.length, one.choice.recompute) for one in found] == [
        (3, 1024, "none"),
        (12, 1024, "full"),
        (1, 3072, "none"),
        (1, 4096, "full"),  # as long as the model has positions, though 12288 would fit
    ]
    assert all(one.high == peak(one.settings) <= 8 * GIB for one in found)
    assert peak({BATCH: 4, LENGTH: 1024}) > 8 * GIB


def test_every_memory_has_its_largest_batch() -> None:
    for rows in range(1, 70):
        for memory in ((5 + rows) * GIB, (6 + rows) * GIB - 1):
            assert largest_fits(needs, price, Room(memory), BOTH, Asked(1024))[0].rows == rows


def test_what_costs_more_is_listed_only_where_more_tokens_fit() -> None:
    found = largest_fits(needs, price, Room(6 * GIB), CHOICES[1:], Asked(1024))
    tokens, costs = [one.tokens for one in found], [cost(one.choice, one.taken) for one in found]
    assert tokens == sorted(set(tokens))
    assert costs == sorted(costs)
    assert found[0].taken.words == "", "a row with all as it is"
    assert found[-1].taken.words == "activations recomputed, embeddings and layers on the host, moments in 8 bits"


def test_rows_and_length_that_are_given_stay() -> None:
    fixed = largest_fits(needs, price, Room(8 * GIB), BOTH, Asked(1024, rows=4))
    assert [(one.rows, one.length, one.choice.recompute) for one in fixed] == [(4, 1024, "full")]
    longer = largest_fits(needs, price, Room(8 * GIB), BOTH, Asked(1024, rows=4, longest=2**20))
    assert [(one.rows, one.length) for one in longer] == [(4, 1024), (4, 3072)]
    assert largest_fits(needs, price, Room(8 * GIB), BOTH, Asked(1024, rows=13)) == ()


def test_micro_batches_divide_a_step_of_a_given_size() -> None:
    assert [one.rows for one in largest_fits(needs, price, Room(8 * GIB), BOTH, Asked(1024, rows_of_step=10))] == [
        2,
        10,
    ]


def test_nothing_fits_a_memory_below_the_weights() -> None:
    assert largest_fits(needs, price, Room(4 * GIB), BOTH, Asked(1024, longest=2**20)) == ()


@pytest.mark.parametrize(
    ("memory", "words", "settings"),
    [
        (13, "", {}),
        (12.5, "embeddings on the host", {BASE_OFFLOAD: ("embeddings",)}),
        (9, "micro-batches of 4 rows", {BATCH: 4, ACCUMULATION: 4}),
        (
            8.5,
            "micro-batches of 4 rows, embeddings on the host",
            {BATCH: 4, ACCUMULATION: 4, BASE_OFFLOAD: ("embeddings",)},
        ),
        (7, "micro-batches of 2 rows", {BATCH: 2, ACCUMULATION: 8}),
        (6, "micro-batches of 1 row", {BATCH: 1, ACCUMULATION: 16}),
    ],
)
def test_the_change_that_costs_least_comes_first(memory: float, words: str, settings: dict[str, object]) -> None:
    found = remedy(needs, price, Room(int(memory * GIB)), CHOICES, 1024)
    assert (found.fits, found.words, found.settings) == (True, words, settings)
    assert found.high == peak(settings) <= memory * GIB


@pytest.mark.parametrize("quarters", range(4, 53))
def test_no_part_of_what_is_advised_can_be_left_out(quarters: int) -> None:
    """Whatever the memory, each step that stands in the advice is needed."""
    memory = quarters * GIB // 4
    found = remedy(needs, price, Room(memory), CHOICES, 1024)
    if found.fits:
        for step in found.steps:
            rest = {path: value for path, value in found.settings.items() if path not in step.settings}
            assert peak(rest) > memory, f"{step.words} of {found.words}"


def test_what_crosses_whole_in_each_pass_is_advised_last() -> None:
    """Without them the least is 3.75 GiB; with them there is room for two rows whose activations are kept."""
    without = remedy(needs, price, Room(int(3.75 * GIB)), CHOICES, 1024)
    assert without.words == "micro-batches of 1 row, activations recomputed, embeddings on the host, moments in 8 bits"
    assert without.gives_up == ("moments are rounded",)
    found = remedy(needs, price, Room(int(3.75 * GIB) - 1), CHOICES, 1024)
    assert found.words == "micro-batches of 2 rows, embeddings and layers on the host"


def test_the_price_is_beside_what_the_settings_take_now() -> None:
    found = remedy(needs, price, Room(7 * GIB), ((AS_IT_IS, FULL),), 1024)
    assert found.time == price(found.settings).time / price({}).time
    assert 1.3 < found.time < 1.33
    assert remedy(needs, price, Room(13 * GIB), CHOICES, 1024).time == 1


def test_shorter_rows_are_the_last_that_is_advised() -> None:
    choices = ((AS_IT_IS, Step("micro-batches of 1 row", {BATCH: 1})), (AS_IT_IS, FULL), (AS_IT_IS, EIGHT_BIT))
    found = remedy(needs, price, Room(int(4.125 * GIB)), choices, 1024)
    assert found.words == "micro-batches of 1 row, activations recomputed, moments in 8 bits, rows of up to 512 tokens"
    assert found.settings == {BATCH: 1, RECOMPUTE: "full", "training.optim": "adamw_8bit", LENGTH: 512}


@pytest.mark.parametrize(
    ("batch", "accumulation", "rows"), [(5, 1, [1]), (6, 1, [3, 2, 1]), (3, 2, [2, 1]), (9, 1, [3, 1]), (4, 2, [2, 1])]
)
def test_smaller_micro_batches_leave_the_rows_of_a_step_as_they_are(
    batch: int, accumulation: int, rows: list[int]
) -> None:
    as_it_is, *smaller = smaller_batches(batch, accumulation)
    assert not as_it_is.settings
    assert [step.settings for step in smaller] == [
        {BATCH: one, ACCUMULATION: batch * accumulation // one} for one in rows
    ]


def test_what_no_setting_makes_fit_is_said_with_the_least() -> None:
    found = remedy(needs, price, Room(GIB // 4), CHOICES, 1024)
    assert not found.fits
    assert found.high == GIB // 2 + GIB // 32, "one row of 128 tokens, recomputed, beside what of the base is left"


def test_a_global_batch_needs_no_accumulation() -> None:
    assert all(ACCUMULATION not in step.settings for step in smaller_batches(8, None))
    assert [step.settings.get(BATCH) for step in smaller_batches(10, None, rows_of_step=10)] == [None, 5, 2, 1]
    assert list(halves(10)) == [5, 3, 2, 1]
