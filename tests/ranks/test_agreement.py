"""Ranks agree by sums: flags, numbers of each, short texts, evaluations, and whether they are the same run at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from qlora_hal.contract.values import Float64, LossSum
from qlora_hal.contract.world import World
from qlora_hal.errors import ConfigError
from qlora_hal.ranks.agreement import Agreement


class Sums:
    """Sums over threads, each of which is a rank."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._given: list[Float64] = []

    def sum_over_ranks(self, values: Float64) -> Float64:
        self._given.append(values)
        self._barrier.wait(10)
        total = np.sum(self._given, axis=0)
        self._barrier.wait(10)
        self._given.clear()
        self._barrier.wait(10)
        return total


class Unasked:
    def sum_over_ranks(self, values: Float64) -> Float64:
        raise AssertionError("one rank has nobody to ask")


def of_all(size: int, ask: Callable[[Agreement], Any]) -> list[Any]:
    """What each of so many ranks finds, errors too."""
    sums = Sums(size)

    def found(rank: int) -> Any:
        try:
            return ask(Agreement(World(rank, size, rank), sums))
        except ConfigError as error:
            return error

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(found, range(size)))


def test_one_rank_asks_nobody() -> None:
    alone = Agreement(World(), Unasked())
    assert alone.how_many(True, False) == (1, 0)
    assert alone.of_each([2.0]).tolist() == [[2.0]]
    assert alone.texts("here") == ["here"]
    assert alone.evaluation(LossSum(1.0, 2)) == LossSum(1.0, 2)
    alone.require_alike({"the seed": "1"})


def test_every_rank_finds_how_many_have_a_flag() -> None:
    assert of_all(3, lambda ranks: ranks.how_many(ranks.world.rank > 0, False, True)) == [(2, 0, 3)] * 3


def test_every_rank_sees_the_numbers_and_the_texts_of_each() -> None:
    tables = of_all(2, lambda ranks: ranks.of_each([ranks.world.rank, 5.0]).tolist())
    assert tables == [[[0.0, 5.0], [1.0, 5.0]]] * 2
    assert of_all(2, lambda ranks: ranks.texts("höst" * (1 + ranks.world.rank))) == [["höst", "hösthöst"]] * 2
    assert len(of_all(2, lambda ranks: ranks.texts("h" * 100))[0][0]) == 64


def test_evaluations_are_summed_with_the_weights_that_any_of_them_has() -> None:
    given = [LossSum(3.0, 2, 1.5), LossSum(1.0, 0)]
    assert of_all(2, lambda ranks: ranks.evaluation(given[ranks.world.rank])) == [LossSum(4.0, 2, 2.5)] * 2
    plain = [LossSum(3.0, 2), LossSum(1.0, 5)]
    assert of_all(2, lambda ranks: ranks.evaluation(plain[ranks.world.rank])) == [LossSum(4.0, 7)] * 2


@pytest.mark.fault("R03")
def test_ranks_that_differ_are_all_told_in_what_and_who() -> None:
    def ask(ranks: Agreement) -> None:
        odd = ranks.world.rank == 2
        ranks.require_alike({"the seed": "1", "the rows": str(odd), "the software": str(ranks.world.rank)})

    errors = of_all(3, ask)
    assert {error.code for error in errors} == {"QH-R03"}
    assert {error.message for error in errors} == {
        "The ranks are not the same run. They differ from rank 0 in: the rows (rank 2); the software (ranks 1, 2)."
    }
    assert errors[0].context == {"differing": {"the rows": [2], "the software": [1, 2]}}


def test_facts_with_odd_characters_can_be_compared() -> None:
    assert of_all(2, lambda ranks: ranks.require_alike({"a path": "\udcff/\0"})) == [None, None]
