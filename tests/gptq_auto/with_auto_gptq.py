"""auto-gptq itself, in the environment that `ci/run_auto_gptq.sh` builds. Named on pytest's command line there, and
found by no other run: beside transformers 5 it cannot be imported.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gptq_auto.checkpoints import DATA, KINDS, largest_gap_to_the_library, losses_of_training, opened, weights_of
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_hal.contract.backend import CalibrationJob, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.errors import ModelError
from qlora_hal_backends.gptq_int4.auto_gptq_engine import load_weight
from qlora_hal_backends.gptq_int4.auto_gptq_solver import quantize
from qlora_hal_backends.gptq_int4.engines import GptqSettings, PackedLinear, QuantizationJob
from qlora_hal_backends.gptq_int4.quantizing import GptqQuantizer
from qlora_hal_backends.torch_family.transformers_versions import read_config
from qlora_hal_oracle import GptqWeight, ZeroPointConvention, dequantize_gptq
from qlora_hal_oracle.random_models import SHAPES, TinyModel, draw_tensors, linear_shapes, write_model

LAYOUTS = [
    pytest.param(128, True, False, id="128-symmetric"),
    pytest.param(64, False, False, id="64-asymmetric"),
    pytest.param(32, True, False, id="32-symmetric"),
    pytest.param(32, False, True, id="32-asymmetric-act_order"),
    pytest.param(64, True, True, id="64-symmetric-act_order"),
    pytest.param(None, True, False, id="whole-symmetric"),
    pytest.param(None, False, True, id="whole-asymmetric-act_order"),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    tensors = draw_tensors(SHAPES[2], np.random.default_rng(5))
    return write_model(tmp_path_factory.mktemp("plain"), SHAPES[2], tensors, stored_dtype="bfloat16")


def rows(vocabulary: int, *lengths: int) -> list[list[int]]:
    random = np.random.default_rng(6)
    return [random.integers(3, vocabulary, length).tolist() for length in lengths]


def quantized(model: TinyModel, folder: Path, settings: GptqSettings, **choices: Any) -> Path:
    folder.mkdir()
    calibration = rows(model.shape.vocab_size, *[32] * 12, *range(20, 30))
    quantize(QuantizationJob(model.folder, folder, calibration, settings, **choices), lambda *_: None)
    return folder


def decoded(folder: Path, name: str) -> np.ndarray:  # type: ignore[type-arg]
    (weights,) = (path for path in folder.glob("*.safetensors") if "expected" not in path.name)
    with safe_open(weights, "np") as file:
        parts = [file.get_tensor(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")]
    return dequantize_gptq(GptqWeight(*parts, bits=4, convention=ZeroPointConvention.V1))


# checkpoints of the other library -------------------------------------------------------------------------------------
@pytest.mark.parametrize("library", ["gptqmodel", "auto_gptq"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_of_either_library_is_decoded_exactly_and_trains(library: str, kind: str) -> None:
    folder = DATA / f"{library}-{kind}"
    with opened(folder) as trainer:
        assert "auto-gptq 0.7.1" in trainer.device_facts().kernel_path
        before = weights_of(trainer)
        gap, bound = largest_gap_to_the_library(folder, trainer)
        losses = losses_of_training(trainer)
        after = weights_of(trainer)
    assert all(np.array_equal(weight, decoded(folder, name)) for name, weight in before.items())
    assert gap <= bound
    assert losses[-1] < 0.8 * losses[0]
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_rotary_base_of_a_transformers_5_checkpoint_is_read(tmp_path: Path) -> None:
    """Under its new name transformers 4 would miss it, and compute with its default of 10000."""
    config = json.loads((DATA / "gptqmodel-in_order" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_config(tmp_path, trust_remote_code=False)
    assert (found.rope_theta, found.rope_scaling) == (500.0, {"rope_type": "linear", "factor": 2.0})


# decoding -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_is_what_a_product_with_the_identity_gives(kind: str, dtype: str) -> None:
    """The short way to the weight against the layer's own product; rounded once, after float32."""
    stored = load_file(DATA / f"auto_gptq-{kind}" / "gptq_model-4bit-32g.safetensors")
    name = "model.layers.1.mlp.down_proj"
    parts = [stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")]
    settings = GptqSettings(32, kind == "in_order", kind == "act_order", "gptq")
    kernel = "cuda_old" if kind == "in_order" else "cuda"
    weight: Any = load_weight(PackedLinear(name, *parts), settings, kernel, DTYPES[dtype])
    found = weight.dense()
    weight.layer.scales = weight.scales.float()
    product = weight.layer(torch.eye(128)).t()
    assert torch.equal(found, product.to(DTYPES[dtype]))
    assert found.dtype == DTYPES[dtype]
    assert type(found) is torch.Tensor


# quantizing -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("group_size", "symmetric", "act_order"), LAYOUTS)
def test_solver_fits_the_weights_to_the_calibration(
    group_size: int | None, symmetric: bool, act_order: bool, plain: TinyModel, tmp_path: Path
) -> None:
    folder = quantized(plain, tmp_path / "out", GptqSettings(group_size, symmetric, act_order, "gptq"), batch_size=4)
    with opened(folder) as trainer:
        found = weights_of(trainer)
    assert found.keys() == linear_shapes(plain.shape).keys()
    for name, weight in found.items():
        assert np.array_equal(weight, decoded(folder, name))
        original = plain.tensors[f"{name}.weight"]
        # A 4-bit grid over a whole row of normal weights (range about 6 sigma) leaves a step of 0.4 sigma, and 0.12
        # sigma of rounding error; the solver trades up to twice of it for a better product.
        assert np.linalg.norm(weight - original) < 0.25 * np.linalg.norm(original)


def recipe_in_a_child(model: TinyModel, folder: Path, *, symmetric: bool) -> None:
    """What `qlora-hal quantize --engine auto_gptq` does."""
    folder.mkdir()
    calibration, storage = rows(model.shape.vocab_size, *[32] * 12), Quantization(WeightFormat.INT4_GPTQ, 64)
    job = CalibrationJob(
        model.folder, folder, calibration, storage, symmetric=symmetric, options={"engine": "auto_gptq"}
    )
    GptqQuantizer().quantize(job, lambda text: None)


def test_asymmetric_weights_are_written_in_the_format_that_the_library_has(plain: TinyModel, tmp_path: Path) -> None:
    """Sixteen levels from the smallest to the largest weight lie closer than sixteen around zero."""
    errors = {}
    for symmetric in (True, False):
        folder = tmp_path / str(symmetric)
        recipe_in_a_child(plain, folder, symmetric=symmetric)
        told = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert (told["checkpoint_format"], told["sym"]) == ("gptq", symmetric)
        with opened(folder) as trainer:
            found = weights_of(trainer)
        originals = {name: plain.tensors[f"{name}.weight"] for name in found}
        errors[symmetric] = sum(np.linalg.norm(found[name] - original) for name, original in originals.items())
    assert errors[False] < errors[True]


def test_a_group_without_a_negative_weight_is_refused_for_asymmetric_codes(tmp_path: Path) -> None:
    """Its zero point is 0, which v1 cannot hold; the error comes out of the child as it is."""
    tensors = draw_tensors(SHAPES[2], np.random.default_rng(5))
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name][:, :64] = np.abs(tensors[name][:, :64]) + 0.1
    model = write_model(tmp_path / "positive", SHAPES[2], tensors, stored_dtype="bfloat16")
    with pytest.raises(ModelError, match="zero point of 0") as caught:
        recipe_in_a_child(model, tmp_path / "out", symmetric=False)
    assert (caught.value.code, caught.value.exit_status) == ("QH-C74", 5)
    assert "symmetric groups, or use the engine gptqmodel" in caught.value.fix


def test_everything_but_the_linear_layers_is_kept_as_it_was(plain: TinyModel, tmp_path: Path) -> None:
    folder = quantized(plain, tmp_path / "out", GptqSettings(64, True, False, "gptq"))
    with safe_open(folder / "gptq_model-4bit-64g.safetensors", "pt") as new:
        with safe_open(plain.folder / "model.safetensors", "pt") as old:
            kept = [name for name in list(old.keys()) if name.removesuffix(".weight") not in linear_shapes(plain.shape)]
            assert all(torch.equal(new.get_tensor(name), old.get_tensor(name)) for name in kept)
        assert {new.get_tensor(name).dtype for name in list(new.keys()) if name.endswith(".scales")} == {torch.float16}
    config = json.loads((folder / "config.json").read_text())
    source = json.loads((plain.folder / "config.json").read_text())
    assert config.items() >= source.items()
    assert str(tmp_path) not in (folder / "config.json").read_text() + (folder / "quantize_config.json").read_text()


def test_same_job_gives_the_same_file(plain: TinyModel, tmp_path: Path) -> None:
    settings = GptqSettings(32, True, True, "gptq")
    one, two = (quantized(plain, tmp_path / name, settings) for name in ("one", "two"))
    first, second = (load_file(folder / "gptq_model-4bit-32g.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_progress_is_told_layer_by_layer(plain: TinyModel, tmp_path: Path) -> None:
    said: list[tuple[int, int, str]] = []
    job = QuantizationJob(plain.folder, tmp_path, rows(300, 30, 30), GptqSettings(64, True, False, "gptq"))
    quantize(job, lambda *parts: said.append(parts))
    assert [part for part in said if part[1] == 2] == [(0, 2, "layer 1"), (1, 2, "layer 2")]


def test_what_the_solver_needs_replaced_is_put_back(plain: TinyModel, tmp_path: Path) -> None:
    import auto_gptq.modeling._base as base

    before = torch.cuda.synchronize, base.CUDA_0, torch.backends.cudnn.allow_tf32, list(logging.getLogger().handlers)
    quantized(plain, tmp_path / "out", GptqSettings(64, True, False, "gptq"))
    after = torch.cuda.synchronize, base.CUDA_0, torch.backends.cudnn.allow_tf32, list(logging.getLogger().handlers)
    assert before == after
    assert base.CUDA_0.type == "cuda"


def test_groups_that_do_not_divide_are_refused_before_anything_is_written(plain: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="groups of 96") as caught:
        quantized(plain, tmp_path / "out", GptqSettings(96, True, False, "gptq"))
    assert caught.value.code == "QH-M55"
    assert not list((tmp_path / "out").iterdir())


def test_architecture_that_auto_gptq_does_not_know_is_refused(plain: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = json.loads((plain.folder / "config.json").read_text()) | {
        "model_type": "olmo",
        "architectures": ["OlmoForCausalLM"],
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "model.safetensors").write_bytes((plain.folder / "model.safetensors").read_bytes())
    (tmp_path / "out").mkdir()
    job = QuantizationJob(tmp_path / "model", tmp_path / "out", rows(300, 30), GptqSettings(64, True, False, "gptq"))
    with pytest.raises(ModelError, match="olmo") as caught:
        quantize(job, lambda *_: None)
    assert caught.value.code == "QH-M55"
    assert not list((tmp_path / "out").iterdir())
