"""A value is of the type its annotation promises, or is named with what it is instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from qlora_hal.typed_fields import wrong_fields


@dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclass(frozen=True)
class Record:
    name: str = "a"
    count: int = 1
    share: float = 0.5
    done: bool = True
    sizes: tuple[int, ...] = (1, 2)
    kinds: frozenset[str] = frozenset({"x"})
    table: Mapping[str, tuple[int, ...]] | None = None
    ask: Callable[[], int] = int
    inner: Inner = Inner()


def test_every_kind_of_field_fits_as_it_is_annotated() -> None:
    assert wrong_fields(Record()) == []
    assert wrong_fields(Record(share=3, table={"a": (1,)}, ask=lambda: 2)) == []
    assert wrong_fields(Record(share=float("nan"))) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": None}, "name is a NoneType (None), str is expected"),
        ({"count": True}, "count is a bool (True), int is expected"),
        ({"count": 1.0}, "count is a float (1.0), int is expected"),
        ({"share": np.float32(1)}, "share is a float32 (np.float32(1.0)), float is expected"),
        ({"done": 1}, "done is a int (1), bool is expected"),
        ({"sizes": [1, 2]}, "sizes is a list ([1, 2]), tuple[int, ...] is expected"),
        ({"sizes": (1, "2")}, "sizes is a tuple ((1, '2')), tuple[int, ...] is expected"),
        ({"kinds": ["x"]}, "kinds is a list (['x']), frozenset[str] is expected"),
        ({"table": {"a": [1]}}, "table is a dict ({'a': [1]}), Mapping[str, tuple[int, ...]] | None is expected"),
        ({"ask": 3}, "ask is a int (3), Callable[[], int] is expected"),
        ({"inner": None}, "inner is a NoneType (None), Inner is expected"),
        ({"inner": Inner("2")}, "inner.size is a str ('2'), int is expected"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_field_is_named_with_what_it_is(changes: dict[str, Any], said: str) -> None:
    assert wrong_fields(replace(Record(), **changes)) == [said]
