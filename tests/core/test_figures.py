"""Figures as people read them."""

from __future__ import annotations

import pytest

from qlora_hal.errors import figures


@pytest.mark.parametrize(
    ("number", "written"),
    [(812, "812"), (12_345, "12.3k"), (4.06e6, "4.06M"), (999.4e6, "999M"), (999.9e6, "1B"), (1.234e9, "1.23B")],
)
def test_numbers_have_three_digits_and_the_mark_that_fits(number: float, written: str) -> None:
    assert figures.count(number) == written
