"""What fits, by an estimate that can be done in the head: a GiB for each row of 1024 tokens, a quarter recomputed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from qlora_hal.contract.values import MemoryEstimate
from qlora_hal.memory.fitting import (
    ACCUMULATION,
    BATCH,
    LENGTH,
    RECOMPUTE,
    Step,
    Verdict,
    largest_fits,
    remedy,
    verdict,
)

GIB = 2**30
EIGHT_BIT_MOMENTS = Step("moments in 8 bits", {"training.optim": "adamw_8bit"})


def peak(changes: Mapping[str, object]) -> MemoryEstimate:
    """4 GiB of weights, 1 of moments, and what the tokens take; without a margin."""
    settings = {BATCH: 8, LENGTH: 1024, RECOMPUTE: "none", "training.optim": "adamw", **changes}
    tokens = int(str(settings[BATCH])) * int(str(settings[LENGTH]))
    kept = GIB * tokens // 1024 // (4 if settings[RECOMPUTE] == "full" else 1)
    moments = GIB if settings["training.optim"] == "adamw" else 0
    return MemoryEstimate(4 * GIB, 0, 0, moments, kept, 0, 0, 0, relative_error=0.0)


def test_classes_are_by_the_total_and_its_margin() -> None:
    assert verdict(8, 9, 9) is Verdict.FITS
    assert verdict(8, 9, 8) is Verdict.TIGHT
    assert verdict(8, 9, 7) is Verdict.TOO_SMALL


def test_the_largest_batch_and_the_longest_row_are_exact() -> None:
    found = largest_fits(peak, 8 * GIB, 1024, 4096)
    assert [(one.rows, one.length, one.recomputed) for one in found] == [
        (3, 1024, False),
        (1, 3072, False),
        (12, 1024, True),
        (1, 4096, True),  # as long as the model has positions, though 12288 would fit
    ]
    assert all(one.high <= 8 * GIB for one in found)
    assert peak({BATCH: 4, LENGTH: 1024}).high > 8 * GIB


def test_every_memory_has_its_largest_batch() -> None:
    for rows in range(1, 70):
        assert largest_fits(peak, (5 + rows) * GIB, 1024, 1024)[0].rows == rows
        assert largest_fits(peak, (6 + rows) * GIB - 1, 1024, 1024)[0].rows == rows


def test_nothing_fits_a_memory_below_the_weights() -> None:
    assert largest_fits(peak, 4 * GIB, 1024, None) == ()


@pytest.mark.parametrize(
    ("memory", "words", "settings"),
    [
        (13, "", {}),
        (9, "micro-batches of 4 rows", {BATCH: 4, ACCUMULATION: 4}),
        (6, "micro-batches of 1 row", {BATCH: 1, ACCUMULATION: 16}),
        (5.5, "micro-batches of 1 row, activations recomputed", {BATCH: 1, ACCUMULATION: 16, RECOMPUTE: "full"}),
        (
            4.25,
            "micro-batches of 1 row, activations recomputed, moments in 8 bits",
            {BATCH: 1, ACCUMULATION: 16, RECOMPUTE: "full", "training.optim": "adamw_8bit"},
        ),
        (
            4.125,
            "micro-batches of 1 row, activations recomputed, moments in 8 bits, rows of up to 512 tokens",
            {BATCH: 1, ACCUMULATION: 16, RECOMPUTE: "full", "training.optim": "adamw_8bit", LENGTH: 512},
        ),
    ],
)
def test_the_cheapest_settings_come_first(memory: float, words: str, settings: dict[str, object]) -> None:
    found = remedy(peak, int(memory * GIB), 8, 2, 1024, [EIGHT_BIT_MOMENTS])
    assert (found.fits, found.words, found.settings) == (True, words, settings)
    assert found.high == peak(settings).high <= memory * GIB


@pytest.mark.parametrize(
    ("batch", "accumulation", "most", "rows"), [(5, 1, 3, 1), (6, 1, 3, 3), (3, 2, 2, 2), (9, 1, 5, 3)]
)
def test_smaller_micro_batches_leave_the_rows_of_a_step_as_they_are(
    batch: int, accumulation: int, most: int, rows: int
) -> None:
    memory = peak({BATCH: most}).high
    found = remedy(peak, memory, batch, accumulation, 1024, [])
    assert (found.fits, found.settings) == (True, {BATCH: rows, ACCUMULATION: batch * accumulation // rows})


def test_what_no_setting_makes_fit_is_said_with_the_least() -> None:
    found = remedy(peak, 4 * GIB, 8, 2, 1024, [EIGHT_BIT_MOMENTS])
    assert not found.fits
    assert found.high == 4 * GIB + GIB // 32, "one row of 128 tokens, recomputed"


def test_a_global_batch_needs_no_accumulation() -> None:
    assert ACCUMULATION not in remedy(peak, 9 * GIB, 8, None, 1024, []).settings
