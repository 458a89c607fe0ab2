"""Distributions with a backend or a weight format each, as wheels lie in site-packages. Tests only."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path

GOOD = """
from qlora_hal.contract.backend import Availability, BackendSpec, ProbeReport
from qlora_hal.contract.capabilities import Capabilities, WeightFormat
CAPABILITIES = Capabilities(frozenset({WeightFormat.NONE}), frozenset({"float32"}), frozenset())
def probe():
    return ProbeReport("NAME", Availability.READY, "always")
SPEC = BackendSpec("NAME", "a plugin", 5, CAPABILITIES, probe, "nowhere:Nothing", 2)
"""


def install(
    folder: Path,
    plugins: Mapping[str, tuple[str, str]],
    *,
    group: str = "qlora_hal.backends",
    attribute: str = "SPEC",
) -> None:
    """Distribution -> (name of its backend or format, source of its module), as a wheel would lie in site-packages."""
    for distribution, (name, source) in plugins.items():
        module = distribution.replace("-", "_")
        (folder / f"{module}.py").write_text(source.replace("NAME", name))
        describe(folder, distribution, {group: {name: f"{module}:{attribute}"}})


def describe(folder: Path, distribution: str, entry_points: Mapping[str, Mapping[str, str]]) -> None:
    """The metadata of a distribution: entry points by group and name."""
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines: list[str] = []
    for group, named in entry_points.items():
        lines += [f"[{group}]", *(f"{name} = {place}" for name, place in named.items())]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]))


def install_example(folder: Path, name: str) -> None:
    """A distribution of `examples/` that is single modules, with the entry points of its pyproject.toml."""
    source = Path(__file__).resolve().parent.parent / "examples" / name
    for module in source.glob("*.py"):
        shutil.copy(module, folder)
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    describe(folder, project["name"], project["entry-points"])
