"""How this distribution was installed, so that advice to install works here: from a checkout or a repository, where the
bare name is right only for what came from a package index, and in an environment that uv made, which has no pip."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

DISTRIBUTION = "qlora-hal"
_OF_AN_EXTRA = re.compile(r"(?P<package>[^;]+); (?:\((?P<marker>.+)\) and )?extra == '(?P<extra>[^']+)'")
"""A requirement as hatchling writes it into the metadata."""


def requirement(*extras: str) -> str:
    """What follows `pip install` to add `extras` to this installation, quoted for a shell. PEP 610 tells its origin;
    where that was a folder or a file of this machine and is gone, as in an image, it is what the extras stand for."""
    origin = _recorded(DISTRIBUTION, "direct_url.json")
    if extras and _is_gone(_address(origin)):
        return " ".join(shlex.quote(package) for package in _packages(extras))
    return _requirement(f"[{','.join(extras)}]" if extras else "", origin)


def install_line(*extras: str) -> str:
    """The command line that adds `extras` to this installation."""
    return pip(f"install {requirement(*extras)}")


def pip(arguments: str) -> str:
    """A command line that has pip's `arguments` carried out in this environment, whichever `pip` a shell would find."""
    if _recorded("pip", "METADATA") is None:  # to look for the module would have setuptools withdraw its distutils
        return f"uv pip {arguments} --python {shlex.quote(sys.executable)}"
    found = shutil.which("pip")
    if found and Path(found).parent == Path(sysconfig.get_path("scripts")):
        return f"pip {arguments}"
    return f"{shlex.quote(sys.executable)} -m pip {arguments}"


def is_from_index(name: str) -> bool:
    """Whether a distribution came from a package index. What lies on the path without an installer's mark, or came from
    a folder or a file of this machine, is most likely being written here (PEP 376 and 610)."""
    return bool(_recorded(name, "INSTALLER")) and _recorded(name, "direct_url.json") is None


def _address(origin: str | None) -> str:
    try:
        return str(json.loads(origin or "{}").get("url", ""))
    except (ValueError, AttributeError):
        return ""


def _is_gone(url: str) -> bool:
    return url.startswith("file:") and not Path(unquote(urlparse(url).path)).exists()


def _packages(extras: Sequence[str]) -> Sequence[str]:
    """What `extras` add to this distribution, those that they include among it; pip judges markers of the machine."""
    found: dict[str, None] = {}
    for line in distribution(DISTRIBUTION).requires or ():
        added = _OF_AN_EXTRA.fullmatch(line)
        if added is None or added["extra"] not in extras:
            continue
        if included := re.fullmatch(rf"{DISTRIBUTION}\[(.+)\]", added["package"]):
            found |= dict.fromkeys(_packages(included[1].split(",")))
        else:
            marker = f"; {added['marker']}".replace("'", '"') if added["marker"] else ""
            found[f"{added['package']}{marker}"] = None
    return list(found)


def _requirement(extras: str, origin: str | None) -> str:
    url = _address(origin)
    if not url:
        return shlex.quote(f"{DISTRIBUTION}{extras}")
    recorded = json.loads(origin or "{}")
    if url.startswith("file:") and "dir_info" in recorded:
        folder = shlex.quote(unquote(urlparse(url).path) + extras)
        return f"-e {folder}" if recorded["dir_info"].get("editable") else folder
    if isinstance(vcs := recorded.get("vcs_info"), dict):
        return shlex.quote(f"{DISTRIBUTION}{extras} @ {vcs.get('vcs')}+{url}@{vcs.get('commit_id')}")
    return shlex.quote(f"{DISTRIBUTION}{extras} @ {url}")


@cache
def _recorded(name: str, file: str) -> str | None:
    try:
        return distribution(name).read_text(file)
    except PackageNotFoundError:
        return None
