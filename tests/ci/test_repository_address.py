"""The address of the public repository: one wherever it stands, and named by one command."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = r"github\.com/([A-Za-z0-9-]+)/qlora-hal"
COMMAND = "ci/name_repository.sh"


def found(folder: Path, *options: str) -> list[str]:
    """What git finds of the address in the text files of a folder that it does not ignore."""
    command = ["git", "grep", "--untracked", "-I", *options, "-E", ADDRESS]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.splitlines()


def owners(folder: Path) -> set[str]:
    return {owner for line in found(folder, "-ho") for owner in re.findall(ADDRESS, line)}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that name the address, and the command, in a repository of their own."""
    for name in (COMMAND, *found(ROOT, "-l")):
        copied = tmp_path / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copied)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "--all"], cwd=tmp_path, check=True)
    return tmp_path


def test_every_file_names_the_same_address() -> None:
    assert len(owners(ROOT)) == 1


def test_what_is_typed_to_install_names_the_address() -> None:
    pages = [ROOT / "README.md", ROOT / "docs" / "certify_your_machine.md", ROOT / "docs" / "mlx.md"]
    pages += [*(ROOT / "docs" / "notebooks").glob("*.py")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "git+ADDRESS" not in text
        assert re.findall(r"pip install [\"']qlora-hal\[[\w,-]+\][\"']", text) == [], page.name
        assert re.search(ADDRESS, text), page.name


def test_one_command_names_who_holds_the_repository(copy: Path) -> None:
    subprocess.run([copy / COMMAND, "some-one"], check=True)
    assert owners(copy) == {"some-one"}
    assert owners(copy / "ci") == set()  # the command itself names nobody
    subprocess.run([copy / COMMAND, "some-one"], check=True)  # nothing is left to replace


@pytest.mark.parametrize("name", ["", "a/b", "-x", "a#b", "a b"])
def test_what_is_no_name_changes_nothing(copy: Path, name: str) -> None:
    before = owners(copy)
    refused = subprocess.run([copy / COMMAND, name], check=False, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "usage" in refused.stderr
    assert owners(copy) == before
