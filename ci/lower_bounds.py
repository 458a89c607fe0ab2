"""Print, as JSON, the lower bound of each dependency in pyproject.toml beside the version that is installed.

    python ci/lower_bounds.py cpu tests        of the core's dependencies and those of these extras

Run in the environment that is asked about: a bound may differ between Pythons.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def main(extras: Sequence[str]) -> None:
    lowest: dict[str, Version] = {}
    for requirement in requirements(extras):
        for specifier in requirement.specifier:
            if specifier.operator in (">=", "=="):
                bound = Version(specifier.version)
                lowest[requirement.name] = max(bound, lowest.get(requirement.name, bound))
    found = {name: (plain(bound), plain(Version(version(name)))) for name, bound in lowest.items()}
    print(json.dumps(found))


def requirements(extras: Sequence[str]) -> Iterator[Requirement]:
    """Those that hold here, through extras that name others of this project's."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    optional, own = project["optional-dependencies"], re.sub(r"[-_.]+", "-", project["name"])
    waiting = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.marker and not requirement.marker.evaluate():
            continue
        if requirement.name == own:
            waiting += [line for extra in requirement.extras for line in optional[extra]]
        else:
            yield requirement


def plain(found: Version) -> str:
    """Without zeros at the end, without the name of a build: 0.21.0 and 0.21+cpu are 0.21."""
    return re.sub(r"(\.0)+$", "", found.public)


if __name__ == "__main__":
    main(sys.argv[1:])
