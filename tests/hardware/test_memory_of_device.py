"""Whose memory `advise` counts with on the machines that are replayed here."""

from __future__ import annotations

import pytest

from qlora_hal.cli.advise import memory_of_device
from qlora_hal.contract.backend import Availability, ProbeReport
from qlora_hal.detect.discovery import find, listed, load_spec
from qlora_hal.detect.hardware import inventory
from qlora_hal.memory.gpus import apple_working_set
from tests.hardware.replay import ReplayedFacts, load


@pytest.mark.parametrize(
    ("recorded", "backend"),
    [("nvidia_h200", "cuda_bnb"), ("nvidia_t4", "cuda_bnb"), ("amd_mi300x", "rocm_bnb"), ("plain_cpu", "cpu_torch")],
)
def test_a_backend_counts_with_its_own_card_or_with_the_machine(recorded: str, backend: str) -> None:
    machine = inventory(ReplayedFacts(load(recorded)))
    spec = load_spec(find(backend, listed()))
    report = ProbeReport(backend, Availability.READY, "ready")
    expected = machine.gpus[0].memory_total_bytes if machine.gpus else machine.memory_limit_bytes
    assert memory_of_device(spec, report, machine) == expected
    cpu = load_spec(find("cpu_torch", listed()))
    assert memory_of_device(cpu, ProbeReport("cpu_torch", Availability.READY, "ready"), machine) <= machine.memory_bytes


def test_a_mac_counts_with_what_metal_recommends() -> None:
    machine = inventory(ReplayedFacts(load("apple_m3_macos15")))
    spec = load_spec(find("mlx_lora", listed()))
    report = ProbeReport("mlx_lora", Availability.READY, "ready", uses_accelerator=True)
    assert memory_of_device(spec, report, machine) == apple_working_set(machine.memory_bytes)
