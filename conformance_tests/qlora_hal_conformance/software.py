"""What a certificate was made with and what it is about, beside what is installed here and what a run asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from qlora_hal_conformance import SUITE_VERSION
from qlora_hal_conformance.catalogue import section_of
from qlora_hal_conformance.certificate import problems, read_certificate, revision_that_made
from qlora_hal_conformance.combination import Combination
from qlora_hal_conformance.journal import result_from_json
from qlora_hal_conformance.judged_in import Ran, cases_that_ran, judged_in

NOT_A_PACKAGE = frozenset({"python", "pytest"})


@dataclass(frozen=True, slots=True)
class Here:
    """What runs here: a backend on a device, and the versions it told."""

    backend: str
    device: str = ""
    versions: Mapping[str, str] | None = None


def versions_of(document: Mapping[str, object]) -> dict[str, str]:
    """Package -> version, of all that a certificate was made with."""
    found: dict[str, str] = {}
    for part in ("machine", "device"):
        versions = _part(document, part).get("versions")
        found |= {str(name): str(version) for name, version in versions.items()} if isinstance(versions, dict) else {}
    backend = _part(document, "backend")
    if backend.get("distribution_version"):
        found[str(backend["distribution"])] = str(backend["distribution_version"])
    return {name: version for name, version in found.items() if version and name not in NOT_A_PACKAGE}


def other_versions(document: Mapping[str, object], here: Mapping[str, str] | None = None) -> list[str]:
    """A line for each package that is another version here; `here` is asked before the packages that are installed.
    What is not here at all is left out: a certificate may be read on any machine."""
    lines = []
    for name, made_with in sorted(versions_of(document).items()):
        found = (here or {}).get(name) or _installed(name)
        if found and found != made_with:
            lines.append(f"it was made with {name} {made_with}; here {name} is {found}")
    return lines


def about_this_run(path: Path, combination: Combination, dtype: str, here: Here) -> list[str]:
    """What a certificate says of one run here, in sentences. Raises ConfigError QH-B51 where it is none."""
    document = read_certificate(path)
    found, revision = problems(document), revision_that_made(document)
    if found:
        return [f"it does not verify: {found[0]}" + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")]
    lines = [f"it verifies: {'conformant' if document['conformant'] is True else 'not conformant'}"]
    if revision != SUITE_VERSION:
        lines.append(f"it was made by revision {revision} of the suite; the present one is {SUITE_VERSION}")
    name, device = _part(document, "backend").get("name"), _part(document, "device").get("device")
    if name != here.backend:
        return [*lines, f"it is of {name}, and the run is on {here.backend}: it says nothing of this run"]
    if here.device and device != here.device:
        lines.append(f"it was made on {device}; this is {here.device}")
    return [*lines, *_of_configuration(document, combination, dtype), *other_versions(document, here.versions)]


def _of_configuration(document: Mapping[str, object], combination: Combination, dtype: str) -> list[str]:
    records = document["cases"]
    assert isinstance(records, list)
    results = [result_from_json(record) for record in records]
    c = combination
    blocks = f"/{c.block_size}" if c.block_size else ""
    storage = f"{c.weight_format}{blocks}{'+double_quant' if c.double_quant else ''} in {dtype}"
    cases = cases_that_ran(results, Ran(c.weight_format, c.block_size, c.double_quant, dtype))
    table = judged_in(results, "")
    dtypes, families = table["dtypes"], table["families"]
    assert isinstance(dtypes, dict)
    assert isinstance(families, dict)
    lines = [f"it judged {storage} in {_counted(cases)}"]
    if dtype not in dtypes:
        lines.append(f"it judged nothing in {dtype}; its dtypes are {', '.join(dtypes) or 'none'}")
    if c.family not in families:
        lines.append(f"it judged no model of {c.family}; its families are {', '.join(families) or 'none'}")
    return lines


def _counted(cases: list[str]) -> str:
    sections = ", ".join(dict.fromkeys(map(section_of, cases)))
    return f"{len(cases)} case{'' if len(cases) == 1 else 's'} of {sections}" if cases else "no case"


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, ValueError):
        return ""


def _part(document: Mapping[str, object], key: str) -> Mapping[str, object]:
    part = document.get(key)
    return part if isinstance(part, dict) else {}
