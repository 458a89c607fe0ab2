"""How the cases of a run are dealt out to its lanes."""

from __future__ import annotations

from collections import Counter

import pytest

from qlora_hal_conformance.catalogue import all_cases
from qlora_hal_conformance.request import BUNDLE, Request
from qlora_hal_conformance.subject import Reference


def shares(lanes: int) -> list[set[str]]:
    return [Request(Reference(), 0, "", lane=lane, lanes=lanes).share(all_cases()) for lane in range(lanes)]


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 64])
def test_every_case_is_in_exactly_one_lane(lanes: int) -> None:
    dealt = Counter(case for share in shares(lanes) for case in share)
    assert dealt.keys() == set(all_cases())
    assert set(dealt.values()) == {1}


@pytest.mark.parametrize("lanes", [2, 3, 4])
def test_lanes_have_as_many_cases_each_but_for_a_bundle(lanes: int) -> None:
    sizes = [len(share) for share in shares(lanes)]
    assert max(sizes) - min(sizes) <= BUNDLE
