"""The core is light: what importing it costs, and what it must never import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TENSOR_LIBRARIES = {"torch", "mlx", "mlx_lm", "transformers", "peft", "bitsandbytes", "accelerate", "gptqmodel"}
BACKEND_NAMES = ("cuda_bnb", "rocm_bnb", "mps_bnb", "cpu_torch", "gptq_int4", "mlx_lora")


@pytest.mark.parametrize(
    "statement",
    [
        "import qlora_hal",
        "from qlora_hal import train, resume, backends, RunConfig",
        "import qlora_hal.run.session, qlora_hal.data, qlora_hal.checkpoint, qlora_hal.adapter.peft_files",
        "from qlora_hal import backends; backends()",
        "from qlora_hal.cli.__main__ import main; main(['backends'])",
    ],
)
def test_no_tensor_library_is_imported(statement: str) -> None:
    program = f"{statement}\nimport sys\nprint(sorted({TENSOR_LIBRARIES!r} & set(sys.modules)))"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert child.stdout.splitlines()[-1] == "[]"


def _core_files() -> list[Path]:
    return sorted((ROOT / "qlora_hal").rglob("*.py"))


@pytest.mark.parametrize("file", _core_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_core_imports_tensor_libraries_at_most_inside_functions(file: Path) -> None:
    """Only at module level is forbidden: reading a slow tokenizer through transformers happens inside a function."""
    top_level = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        name.split(".")[0]
        for node in top_level
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert not names & TENSOR_LIBRARIES


@pytest.mark.parametrize("file", _core_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_core_knows_no_backend_by_name(file: Path) -> None:
    """Names may stand in texts for people (docstrings, messages, help), never where the code decides."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Compare):
            constants = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant)]
            assert not any(name == constant for name in BACKEND_NAMES for constant in constants)
    imported = [node.module or "" for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    assert not any(module.startswith("qlora_hal_backends") for module in imported)


@pytest.mark.parametrize("file", sorted((ROOT / "oracle").rglob("*.py")), ids=lambda file: file.name)
def test_oracle_stands_below_the_product_that_it_judges(file: Path) -> None:
    """NumPy, the standard library and itself; the small models also name formats as the contract does, and find their
    codecs in the catalogue."""
    allowed = {"numpy", "qlora_hal_oracle", *sys.stdlib_module_names}
    if file.name == "random_models.py":
        allowed |= {"qlora_hal.contract", "qlora_hal.formats"}
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] in allowed or ".".join(name.split(".")[:2]) in allowed, name
