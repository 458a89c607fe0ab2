"""A value is of the type its annotation promises, or is named with what it is instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NewType, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pytest
from typing_extensions import TypeAliasType, TypeVarTuple

from qlora_hal.contract.backend import BackendSpec, DeviceFacts
from qlora_hal.contract.capabilities import Capabilities
from qlora_hal.contract.memory_constants import MemoryConstants
from qlora_hal.contract.type_checks import wrong_fields
from qlora_hal.contract.values import Adapter, AdapterConfig, LossSum, OptimizerSnapshot, StepStats

if TYPE_CHECKING:
    from nowhere import OnlyForACheckerOfTypes  # type: ignore[import-not-found]


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
        ({"share": np.float32(1)}, f"share is a float32 ({np.float32(1)!r}), float is expected"),
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


A, B = TypeVar("A"), TypeVar("B")
Several = TypeVarTuple("Several")
Scalar = TypeVar("Scalar", bound=np.generic)
# What NumPy 2.5 makes of it where the language has `type X = ...` (Python 3.12), on every Python and NumPy.
AliasedArray = TypeAliasType("AliasedArray", np.ndarray[tuple[Any, ...], np.dtype[Scalar]], type_params=(Scalar,))
Turned = TypeAliasType("Turned", Mapping[B, A], type_params=(A, B))
AnyNumberOf = TypeAliasType("AnyNumberOf", tuple[*Several], type_params=(Several,))
Step = NewType("Step", int)


class Closes(Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True)
class Named:
    """Annotations that give a type by another name."""

    array: npt.NDArray[np.float32]
    arrays: Mapping[str, npt.NDArray[np.generic]]
    aliased: AliasedArray[np.float32]
    all_aliased: Mapping[str, AliasedArray[np.generic]] | None
    turned: Turned[int, str]
    step: Step
    annotated: Annotated[int, "in steps"]
    final: Final[tuple[int, str]]
    choice: Literal["a", "b"]
    kind: type[int]
    items: list[int]


def named(**changes: Any) -> Named:
    ones = np.ones(2, np.float32)
    fitting = Named(ones, {"a": ones}, ones, {"a": ones}, {"a": 1}, Step(1), 1, (1, "a"), "a", bool, [1])
    return replace(fitting, **changes)


def test_a_type_behind_a_name_is_the_type() -> None:
    assert wrong_fields(named()) == []
    assert wrong_fields(named(all_aliased=None, arrays={}, turned={}, items=[])) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"array": [1.0]},
        {"arrays": {"a": [1.0]}},
        {"aliased": [1.0]},
        {"all_aliased": {"a": [1.0]}},
        {"all_aliased": {1: np.ones(2)}},
        {"turned": {1: "a"}},
        {"step": "1"},
        {"annotated": "1"},
        {"final": (1, 2)},
        {"final": (1,)},
        {"choice": "c"},
        {"kind": 3},
        {"items": [1, "2"]},
    ],
    ids=str,
)
def test_a_value_that_is_not_of_the_type_behind_a_name_is_wrong(changes: dict[str, Any]) -> None:
    (said,) = wrong_fields(named(**changes))
    assert said.startswith(f"{next(iter(changes))} is a ")


@dataclass(frozen=True)
class Unasked:
    """What Python cannot be asked about."""

    anything: Any
    either: A  # type: ignore[valid-type]
    closes: Closes
    several: AnyNumberOf[int, str]
    plain: tuple  # type: ignore[type-arg]


def test_an_annotation_that_says_nothing_at_run_time_refuses_nothing() -> None:
    assert wrong_fields(Unasked(1, 2, 3, (1, "a"), (1, None))) == []  # type: ignore[arg-type]


@dataclass(frozen=True)
class OfAPlugin(Inner):
    own: OnlyForACheckerOfTypes | None = None


def test_a_subclass_with_names_for_a_type_checker_keeps_the_promises_of_its_base() -> None:
    assert wrong_fields(OfAPlugin(3)) == []
    assert wrong_fields(OfAPlugin("3")) == ["size is a str ('3'), int is expected"]  # type: ignore[arg-type]


class Alien:
    """Of no type that any record promises."""


# All that the core judges with this: what a backend says of itself and hands back.
JUDGED = [BackendSpec, Capabilities, MemoryConstants, DeviceFacts, StepStats, LossSum, Adapter, AdapterConfig]
JUDGED += [OptimizerSnapshot]


@pytest.mark.parametrize("record", JUDGED, ids=lambda record: record.__name__)
def test_every_field_that_crosses_between_core_and_backend_is_judged(record: type) -> None:
    """With whatever NumPy is installed: a release that writes its types in another way may not end a run, nor end the
    checks."""
    made = object.__new__(record)
    for field in fields(record):
        object.__setattr__(made, field.name, Alien())
    assert [phrase.split(" ")[0] for phrase in wrong_fields(made)] == [field.name for field in fields(record)]
