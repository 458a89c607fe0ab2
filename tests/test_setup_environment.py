"""What `make demo` and `make test` install: the tested versions, and a torch that fits the hardware."""

from __future__ import annotations

import importlib.util
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from qlora_hal_backends.probing_torch import _ROCM_WHEEL, _TORCH_INDEX

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_environment", ROOT / "ci" / "setup_environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(text: str) -> dict[str, str]:
    """What is pinned on this Python."""
    rows = (Requirement(line) for line in text.splitlines() if "==" in line)
    here = (row for row in rows if row.marker is None or row.marker.evaluate())
    return {row.name.lower().replace("_", "-"): str(row.specifier).removeprefix("==") for row in here}


def test_every_pin_lies_in_the_range_that_pyproject_gives(setup: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: rows for name, rows in project["optional-dependencies"].items() if name != "auto-gptq"}
    pinned = pins(setup.constraints("cuda"))
    for text in (*project["dependencies"], *(row for rows in extras.values() for row in rows)):
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        # Not itself, nor what only a machine with an NVIDIA GPU, or only another Python, installs.
        if name not in ("qlora-hal", "nvidia-ml-py") and (not requirement.marker or requirement.marker.evaluate()):
            assert pinned[name] in requirement.specifier, text


def test_pins_are_the_environment_that_is_tested_here(setup: ModuleType) -> None:
    for name in ("torch", "transformers", "bitsandbytes", "gptqmodel", "mlx", "mlx-lm", "peft", "triton"):
        assert version(name).split("+")[0] == pins(setup.constraints("cpu"))[name]


def test_amd_gpu_takes_the_torch_that_its_own_index_holds(setup: ModuleType) -> None:
    assert pins(setup.constraints("cpu")).keys() - pins(setup.constraints("rocm")).keys() == {"torch", "triton"}


def test_setup_and_doctor_name_the_same_place_for_an_amd_torch(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "is_reachable", lambda host: True)
    assert setup.torch_index("rocm") == ["--index-url", f"{_TORCH_INDEX}/{_ROCM_WHEEL}"]


@pytest.mark.parametrize("hardware", ["cuda", "rocm", "mlx"])
def test_triton_of_a_gpu_build_is_never_replaced(setup: ModuleType, hardware: str) -> None:
    assert setup.wanted_extras(hardware, tests=True) == [hardware, "dev"]
    assert setup.wanted_extras("cpu", tests=True) == ["cpu", "dev", "triton-interpreter"]
    assert setup.wanted_extras(hardware, tests=False) == [hardware]


def test_tests_name_the_pythons_that_can_have_all_libraries(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.sys, "version_info", (3, 14, 0, "final", 0))
    monkeypatch.setattr(setup.sys, "argv", ["setup_environment.py", "--tests"])
    with pytest.raises(SystemExit, match=r"make test PYTHON=python3\.12"):
        setup.main()
