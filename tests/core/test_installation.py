"""Advice to install an extra names what was really installed: a checkout, a repository, or the package of an index."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from installed_plugins import describe

from qlora_hal.errors.installation import _packages, _requirement, install_line, is_from_index, pip, requirement

HAS_PIP = Path(sysconfig.get_path("purelib"), "pip").is_dir()
"""Asked of the folder: who asks the import system for pip gets the standard library's distutils from then on."""
HERE = {"url": "file:///home/me/my%20work/qlora", "dir_info": {"editable": True}}
BRANCH = {
    "url": "https://git.example/q.git",
    "vcs_info": {"vcs": "git", "requested_revision": "main", "commit_id": "ab12"},
}
WHEEL = {"url": "https://example.org/qlora_hal-0.1.0-py3-none-any.whl", "archive_info": {}}


@pytest.mark.parametrize(
    ("origin", "installed"),
    [
        (None, "'qlora-hal[cuda]'"),
        ("{broken", "'qlora-hal[cuda]'"),
        ("[]", "'qlora-hal[cuda]'"),
        (json.dumps(HERE), "-e '/home/me/my work/qlora[cuda]'"),
        (json.dumps({**HERE, "dir_info": {}}), "'/home/me/my work/qlora[cuda]'"),
        (json.dumps(BRANCH), "'qlora-hal[cuda] @ git+https://git.example/q.git@ab12'"),
        (json.dumps(WHEEL), "'qlora-hal[cuda] @ https://example.org/qlora_hal-0.1.0-py3-none-any.whl'"),
    ],
)
def test_an_extra_is_asked_of_the_place_it_was_installed_from(origin: str | None, installed: str) -> None:
    assert _requirement("[cuda]", origin) == installed


def test_where_the_place_is_gone_an_extra_is_asked_for_by_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an image, whose stage that had the sources is not kept."""
    sources, packages = tmp_path / "src", tmp_path / "packages"
    sources.mkdir()
    requires = """Metadata-Version: 2.4
Name: qlora-hal
Version: 1
Provides-Extra: family
Provides-Extra: gptq
Requires-Dist: numpy>=1
Requires-Dist: torch>=2.8; extra == 'family'
Requires-Dist: far-away; (sys_platform == 'plan9') and extra == 'gptq'
Requires-Dist: gptqmodel[x]<8,>=7.6; extra == 'gptq'
Requires-Dist: qlora-hal[family]; extra == 'gptq'
"""
    describe(packages, "qlora_hal", {})
    folder = next(packages.glob("qlora_hal-*.dist-info"))
    (folder / "METADATA").write_text(requires)
    (folder / "direct_url.json").write_text(json.dumps({"url": sources.as_uri(), "dir_info": {}}))
    asked = "from qlora_hal.errors.installation import requirement; print(requirement('gptq'))"
    root = Path(__file__).resolve().parents[2]

    def told() -> str:
        path = os.pathsep.join((str(packages), str(root)))
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(
            [sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert told() == f"'{sources}[gptq]'"
    sources.rmdir()
    packages_asked = ['far-away; sys_platform == "plan9"', "gptqmodel[x]<8,>=7.6", "torch>=2.8"]
    assert shlex.split(told()) == packages_asked


def test_every_extra_of_this_distribution_stands_for_packages() -> None:
    """Of the metadata that this distribution really has."""
    assert any(package.startswith("gptqmodel") for package in _packages(["gptq"]))
    assert any(package.startswith("torch>=") for package in _packages(["gptq"]))  # of the extra that gptq includes
    assert all("mlx" in package for package in _packages(["mlx"]))


def test_several_extras_are_one_requirement() -> None:
    assert "[data,gptq]" in requirement("data", "gptq")


def test_what_no_installer_took_from_an_index_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("indexed", "written_here", "from-a-folder"):
        describe(tmp_path, name, {})
    for name in ("indexed", "from_a_folder"):
        (tmp_path / f"{name}-1.0.dist-info" / "INSTALLER").write_text("pip\n")
    (tmp_path / "from_a_folder-1.0.dist-info" / "direct_url.json").write_text(json.dumps(HERE))
    monkeypatch.syspath_prepend(tmp_path)
    assert is_from_index("indexed")
    assert not is_from_index("written_here")
    assert not is_from_index("from-a-folder")
    assert not is_from_index("no such distribution")


@pytest.mark.skipif(not HAS_PIP, reason="an environment without pip")
def test_a_command_of_pip_works_in_this_environment_whatever_the_shell_would_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Carried out in a shell: with this environment first on PATH, and with a foreign pip there."""
    here = str(Path(sysconfig.get_path("scripts")))
    (tmp_path / "pip").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "pip").chmod(0o755)
    for path, line in ((here, "pip --version"), (str(tmp_path), f"{sys.executable} -m pip --version")):
        monkeypatch.setenv("PATH", path + os.pathsep + os.environ["PATH"])
        assert pip("--version") == line
        subprocess.run(pip("--version"), shell=True, capture_output=True, check=True)


def test_an_environment_without_pip_is_told_to_use_uv(tmp_path: Path) -> None:
    venv.create(tmp_path)
    asked = "from qlora_hal.errors.installation import install_line; print(install_line('cpu'))"
    root = str(Path(__file__).resolve().parents[2])
    bare_python = tmp_path / "bin" / "python"
    said = subprocess.run(
        [bare_python, "-c", asked], env={"PYTHONPATH": root}, capture_output=True, text=True, check=True
    ).stdout
    assert said == f"uv pip install 'qlora-hal[cpu]' --python {bare_python}\n"


def test_one_line_adds_extras_to_this_installation() -> None:
    assert install_line("data", "gptq") == pip(f"install {requirement('data', 'gptq')}")
