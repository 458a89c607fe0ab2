"""What keeps the core readable, counted: few entries at its top, no import circle, imports where a reader looks."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "qlora_hal"
ROOMS, LOOSE_MODULES = 21, 5
MAY_BE_IMPORTED_INSIDE = frozenset(
    {
        # Slow to import, or of an extra that may not be installed.
        "IPython", "datasets", "mlx", "mlx_lm", "pyarrow", "pynvml", "rich", "torch", "transformers",
        "mlflow", "pandas", "tensorboard", "trackio", "wandb",
        # Not on every system.
        "fcntl", "resource",
    }
)  # fmt: skip
START_OF_A_COMMAND = ("qlora_hal", "qlora_hal.api", "qlora_hal.cli")
"""They import what a call needs when it is called: `--help` must not wait for the loop."""


def modules(root: Path) -> Mapping[str, Path]:
    """Name -> file of every module of a package."""
    files = sorted(root.rglob("*.py"))
    names = (".".join(file.relative_to(root.parent).with_suffix("").parts) for file in files)
    return dict(zip((name.removesuffix(".__init__") for name in names), files, strict=True))


MODULES = modules(CORE)


def imports(module: str, file: Path, known: Mapping[str, Path]) -> Iterator[tuple[str, bool]]:
    """(module that is imported, whether inside a function or class), those for type checkers alone left out."""
    tree = ast.parse(file.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    hidden = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in typing_only:
            for name in _imported(node, module, known):
                yield name, node in hidden


def _imported(node: ast.Import | ast.ImportFrom, module: str, known: Mapping[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    above = module.split(".") if known[module].name == "__init__.py" else module.split(".")[:-1]
    start = ".".join(above[: len(above) - node.level + 1]) if node.level else ""
    base = ".".join(filter(None, (start, node.module)))
    return [name if (name := f"{base}.{alias.name}") in known else base for alias in node.names]


def circle(known: Mapping[str, Path]) -> list[str]:
    """The modules of one import circle, wherever its imports stand; empty where there is none."""
    graph = {name: {found for found, _ in imports(name, file, known)} - {name} for name, file in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_top_of_the_core_is_rooms_and_hardly_a_loose_module() -> None:
    rooms = [entry for entry in CORE.iterdir() if entry.is_dir() and entry.name != "__pycache__"]
    assert len(rooms) <= ROOMS
    assert len(list(CORE.glob("*.py"))) <= LOOSE_MODULES


def test_core_has_no_import_circle_even_inside_functions() -> None:
    assert circle(MODULES) == []


@pytest.mark.parametrize(
    "package",
    [
        "backends/qlora_hal_backends",
        "conformance_tests/qlora_hal_conformance",
        "conformance_tests/qlora_hal_conformance_runs",
        "oracle/qlora_hal_oracle",
    ],
)
def test_packages_beside_the_core_have_none_either(package: str) -> None:
    assert circle(modules(ROOT / package)) == []


def test_circle_is_found(tmp_path: Path) -> None:
    """Through a function, through a package, and through a relative import."""
    package = tmp_path / "p"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "room" / "__init__.py").write_text("")
    (package / "a.py").write_text("from p.room import b\n")
    (package / "room" / "b.py").write_text("def late():\n    from .. import a\n    return a\n")
    assert set(circle(modules(package))) == {"p.a", "p.room.b"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_stand_at_the_top_below_the_calls_and_commands(module: str) -> None:
    if module in START_OF_A_COMMAND or module.startswith("qlora_hal.cli."):
        return
    inside = {name for name, hidden in imports(module, MODULES[module], MODULES) if hidden}
    assert {name.split(".")[0] for name in inside} <= MAY_BE_IMPORTED_INSIDE


def test_every_exception_is_still_used() -> None:
    used = {
        name.split(".")[0]
        for module, file in MODULES.items()
        for name, hidden in imports(module, file, MODULES)
        if hidden
    }
    assert MAY_BE_IMPORTED_INSIDE - used <= {"torch", "mlx", "mlx_lm"}
    assert MAY_BE_IMPORTED_INSIDE.isdisjoint(sys.stdlib_module_names - {"fcntl", "resource"})
