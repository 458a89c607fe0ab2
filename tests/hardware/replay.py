"""Machines and packages replayed from JSON instead of read from this computer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_hal.detect.machine_facts import NvmlDevice, NvmlFacts, PlatformFacts

MACHINES = Path(__file__).parent / "machines"
NAMES = tuple(sorted(path.stem for path in MACHINES.glob("*.json")))


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((MACHINES / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


class ReplayedFacts:
    """The facts of one file; folders exist where files below them do."""

    def __init__(self, recording: Mapping[str, Any]) -> None:
        self.recording = recording
        self.files: dict[str, str] = dict(recording["files"])

    def platform(self) -> PlatformFacts:
        return PlatformFacts(**self.recording["platform"])

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def exists(self, path: str) -> bool:
        return path in self.files or bool(self.names(path))

    def names(self, folder: str) -> tuple[str, ...]:
        start = folder.rstrip("/") + "/"
        return tuple(sorted({path[len(start) :].split("/")[0] for path in self.files if path.startswith(start)}))

    def sysctl(self) -> Mapping[str, str]:
        return dict(self.recording["sysctl"])

    def nvml(self) -> NvmlFacts | None:
        recorded = self.recording["nvml"]
        if recorded is None:
            return None
        devices = tuple(
            NvmlDevice(**{**device, "compute_capability": tuple(device["compute_capability"])})
            for device in recorded["devices"]
        )
        cuda = tuple(recorded["cuda_version"]) if recorded["cuda_version"] else None
        return NvmlFacts(recorded["driver_version"], cuda, devices, recorded["failure"])

    def memory(self) -> tuple[int, int]:
        total, available = self.recording["memory"]
        return total, available

    def environment(self) -> Mapping[str, str]:
        return dict(self.recording["environment"])


class ReplayedPackages:
    """The packages of one file."""

    def __init__(self, recording: Mapping[str, Any]) -> None:
        self.packages = recording["packages"]

    def version(self, distribution: str) -> str | None:
        version: str | None = self.packages["versions"].get(distribution)
        return version

    def file_names(self, module: str) -> tuple[str, ...]:
        return tuple(self.packages["files"].get(module, ()))

    def read(self, module: str, name: str) -> str | None:
        text: str | None = self.packages["texts"].get(f"{module}/{name}")
        return text
