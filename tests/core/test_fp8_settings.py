"""What `quantization.compute_dtype: fp8` becomes on its way to a backend, and when a run moves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_hal.config.schema import RunConfig
from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.contract.checked_trainer import CheckedTrainer
from qlora_hal.contract.toolkit import check_served
from qlora_hal.demo import model_path
from qlora_hal.detect.discovery import open_trainer
from qlora_hal.detect.requirements import requirements_of
from qlora_hal.errors import ConfigError, UnsupportedFeatureError
from qlora_hal.model.source import resolve_model
from qlora_hal.run.planned_memory import likely_dtype
from qlora_hal.run.prepare import chosen_dtype
from qlora_hal.run.transfer import planned, transferred_config
from qlora_hal_backends.cpu_torch import SPEC
from qlora_hal_backends.cuda_bnb import SPEC as CUDA

MODEL = resolve_model(str(model_path()), revision=None, trust_remote_code=False)
FP8 = RunConfig.model_validate({"quantization": {"compute_dtype": "fp8"}})
TRAINED = {"backend": "cuda_bnb", "weight_format": "nf4", "block_size": 64, "double_quant": True}


def test_all_but_the_products_is_bfloat16() -> None:
    assert (FP8.quantization.dtype, FP8.quantization.fp8_products) == ("bfloat16", True)
    assert likely_dtype(FP8, CUDA) == "bfloat16"
    needs = requirements_of(FP8, MODEL.facts)
    assert needs.compute_dtype == "bfloat16"
    assert Feature.FP8_PRODUCTS in needs.features


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_nothing_else_asks_for_them(dtype: str) -> None:
    config = RunConfig.model_validate({"quantization": {"compute_dtype": dtype}})
    assert (config.quantization.dtype, config.quantization.fp8_products) == (dtype, False)
    needs = requirements_of(config, MODEL.facts)
    assert Feature.FP8_PRODUCTS not in needs.features


def test_a_device_without_bfloat16_is_told_of_what_was_written() -> None:
    with pytest.raises(ConfigError) as refusal:
        chosen_dtype("bfloat16", ("float16", "float32"), "cuda_bnb", written="fp8")
    assert refusal.value.code == "QH-N10"
    assert "compute_dtype is fp8, which is bfloat16 but for the products with the base; on" in refusal.value.message
    with pytest.raises(ConfigError, match="compute_dtype is bfloat16; on this device"):
        chosen_dtype("bfloat16", ("float16",), "cuda_bnb", written="bfloat16")


@pytest.mark.fault("B01")
def test_a_backend_without_them_refuses_them_in_its_own_check_and_in_that_of_the_core() -> None:
    compute, storage = Compute("bfloat16", fp8_products=True), Quantization(WeightFormat.NF4, 64, True)
    with pytest.raises(UnsupportedFeatureError, match="fp8_products"):
        check_served(SPEC, storage, compute)
    trainer = CheckedTrainer(open_trainer(SPEC))
    with pytest.raises(UnsupportedFeatureError, match=r"Compute\.fp8_products needs fp8_products"):
        trainer.load(MODEL, storage, compute)


def test_a_run_that_moves_where_they_are_not_says_so() -> None:
    without = replace(CUDA.capabilities, features=CUDA.capabilities.features - {Feature.FP8_PRODUCTS})
    config, changes = transferred_config(FP8, TRAINED, "cuda_bnb", without)
    assert config.quantization.compute_dtype == "auto"
    assert changes == ("fp8 products with the base are made in the compute dtype, which is chosen again",)
    having = replace(without, features=without.features | {Feature.FP8_PRODUCTS})
    config, changes = transferred_config(FP8, TRAINED, "cuda_bnb", having)
    assert (config.quantization.compute_dtype, changes) == ("fp8", ())


@pytest.mark.parametrize(("before", "now", "said"), [(True, False, "no longer"), (False, True, "now")])
def test_what_is_inexact_of_a_moved_run_names_them(before: bool, now: bool, said: str) -> None:
    trained = {"backend": "cuda_bnb", "compute_dtype": "bfloat16", **({"fp8_products": True} if before else {})}
    here = {"backend": "cuda_bnb", "compute_dtype": "bfloat16", "fp8_products": now}
    moved = planned(3, trained, here, (), 0.0)
    assert moved is not None
    assert f"products with the base are {said} in fp8" in moved.inexact
    assert planned(3, trained, {**here, "fp8_products": before}, (), 0.0) is None
