"""Where this distribution was installed from, so that advice to add an extra works from a checkout or a repository too:
the bare name is right only where it came from a package index."""

from __future__ import annotations

import json
import shlex
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import unquote, urlparse

DISTRIBUTION = "qlora-hal"


def requirement(*extras: str) -> str:
    """What follows `pip install` to add `extras` to this installation, quoted for a shell. PEP 610 tells its origin."""
    return _requirement(f"[{','.join(extras)}]" if extras else "", _direct_url(DISTRIBUTION))


def is_from_folder(name: str) -> bool:
    """Whether a distribution was installed from a folder of this machine: most likely one that is being written."""
    return '"dir_info"' in (_direct_url(name) or "")


def _requirement(extras: str, origin: str | None) -> str:
    try:
        recorded = json.loads(origin or "{}")
        url = str(recorded.get("url", ""))
    except (ValueError, AttributeError):
        return shlex.quote(f"{DISTRIBUTION}{extras}")
    if url.startswith("file:") and "dir_info" in recorded:
        folder = shlex.quote(unquote(urlparse(url).path) + extras)
        return f"-e {folder}" if recorded["dir_info"].get("editable") else folder
    if isinstance(vcs := recorded.get("vcs_info"), dict):
        return shlex.quote(f"{DISTRIBUTION}{extras} @ {vcs.get('vcs')}+{url}@{vcs.get('commit_id')}")
    return shlex.quote(f"{DISTRIBUTION}{extras} @ {url}" if url else f"{DISTRIBUTION}{extras}")


@cache
def _direct_url(name: str) -> str | None:
    try:
        return distribution(name).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
