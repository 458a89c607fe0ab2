"""Plugins that misbehave become reports; the others go on. Real distributions, made and put on the path here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

GOOD = """
from qlora_hal.backend import Availability, BackendSpec, ProbeReport
from qlora_hal.capabilities import Capabilities, WeightFormat
CAPABILITIES = Capabilities(frozenset({WeightFormat.NONE}), frozenset({"float32"}), frozenset())
def probe():
    return ProbeReport("NAME", Availability.READY, "always")
SPEC = BackendSpec("NAME", "a plugin", 5, CAPABILITIES, probe, "nowhere:Nothing")
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


def probed(folder: Path) -> dict[str, tuple[str, str, str]]:
    """What `backends()` says in a fresh process with the folder on its path."""
    program = (
        "from qlora_hal import backends\n"
        "for r in backends(): print(r.backend, r.availability.value, r.reason, r.fix, sep='|')"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    rows = [line.split("|") for line in child.stdout.splitlines()]
    return {name: (availability, reason, fix) for name, availability, reason, fix in rows}


@pytest.mark.fault("E08")
def test_broken_plugins_are_named_and_the_others_work(tmp_path: Path) -> None:
    install(
        tmp_path,
        {
            "works": ("good", GOOD),
            "raises": ("raising", "raise ValueError('no such flag')"),
            "leaves": ("leaving", "raise SystemExit(3)"),
            "crashes": ("crashing", "import os\nos.abort()"),
            "chats": ("chatting", "print('hello')\n" + GOOD),
            "wrong": ("wrongtype", "SPEC = 7"),
        },
    )
    found = probed(tmp_path)
    assert found["good"][0] == "ready"
    assert found["chatting"][0] == "ready"
    assert found["cpu_torch"][0] == "ready"
    for name, reason in {
        "raising": "no such flag",
        "leaving": "SystemExit: 3",
        "crashing": "signal 6",
        "wrongtype": "is a int, not a BackendSpec",
    }.items():
        availability, said, fix = found[name]
        assert availability == "broken"
        assert reason in said
        assert fix.startswith("Update or uninstall it: pip install -U ")


@pytest.mark.fault("E07")
def test_two_distributions_with_one_name_are_both_named(tmp_path: Path) -> None:
    install(tmp_path, {"first-plugin": ("same", GOOD), "second-plugin": ("same", GOOD)})
    availability, reason, _ = probed(tmp_path)["same"]
    assert availability == "broken"
    assert "first-plugin" in reason
    assert "second-plugin" in reason


@pytest.mark.fault("E07")
def test_built_in_name_cannot_be_taken_over(tmp_path: Path) -> None:
    install(tmp_path, {"impostor": ("cpu_torch", GOOD)})
    availability, reason, _ = probed(tmp_path)["cpu_torch"]
    assert availability == "broken"
    assert "impostor" in reason


def test_plugin_of_another_contract_is_refused_in_one_sentence(tmp_path: Path) -> None:
    install(tmp_path, {"future": ("later", GOOD.replace('"nowhere:Nothing")', '"nowhere:Nothing", contract=2)'))})
    assert "written for contract 2; this is contract 1" in probed(tmp_path)["later"][1]
