"""Every way to store a base that cpu_torch offers survives a stop: the run goes on with the same storage."""

from __future__ import annotations

import os
import signal
from itertools import product
from pathlib import Path

import pytest
from small_runs import SMALL, merged

from qlora_hal import resume, train
from qlora_hal.config.schema import RunConfig
from qlora_hal.contract.backend import BackendSpec, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.demo import model_path
from qlora_hal.detect.discovery import listed, load_spec
from qlora_hal.detect.requirements import quantization_of
from qlora_hal.errors import StoppedError
from qlora_hal.formats.catalogue import record_of
from qlora_hal.hooks import hookimpl
from qlora_hal.model.source import resolve_model
from qlora_hal.run.transfer import transferred_config
from qlora_hal_backends.cpu_torch import SPEC

pytestmark = pytest.mark.usefixtures("usual_signals")

SPECS = [load_spec(entry) for entry in listed()]


def storages(spec: BackendSpec) -> list[Quantization]:
    """Format x block size x double quantization, as far as the backend has them."""
    known = spec.capabilities
    return [
        Quantization(weight_format, block_size, double)
        for weight_format in sorted(known.weight_formats)
        for block_size, double in product(
            known.block_sizes.get(weight_format) or (None,),
            (True, False) if record_of(weight_format).double_quant else (False,),
        )
    ]


QUICK = ("none-None-single", "nf4-64-double", "fp4-512-single")
"""What `make test` resumes; `make test-long` has all."""


def named(storage: Quantization) -> str:
    return f"{storage.weight_format.value}-{storage.block_size}-{'double' if storage.double_quant else 'single'}"


class StopAfterFirstStep:
    @hookimpl
    def qlora_hal_step_finished(self, step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_storage_of_a_checkpoint_is_carried_exactly_by_every_backend(spec: BackendSpec) -> None:
    facts = resolve_model(str(model_path()), revision=None, trust_remote_code=False).facts
    for storage in storages(spec):
        provenance = {
            "backend": spec.name,
            "weight_format": storage.weight_format.value,
            "block_size": storage.block_size,
            "double_quant": storage.double_quant,
        }
        config, changes = transferred_config(RunConfig(), provenance, spec.name, spec.capabilities)
        assert changes == ()
        assert quantization_of(config, facts, spec.capabilities) == storage


@pytest.mark.parametrize(
    "storage",
    [
        pytest.param(storage, id=named(storage), marks=() if named(storage) in QUICK else pytest.mark.long)
        for storage in storages(SPEC)
    ],
)
def test_stopped_run_goes_on_with_the_storage_it_began_with(storage: Quantization, tmp_path: Path) -> None:
    quantization: dict[str, object] = {
        "weight_format": "8bit" if storage.weight_format is WeightFormat.INT8 else storage.weight_format.value,
        "block_size": storage.block_size,
    }
    if record_of(storage.weight_format).double_quant:
        quantization["double_quant"] = storage.double_quant
    changes = {
        "quantization": quantization,
        "data.max_seq_length": 64,
        "training.max_steps": 2,
        "training.per_device_train_batch_size": 1,
        "output_dir": str(tmp_path / "run"),
    }
    with pytest.raises(StoppedError):
        train(merged(SMALL, changes), observers=[StopAfterFirstStep()])
    result = resume(tmp_path / "run")
    assert (result.steps, result.stopped_because) == (2, "finished")
    assert (result.weight_format, result.block_size) == (storage.weight_format.value, storage.block_size)
