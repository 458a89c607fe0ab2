"""Mutants that nobody thought up: which changes there are, how they are drawn, that the suite is asked."""

from __future__ import annotations

import ast
import json
from itertools import islice
from pathlib import Path

import pytest

from qlora_hal_conformance.mutants.generated.arguments import NOT_YET
from qlora_hal_conformance.mutants.generated.changes import changed, changes_of, makes_equal_code, told
from qlora_hal_conformance.mutants.generated.drawing import drawn, named, not_reached
from qlora_hal_conformance.mutants.generated.identity import Identity
from qlora_hal_conformance.mutants.generated.reached import REACHED_VARIABLE, noting, read_places
from qlora_hal_conformance.mutants.generated.reporting import record_of_score, section_of
from qlora_hal_conformance.mutants.generated.score import Found, Journal, hunt_changes
from qlora_hal_conformance.mutants.generated.sources import MODULES, source_of
from qlora_hal_conformance.mutants.run_mutants import first_failure
from qlora_hal_conformance.mutants.table import put_section

SEED = 20261129
EVERYWHERE = {
    section: frozenset((module, line) for module in MODULES for line in range(1, 1000)) for section in ("30", "31")
}
"""As if every statement were reached in two sections."""

SOURCE = '''"""Words that nobody computes."""

_UNREAD = 3


def half_of_positive(values: list[float]) -> float:
    """The words of a docstring."""
    if not values:
        raise ValueError(f"{len(values)} values")
    return sum(max(value, 0.0) for value in values[1:]) / 2
'''


def operators(source: str) -> set[str]:
    return {change.operator for change in changes_of(ast.parse(source))}


def test_each_kind_of_slip_is_among_the_changes() -> None:
    assert operators(SOURCE) >= {
        "div_to_mult", "operands_swapped", "plus_one", "minus_one", "doubled", "max_to_min",
        "start_left_out", "slice_dropped", "negated", "always", "never", "not_dropped",
        "last_left_out", "statement_dropped",
    }  # fmt: skip


def test_counterpart_of_a_builtin_is_a_builtin() -> None:
    assert "sum_to_mean" in operators("x = y.sum()")
    assert "sum_to_mean" not in operators("x = sum(y)")


@pytest.mark.parametrize(
    "source", ["y = np.maximum(1, x)", "y = x.astype(np.float64)", "y = np.array(x, dtype=np.float64)", "assert x"]
)
def test_what_makes_no_difference_is_not_among_the_changes(source: str) -> None:
    assert not {"arguments_swapped", "conversion_dropped", "dtype_left_out", "statement_dropped"} & operators(source)


def test_narrowing_is_a_change() -> None:
    assert "conversion_dropped" in operators("y = x.astype(np.float32)")
    assert "arguments_swapped" in operators("y = np.append(x, 1)")


def test_words_and_types_are_left_alone() -> None:
    lines = {change.line for change in changes_of(ast.parse(SOURCE))}
    assert lines.isdisjoint({1, 7}), "a docstring"
    assert not [change for change in changes_of(ast.parse(SOURCE)) if change.line == 9 and change.column > 8]
    assert operators("Pair = dict[str, int] | None\n") == set()


@pytest.mark.parametrize("module", MODULES)
def test_no_two_changes_of_a_module_are_told_alike(module: str) -> None:
    places = [change.where for change in changes_of(ast.parse(source_of(module)))]
    assert places
    assert len(places) == len(set(places))


def test_a_change_is_made_in_one_place() -> None:
    where = (10, 55, "div_to_mult")
    assert told(SOURCE, where) == (
        "return sum((max(value, 0.0) for value in values[1:])) / 2",
        "return sum((max(value, 0.0) for value in values[1:])) * 2",
    )
    assert ast.unparse(changed(SOURCE, where)).count("*") == 1
    with pytest.raises(LookupError):
        changed(SOURCE, (10, 55, "add_to_sub"))


def test_change_without_a_difference_is_seen_as_such() -> None:
    """What comes after an endless loop is not compiled."""
    source = "def f():\n    while True:\n        g(2)\n    return 1\n"
    assert makes_equal_code(source, (4, 11, "plus_one"))
    assert not makes_equal_code(source, (3, 10, "plus_one"))


def test_identity_is_stable_and_can_be_read_again() -> None:
    """A line moves with its code; apart from that a change has one name."""
    first = Identity("adamw", *next(changes_of(ast.parse(source_of("adamw")))).where)
    assert Identity.read(str(first)) == first
    assert [str(change.identity) for change in islice(drawn(SEED, EVERYWHERE), 4)] == [
        str(change.identity) for change in islice(drawn(SEED, EVERYWHERE), 4)
    ]


def test_draw_is_spread_over_modules_and_operators() -> None:
    identities = [change.identity for change in islice(drawn(SEED, EVERYWHERE), 25)]
    assert len({(identity.module, identity.operator) for identity in identities}) == len(identities) == 25
    assert len({identity.module for identity in identities}) >= len(MODULES) / 2


def test_what_no_section_reaches_is_not_drawn() -> None:
    reached = {"30": frozenset({("adamw", 56), ("loss", 61)})}
    assert {(c.identity.module, c.identity.line) for c in drawn(SEED, reached)} <= {("adamw", 56), ("loss", 61)}


def test_branch_never_taken_differs_where_it_would_have_run() -> None:
    never = {c.place.statement for c in changes_of(ast.parse(SOURCE)) if c.operator == "never"}
    assert never == {9}


def test_statements_that_no_section_reaches_are_told() -> None:
    all_of_them = not_reached({})["lora"]
    middle = all_of_them[len(all_of_them) // 2]
    told_of = not_reached({"30": frozenset(("lora", n) for n in range(middle))})
    assert told_of["lora"] == [n for n in all_of_them if n >= middle], "those after the ones that are reached"
    assert set(told_of) == set(MODULES)


def test_constant_that_nothing_reached_reads_is_not_drawn() -> None:
    """int8's roundoffs are those of a bound, which no backend computes."""
    line = source_of("int8").splitlines().index("_FLOAT16_ROUNDOFF = 2.0**-11") + 1
    at_the_top = {"20": frozenset(("int8", n) for n in range(line + 3))}
    assert line not in {c.identity.line for c in drawn(SEED, at_the_top) if c.identity.module == "int8"}


def test_honest_copy_notes_what_it_reaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REACHED_VARIABLE, str(tmp_path / "reached"))
    tree = noting(ast.parse(SOURCE), MODULES["loss"])
    names: dict[str, object] = {}
    exec(compile(tree, "loss", "exec"), names)
    half = names["half_of_positive"]
    assert callable(half)
    assert half([5.0, 1.0, -3.0]) == 0.5
    assert {("loss", 8), ("loss", 10)} <= read_places(tmp_path / "reached")
    assert ("loss", 9) not in read_places(tmp_path / "reached")


def test_copy_without_a_change_passes() -> None:
    assert first_failure("qlora_hal_conformance.mutants.generated.specs:honest", ("52",), seed=SEED) is None


def identity_in(module: str, line: str, operator: str) -> Identity:
    """The change by an operator of the one line that begins so."""
    number = next(n for n, text in enumerate(source_of(module).splitlines(), 1) if text.strip().startswith(line))
    changes = changes_of(ast.parse(source_of(module)))
    return Identity(module, *next(c.where for c in changes if (c.line, c.operator) == (number, operator)))


@pytest.mark.parametrize(
    ("module", "line", "operator", "section"),
    [
        ("adamw", "direction =", "div_to_mult", "52"),
        ("storage", "return packed.absmax if nested", "never", "20"),
        ("blocks", "return np.concatenate([turned * cos", "add_to_sub", "51"),
        ("dropout", "return (words >> np.uint32(1)) >= drop_below", "gte_to_lte", "43"),
    ],
)
def test_change_in_the_copy_is_caught(module: str, line: str, operator: str, section: str, tmp_path: Path) -> None:
    """In the copy alone: what judges is not changed with it."""
    change = named(identity_in(module, line, operator), {section: EVERYWHERE["30"]})
    told_of: list[Found] = []
    journal = Journal(tmp_path / "journal", suite_seed=SEED)
    (found,) = hunt_changes([change], journal, suite_seed=SEED, jobs=1, told=told_of.append)
    assert found.caught_by.startswith(section), found
    assert told_of == [found]
    again = hunt_changes(
        [change], Journal(tmp_path / "journal", suite_seed=SEED), suite_seed=SEED, jobs=1, told=told_of.append
    )
    assert again == [found]
    assert told_of == [found], "what is in the journal is not run again"


def test_survivor_is_reported_as_one(tmp_path: Path) -> None:
    """Section 52 judges no generation."""
    change = named(identity_in("trainer", "if token in stop_tokens", "never"), {"52": EVERYWHERE["30"]})
    (found,) = hunt_changes(
        [change], Journal(tmp_path / "journal", suite_seed=SEED), suite_seed=SEED, jobs=1, told=lambda found: None
    )
    assert found.caught_by == ""
    record = record_of_score([found])
    assert (record["mutants"], record["caught"], record["score"]) == (1, 0, 0.0)
    survivors = record["survivors"]
    assert isinstance(survivors, list)
    assert survivors[0]["becomes"] == "if False:"
    assert NOT_YET in section_of({"command": "the command", **record})


def test_journal_of_another_suite_is_begun_anew(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    journal = Journal(file, suite_seed=SEED)
    journal.add_found(Found("a:1:2:b", "", "", "", "", "", 0.0))
    assert list(Journal(file, suite_seed=SEED).found()) == ["a:1:2:b"]
    with open(file, "a") as broken_off:
        broken_off.write('{"mutant": "a:1:')
    assert list(Journal(file, suite_seed=SEED).found()) == ["a:1:2:b"], "half a line is nothing"
    assert Journal(file, suite_seed=SEED + 1).found() == {}
    assert json.loads(file.read_text().splitlines()[0])["suite_seed"] == SEED + 1


def test_sections_of_the_document_stand_beside_each_other(tmp_path: Path) -> None:
    document = tmp_path / "mutants.md"
    document.write_text("# Mutants\n\n| `one` | two |\n")
    put_section(document, "First", "old")
    put_section(document, "Second", "kept")
    put_section(document, "First", "new")
    assert document.read_text() == "# Mutants\n\n| `one` | two |\n\n## First\n\nnew\n\n## Second\n\nkept\n"
