"""The list of cases, and the rules that the sections keep."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from qlora_hal_conformance import SUITE_VERSION
from qlora_hal_conformance.catalogue import (
    EARLIER_REVISIONS,
    LEVELS,
    SECTIONS_FOLDER,
    all_cases,
    level_of,
    revision_of,
    suite_hash,
)
from qlora_hal_conformance.collecting import collected_cases

SECTION_FILES = sorted(SECTIONS_FOLDER.glob("test_*.py"))
# Inputs of cases: rates, shares and sizes that a case feeds in. Everything that judges an output is in tolerances.py.
INPUTS = {
    "COUNTED_SHARE",
    "STEPS",
    "WARMUP",
    "RATE",
    "TINY_RATE",
    "PEAK_RATE",
    "LARGE",
    "DROP",
    "LOW_DROP",
    "GIVEN_DENOMINATOR",
    "VALUES",
    "LOUD",
    "SETTINGS",
    "RATES",
    "TINY_STEPS",
}
INPUT_KEYWORDS = {
    "learning_rate",
    "weight_decay",
    "denominator",
    "dropout",
    "max_grad_norm",
    "beta1",
    "beta2",
    "epsilon",
}
INPUT_CALLS = {"step", "train_step", "StepSettings", "UpdateSettings", "TrainingState", "Continuation", "random"}


def test_file_lists_exactly_the_cases_of_the_sections() -> None:
    assert list(all_cases()) == collected_cases()


def test_every_case_has_a_level_and_a_name_of_its_own() -> None:
    assert [case for case, number in Counter(all_cases()).items() if number > 1] == []
    assert [case for case in all_cases() if not level_of(case)] == []
    assert {level_of(case) for case in all_cases()} == set(LEVELS)


def test_hash_is_that_of_the_sources() -> None:
    assert len(suite_hash()) == 64
    assert suite_hash() == suite_hash.__wrapped__()


def test_earlier_revisions_keep_their_lists() -> None:
    assert revision_of(suite_hash()) == SUITE_VERSION
    assert revision_of("0" * 64) == ""
    for revision, sha256 in EARLIER_REVISIONS:
        assert revision_of(sha256) == revision != SUITE_VERSION
        assert all_cases(revision)


@pytest.mark.parametrize("file", SECTION_FILES, ids=lambda path: path.stem)
def test_section_holds_no_tolerance(file) -> None:  # type: ignore[no-untyped-def]
    """A float in a section is an input: under one of the names above, or handed to a step."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    allowed: set[ast.AST] = set()
    for node in ast.walk(tree):
        is_input = (
            (isinstance(node, ast.Assign) and _names(node.targets) <= INPUTS)
            or (isinstance(node, ast.keyword) and node.arg in INPUT_KEYWORDS)
            or (isinstance(node, ast.Call) and _called(node.func) in INPUT_CALLS)
        )
        if is_input:
            allowed |= set(ast.walk(node))
    floats = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is float and n not in allowed]
    # 0, 1, 2 and their halves are arithmetic ("1 - p", "twice"), not tolerances.
    assert [f"line {n.lineno}: {n.value}" for n in floats if n.value not in (0.0, 0.5, 1.0, 2.0)] == []


@pytest.mark.parametrize("file", SECTION_FILES, ids=lambda path: path.stem)
def test_section_names_no_backend_and_skips_nothing(file) -> None:  # type: ignore[no-untyped-def]
    text = file.read_text(encoding="utf-8")
    for word in ("cpu_torch", "cuda_bnb", "mlx_lora", "pytest.skip", "xfail", "importorskip"):
        assert word not in text


def _names(targets: list[ast.expr]) -> set[str]:
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
