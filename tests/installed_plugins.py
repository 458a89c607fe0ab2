"""Distributions with a backend each, as wheels lie in site-packages. Tests only."""

from __future__ import annotations

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


def install(folder: Path, plugins: Mapping[str, tuple[str, str]]) -> None:
    """Distribution -> (backend name, source of its module), as a wheel would lie in site-packages."""
    for distribution, (name, source) in plugins.items():
        module = distribution.replace("-", "_")
        (folder / f"{module}.py").write_text(source.replace("NAME", name))
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[qlora_hal.backends]\n{name} = {module}:SPEC\n")
