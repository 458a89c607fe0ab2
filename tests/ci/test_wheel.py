"""The wheel as a package index gets it: typed, described, and with links that lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # building takes seconds

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = re.compile(r"https://github\.com/[^/\s\"]+/[^/\s\"]+")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def test_every_package_of_the_wheel_is_marked_as_typed(wheel: zipfile.ZipFile) -> None:
    packages = {
        name.partition("/")[0] for name in wheel.namelist() if not name.partition("/")[0].endswith(".dist-info")
    }
    suite = {"qlora_hal_conformance", "qlora_hal_conformance_runs", "qlora_hal_oracle"}
    assert packages == {"qlora_hal", "qlora_hal_backends", *suite}
    assert {f"{package}/py.typed" for package in packages} <= set(wheel.namelist())


def test_a_package_index_is_told_what_it_shows(metadata: Message) -> None:
    for header in (
        "Summary",
        "Author",
        "License-Expression",
        "Keywords",
        "Requires-Python",
        "Project-URL",
        "Classifier",
    ):
        assert metadata[header], header


def test_each_link_of_the_description_leads_to_a_file_of_the_repository(metadata: Message) -> None:
    description = metadata.get_payload(decode=True).decode()  # type: ignore[union-attr]
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", description)
    addresses = [address for pair in links for address in pair if address and not address.startswith("#")]
    assert addresses
    for address in addresses:
        assert address.startswith("https://"), address
        if inside := re.fullmatch(rf"{REPOSITORY.pattern}/(?:blob|raw)/main/([^#]+)(#.*)?", address):
            assert (ROOT / inside[1]).exists(), address


def test_every_address_in_the_metadata_names_one_repository() -> None:
    assert len(set(REPOSITORY.findall((ROOT / "pyproject.toml").read_text()))) == 1
