"""Where things lie on this machine is nobody else's business: such paths are shortened in what the suite writes."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

import qlora_hal
from qlora_hal_conformance.verdicts import CaseResult


def shortened(value: object) -> object:
    """The value with the places of this machine out of all its texts: a distribution that is installed from a folder
    becomes its name, the environment, the home folder and temporary folders what they are."""
    if isinstance(value, Mapping):
        return {shortened(key): shortened(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [shortened(item) for item in value]
    return shortened_text(value) if isinstance(value, str) else value


def shortened_facts(facts: Mapping[str, object]) -> dict[str, object]:
    return {key: shortened(value) for key, value in facts.items()}


def shortened_result(result: CaseResult) -> CaseResult:
    return replace(result, message=shortened_text(result.message))


def shortened_text(text: str) -> str:
    """The longest place first, each only as a whole path or the start of one."""
    for place, name in places():
        if place in text:
            whole = rf"(?<![\w/\\.])(?:file://)?{re.escape(place)}(?![\w.-])"
            # What is installed by its name is not installed as editable.
            text = re.sub(rf"-e (?=['\"]?{whole})", "", text)
            text = re.sub(whole, name, text)
    return text


@cache
def places() -> tuple[tuple[str, str], ...]:
    """(path, what stands for it)."""
    found = {folder: name for name, folder in _folders_of_distributions()}
    found |= {str(Path(qlora_hal.__file__).parent.parent): "qlora-hal"} if not _is_installed_library() else {}
    for path, name in (
        (sys.prefix, "<environment>"),
        (sys.base_prefix, "<python>"),
        (tempfile.gettempdir(), "<temporary>"),
        (str(Path.home()), "~"),
        (str(Path.cwd()), "."),
    ):
        if len(Path(path).parts) > 1:
            found.setdefault(path, name)
    return tuple(sorted(found.items(), key=lambda item: -len(item[0])))


def _is_installed_library() -> bool:
    return "site-packages" in Path(qlora_hal.__file__).parts


def _folders_of_distributions() -> list[tuple[str, str]]:
    """(name, folder) of each distribution that was installed from a folder (PEP 610)."""
    found = []
    for distribution in metadata.distributions():
        try:
            origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        except (OSError, ValueError):
            continue
        url = str(origin.get("url", "")) if isinstance(origin, dict) else ""
        if url.startswith("file:") and isinstance(origin.get("dir_info"), dict):
            found.append((distribution.name, unquote(urlparse(url).path).rstrip("/")))
    return found
