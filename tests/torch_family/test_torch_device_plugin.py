"""The worked example of a torch device: as far as a machine without one goes."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from trainers import moved_adapter, random_batch, source_of

from qlora_hal.contract.backend import Availability, Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import AdapterConfig, StepSettings
from qlora_hal.demo import model_path
from qlora_hal.detect.discovery import BackendEntry, load_spec
from qlora_hal.errors import BackendUnavailableError
from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer

FILE = Path(__file__).resolve().parents[2] / "examples/torch_device_plugin/qlora_hal_xpu.py"


@pytest.fixture(scope="module")
def plugin() -> ModuleType:
    spec = importlib.util.spec_from_file_location("qlora_hal_xpu", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_torch_device_takes_forty_lines(plugin: ModuleType) -> None:
    assert sum(bool(line.strip()) for line in FILE.read_text().splitlines()) <= 40
    assert load_spec(BackendEntry("xpu_bnb", "qlora-hal-xpu", spec=plugin.SPEC)) is plugin.SPEC


def test_without_the_device_its_probe_says_what_to_do(plugin: ModuleType) -> None:
    report = plugin.probe()
    assert report.availability is not Availability.READY
    assert report.reason
    assert report.fix
    with pytest.raises(BackendUnavailableError, match="QH-E04"):
        plugin.open_trainer()


def test_its_record_trains_on_the_cpu_in_the_place_of_its_device(plugin: ModuleType) -> None:
    trainer = TorchLoRATrainer(plugin.SPEC, replace(plugin.XPU, torch_device="cpu"))
    trainer.load(source_of(model_path()), Quantization(WeightFormat.NF4, 64, True), Compute("float32"))
    modules = trainer.linear_modules()
    trainer.attach(moved_adapter(AdapterConfig(2, 4.0, target_modules=tuple(sorted(modules))), modules))
    batch = random_batch(3)
    stats = trainer.train_step([batch], StepSettings(1e-3, float(batch.counted_tokens))).resolve()
    assert stats.applied
    assert np.isfinite([stats.loss_sum, stats.grad_norm]).all()
