"""Installed packages as metadata: versions, names of files, small texts. Nothing is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Version = tuple[int, ...]
BuildKind = Literal["cuda", "rocm", "xpu", "cpu"]


class Packages(Protocol):
    """Where facts about packages come from: this environment, or a recording."""

    def version(self, distribution: str) -> str | None:
        """The installed version of a distribution, None when it is not installed."""
        ...

    def file_names(self, module: str) -> tuple[str, ...]:
        """Names directly inside the folder of a top-level module; empty when it is not installed."""
        ...

    def read(self, module: str, name: str) -> str | None:
        """The text of one file of a top-level module."""
        ...


class InstalledPackages:
    """The packages of this interpreter; each version is looked up once for each object."""

    def __init__(self) -> None:
        self._versions: dict[str, str | None] = {}

    def version(self, distribution: str) -> str | None:
        if distribution not in self._versions:
            try:
                self._versions[distribution] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                self._versions[distribution] = None
        return self._versions[distribution]

    def file_names(self, module: str) -> tuple[str, ...]:
        folder = self._folder(module)
        try:
            return tuple(sorted(os.listdir(folder))) if folder else ()
        except OSError:
            return ()

    def read(self, module: str, name: str) -> str | None:
        folder = self._folder(module)
        try:
            return (folder / name).read_text(encoding="utf-8", errors="replace") if folder else None
        except OSError:
            return None

    def _folder(self, module: str) -> Path | None:
        """`find_spec` of a top-level name looks at the search path and runs none of the module's code."""
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
        locations = list(spec.submodule_search_locations or ()) if spec else []
        return Path(locations[0]) if locations else None


def version_numbers(version: str) -> Version:
    """The leading numbers of a version: (2, 13, 0) of `2.13.0+cu130`."""
    release = version.split("+", 1)[0]
    found = re.match(r"\d+(?:\.\d+)*", release)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def versions_out_of_range(packages: Packages, lowest: Mapping[str, str], too_new: Mapping[str, str]) -> str:
    """A sentence naming every installed distribution below its lowest or from its first too new version; or ""."""
    wrong = []
    for name, floor in lowest.items():
        version = packages.version(name) or ""
        numbers, ceiling = version_numbers(version), too_new.get(name)
        if numbers < version_numbers(floor) or (ceiling and numbers >= version_numbers(ceiling)):
            wrong.append(f"{name} {version} (needs {floor} or newer{f', below {ceiling}' if ceiling else ''})")
    return f"Versions out of range: {', '.join(wrong)}." if wrong else ""


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """What an installed torch was compiled for; `toolkit` is the CUDA or ROCm version, empty where unknown."""

    version: str
    kind: BuildKind
    toolkit: Version = ()

    @property
    def toolkit_name(self) -> str:
        """`CUDA 13.0`, `ROCm 7.1`, or the kind alone."""
        name = {"cuda": "CUDA", "rocm": "ROCm", "xpu": "XPU", "cpu": "CPU"}[self.kind]
        return f"{name} {'.'.join(map(str, self.toolkit))}" if self.toolkit else name


def torch_build(packages: Packages) -> TorchBuild | None:
    """How torch was built, None when it is not installed.

    `torch/version.py` is read as text: it says `cuda = '13.0'` or `hip = '7.1.2'`, also in the wheels of PyPI, whose
    version has no local tag. Where it cannot be read, the tag (`+cu130`, `+rocm7.1`, `+cpu`) and the runtime
    libraries installed beside torch decide.
    """
    version = packages.version("torch")
    if version is None:
        return None
    text = packages.read("torch", "version.py") or ""
    stated = dict(re.findall(r"^(cuda|hip|xpu)\b[^=\n]*=\s*'([^']+)'", text, re.MULTILINE))
    if stated.get("hip"):
        return TorchBuild(version, "rocm", version_numbers(stated["hip"])[:2])
    if stated.get("cuda"):
        return TorchBuild(version, "cuda", version_numbers(stated["cuda"])[:2])
    if stated.get("xpu"):
        return TorchBuild(version, "xpu", version_numbers(stated["xpu"])[:2])
    return TorchBuild(version, "cpu") if text else _build_from_tag(packages, version)


def _build_from_tag(packages: Packages, version: str) -> TorchBuild:
    tag = version.partition("+")[2]
    if found := re.fullmatch(r"cu(\d\d)(\d)", tag):
        return TorchBuild(version, "cuda", (int(found[1]), int(found[2])))
    if found := re.match(r"rocm(\d+)\.(\d+)", tag):
        return TorchBuild(version, "rocm", (int(found[1]), int(found[2])))
    for name in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        if runtime := packages.version(name):
            return TorchBuild(version, "cuda", version_numbers(runtime)[:2])
    return TorchBuild(version, "cpu")


# bitsandbytes -------------------------------------------------------------------------------------------------------
def native_versions(packages: Packages, kind: Literal["cuda", "rocm"]) -> dict[Version, str]:
    """The CUDA or ROCm versions that bitsandbytes brings a library for, each with the library's file name.

    The file names hold the version without dots: two digits of major for CUDA, one for ROCm, the rest minor
    (bitsandbytes 0.50.2, `cextension.py`).
    """
    found: dict[Version, str] = {}
    for name in packages.file_names("bitsandbytes"):
        if match := re.fullmatch(rf"libbitsandbytes_{kind}(\d+)\.(?:so|dll|dylib)", name):
            digits, major_digits = match[1], 2 if kind == "cuda" else 1
            if len(digits) > major_digits:
                found[(int(digits[:major_digits]), int(digits[major_digits:]))] = name
    return found


def matching_library(available: dict[Version, str], wanted: Version) -> str | None:
    """The library that bitsandbytes will load for a toolkit: exact, else the next lower, else the next higher of the
    same major version; never another major (bitsandbytes 0.50.2, `get_cuda_bnb_library_path`)."""
    if wanted in available:
        return available[wanted]
    same_major = [version for version in available if version[0] == wanted[0]]
    lower = [version for version in same_major if version < wanted]
    if lower:
        return available[max(lower)]
    return available[min(same_major)] if same_major else None


def has_cpu_library(packages: Packages) -> bool:
    """Whether bitsandbytes brings its library for the CPU."""
    return any(re.fullmatch(r"libbitsandbytes_cpu\.(?:so|dll|dylib)", n) for n in packages.file_names("bitsandbytes"))
