"""The figures of docs/pictures: what is drawn in them was measured, foreseen, and is possible."""

from __future__ import annotations

import pytest

from benchmarks.growth_figures import FIGURES, SHAPES, Figure


@pytest.fixture(scope="module", params=FIGURES, ids=[make.__name__ for make in FIGURES])
def figure(request: pytest.FixtureRequest) -> Figure:
    made: Figure = request.param()
    return made


def test_every_line_has_measured_points(figure: Figure) -> None:
    assert all(line.measured for line in figure.lines)


def test_no_measured_speed_is_above_the_limit_of_its_products(figure: Figure) -> None:
    for line in figure.lines:
        limit = dict(line.limit)
        assert all(point.tokens_per_second < limit[at] for at, point in line.measured if at in limit), line.name


def test_a_line_grows_with_its_axis(figure: Figure) -> None:
    for line in figure.lines:
        peaks = [peak for _, peak in line.foreseen]
        assert peaks == sorted(peaks), line.name


def test_the_limit_of_an_8b_step_is_that_of_its_operations() -> None:
    # 32 layers of 218.1 million weights and a head of 525 million, each multiplied twice, 4 operations a weight; of
    # attention 7 products of 2048 x 4096 operations a layer and token: 31.9 GFLOP a token.
    assert SHAPES["8b"].limit(2048) == pytest.approx(677e12 / 31.9e9, rel=1e-3)
