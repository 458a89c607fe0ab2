"""The catalogue is complete, and its page is the catalogue."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora_hal
from qlora_hal import errors
from qlora_hal.errors.fault_catalogue import AREAS, EXIT_STATUSES, as_markdown, faults, find_fault

ROOT = Path(qlora_hal.__file__).parent.parent
SOURCES = ("qlora_hal", "backends", "conformance_tests", "oracle")


def codes_in_source() -> dict[str, str]:
    found: dict[str, str] = {}
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for code in re.findall(r"[\"'](QH-[A-Z]\d+)[\"']", file.read_text(encoding="utf-8")):
                found.setdefault(code, str(file.relative_to(ROOT)))
    return found


def test_every_code_raised_in_the_source_has_a_row() -> None:
    absent = {code: place for code, place in codes_in_source().items() if code not in faults()}
    assert absent == {}


def test_rows_are_whole_sentences_with_a_known_exit_status() -> None:
    for fault in faults().values():
        assert re.fullmatch(r"QH-[A-Z]\d\d", fault.code)
        assert fault.area in AREAS
        assert fault.exit_status in EXIT_STATUSES
        assert not fault.title.endswith(".")
        for sentence in (fault.happens, fault.why, fault.do):
            assert sentence.endswith("."), (fault.code, sentence)


def test_every_exit_status_of_the_errors_is_explained() -> None:
    classes = [
        item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, errors.QloraHalError)
    ]
    assert {item.exit_status for item in classes} <= set(EXIT_STATUSES)


def test_the_page_is_generated_from_the_catalogue() -> None:
    assert (ROOT / "docs" / "faults.md").read_text(encoding="utf-8") == as_markdown()


@pytest.mark.parametrize("typed", ["QH-D05", "qh-d05", "D05", " d05 "])
def test_a_code_is_found_as_people_type_it(typed: str) -> None:
    fault = find_fault(typed)
    assert fault is not None
    assert fault.code == "QH-D05"


def test_an_unknown_code_is_not_found() -> None:
    assert find_fault("Z00") is None


def statuses_raised() -> dict[str, set[tuple[int, str]]]:
    """Code -> (exit status of the error class it is raised with, place), for every call of an error class in the
    source. A code that is chosen beforehand (`code = "QH-A01" if ... else "QH-B02"`) counts with all its values."""
    found: dict[str, set[tuple[int, str]]] = {}
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for call, codes in error_calls(tree):
                status = getattr(errors, called_name(call)).exit_status
                for code in codes:
                    found.setdefault(code, set()).add((status, f"{file.relative_to(ROOT)}:{call.lineno}"))
    return found


def error_calls(tree: ast.Module) -> Iterator[tuple[ast.Call, set[str]]]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args):
        kind = getattr(errors, called_name(call), None)
        if not (isinstance(kind, type) and issubclass(kind, errors.QloraHalError)):
            continue
        first = call.args[0]
        if isinstance(first, ast.Name):
            around = [f for f in functions if f.lineno <= call.lineno <= (f.end_lineno or 0)]
            yield call, {code for f in around for code in assigned_codes(f, first.id)}
        else:
            yield call, codes_in(first)


def assigned_codes(function: ast.FunctionDef, name: str) -> set[str]:
    assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
    return {
        code
        for node in assigned
        if any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
        for code in codes_in(node.value)
    }


def codes_in(expression: ast.expr) -> set[str]:
    constants = (node.value for node in ast.walk(expression) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str) and value.startswith("QH-")}


def called_name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def test_every_code_is_raised_with_the_exit_status_of_its_row() -> None:
    raised = statuses_raised()
    assert len(raised) > 100, "the search finds what is raised"
    wrong = {
        code: (faults()[code].exit_status, sorted(other))
        for code, seen in sorted(raised.items())
        if code in faults() and (other := {one for one in seen if one[0] != faults()[code].exit_status})
    }
    assert wrong == {}
