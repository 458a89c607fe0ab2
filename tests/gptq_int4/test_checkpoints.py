"""Checkpoints of either library load as they are; damaged ones are refused before an engine sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptq_int4.gptq_checkpoints import (
    KINDS,
    SHAPE,
    V1,
    V2,
    Kind,
    adapter_for,
    opened,
    source_of,
    storage_of,
    write_checkpoint,
)

from qlora_hal.config.schema import RunConfig
from qlora_hal.contract.backend import Availability, Compute, ProbeReport, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.detect.discovery import listed
from qlora_hal.detect.requirements import quantization_of, requirements_of
from qlora_hal.detect.selection import choose
from qlora_hal.errors import ConfigError, ModelError, QloraHalError, UnsafeInputError, UnsupportedFeatureError
from qlora_hal_backends.gptq_int4 import SPEC
from qlora_hal_backends.gptq_int4.loading import checked_settings
from qlora_hal_oracle import ZeroPointConvention
from qlora_hal_oracle.random_models import linear_shapes

pytestmark = pytest.mark.slow

MODULE = "model.layers.1.mlp.down_proj"
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_checkpoint_of_each_kind_has_the_weights_that_were_packed(kind: Kind, tmp_path: Path) -> None:
    decoded = write_checkpoint(tmp_path / "model", kind)
    with opened(tmp_path / "model") as trainer:
        for module, expected in decoded.items():
            assert np.array_equal(trainer.dequantized_weight(module).astype(np.float64), expected), module


@pytest.mark.parametrize(
    ("weights_file", "config_file"),
    [
        ("gptq_model-4bit-128g.safetensors", "quantize_config.json"),
        ("gptq_model-4bit-128g.safetensors", "config.json"),
        ("model.safetensors", "quantize_config.json"),
    ],
)
def test_the_files_of_auto_gptq_are_found_under_their_own_names(
    weights_file: str, config_file: str, tmp_path: Path
) -> None:
    decoded = write_checkpoint(tmp_path, Kind(128), weights_file=weights_file, config_file=config_file)
    with opened(tmp_path) as trainer:
        assert np.array_equal(trainer.dequantized_weight(MODULE).astype(np.float64), decoded[MODULE])


def test_an_old_description_is_understood(tmp_path: Path) -> None:
    """auto-gptq 0.7: no checkpoint_format, keys that nobody reads any more."""
    old = {
        "bits": 4,
        "group_size": 64,
        "damp_percent": 0.01,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "gptq_model-4bit-64g",
        "is_marlin_format": False,
        "quant_method": "gptq",
    }
    name = "gptq_model-4bit-64g.safetensors"
    decoded = write_checkpoint(tmp_path, Kind(64), weights_file=name, config_file="quantize_config.json", described=old)
    with opened(tmp_path) as trainer:
        assert np.array_equal(trainer.dequantized_weight(MODULE).astype(np.float64), decoded[MODULE])


def test_the_kernel_is_named_in_the_facts_of_the_device(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind())
    with opened(tmp_path) as trainer:
        trainer.attach(adapter_for(trainer))
        facts = trainer.device_facts()
    assert facts.kernel_path.startswith("gptqmodel 7.")
    assert "torch dequantize, torch CPU products" in facts.kernel_path
    assert facts.versions["gptqmodel"].startswith("7.")


def test_a_layer_left_out_of_quantization_stays_as_it_is(tmp_path: Path) -> None:
    plain = np.random.default_rng(0).normal(size=(SHAPE.hidden_size, SHAPE.intermediate_size)).astype(np.float32)
    dropped: dict[str, Any] = {f"{MODULE}.{part}": None for part in PARTS}
    write_checkpoint(tmp_path, Kind(), changed={**dropped, f"{MODULE}.weight": plain})
    with opened(tmp_path) as trainer:
        assert np.array_equal(trainer.dequantized_weight(MODULE), plain)


@pytest.mark.fault("M52")
def test_a_layer_left_out_of_quantization_that_is_not_finite_is_named(tmp_path: Path) -> None:
    plain = np.full((SHAPE.hidden_size, SHAPE.intermediate_size), np.nan, np.float32)
    dropped: dict[str, Any] = {f"{MODULE}.{part}": None for part in PARTS}
    write_checkpoint(tmp_path, Kind(), changed={**dropped, f"{MODULE}.weight": plain})
    with pytest.raises(ModelError, match=f"{MODULE}.weight holds NaN or infinity"):
        opened(tmp_path)


# selection ------------------------------------------------------------------------------------------------------------
def reports(accelerated: bool, ready: tuple[str, ...]) -> tuple[ProbeReport, ...]:
    return tuple(
        ProbeReport(
            entry.name,
            Availability.READY if entry.name in ready else Availability.NO_DEVICE,
            "a test says so",
            "nothing",
            uses_accelerator=accelerated if entry.name == "gptq_int4" else None,
        )
        for entry in listed()
    )


@pytest.mark.parametrize(
    ("device", "accelerated"), [("cuda_bnb", True), ("rocm_bnb", True), ("cpu_torch", False), ("mps_bnb", False)]
)
def test_a_gptq_checkpoint_chooses_this_backend_on_every_device(device: str, accelerated: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind(128))
    needs = requirements_of(RunConfig(), source_of(tmp_path).facts)
    probed = reports(accelerated, (device, "gptq_int4", "cpu_torch"))
    choice = choose("auto", needs, listed(), probed, allow_cpu=not accelerated)
    assert choice.spec.name == "gptq_int4"
    assert "int4_gptq" in choice.rejections[device]


def test_on_the_cpu_auto_asks_for_leave(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind(128))
    needs = requirements_of(RunConfig(), source_of(tmp_path).facts)
    with pytest.raises(QloraHalError, match="ready, but auto chooses the CPU only when"):
        choose("auto", needs, listed(), reports(False, ("gptq_int4",)), allow_cpu=False)


def test_a_16_bit_model_goes_to_a_backend_that_quantizes_while_loading(tmp_path: Path) -> None:
    from qlora_hal.demo import model_path

    needs = requirements_of(RunConfig(), source_of(model_path()).facts)
    probed = reports(False, ("cpu_torch", "gptq_int4"))
    assert choose("auto", needs, listed(), probed, allow_cpu=True).spec.name == "cpu_torch"
    named = requirements_of(
        RunConfig.model_validate({"quantization": {"weight_format": "int4_gptq"}}), source_of(model_path()).facts
    )
    assert choose("auto", named, listed(), probed, allow_cpu=True).spec.name == "gptq_int4"


def test_one_group_over_all_inputs_has_no_block_size(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind(-1))
    facts = source_of(tmp_path).facts
    assert quantization_of(RunConfig(), facts, SPEC.capabilities) == Quantization(WeightFormat.INT4_GPTQ, None, False)


# what is refused ------------------------------------------------------------------------------------------------------
def refused(folder: Path, code: str, *words: str, kind: type[QloraHalError] = ModelError, **options: object) -> None:
    with pytest.raises(kind) as raised:
        opened(folder, **options)
    assert raised.value.code == code, str(raised.value)
    for word in words:
        assert word in str(raised.value), str(raised.value)


@pytest.mark.parametrize("part", ["g_idx", "qzeros", "scales"])
def test_a_layer_without_one_of_its_tensors_is_refused(part: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind(), changed={f"{MODULE}.{part}": None})
    refused(tmp_path, "QH-C73", MODULE, part)


def g_idx(**entries: int) -> np.ndarray[Any, Any]:
    groups = (np.arange(SHAPE.intermediate_size) // 64).astype(np.int32)
    for place, group in entries.items():
        groups[int(place[1:])] = group
    return groups


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"g_idx": g_idx(_7=99)}, "groups 0 to 99 of 4"),
        ({"g_idx": g_idx(_7=-1)}, "groups -1 to 3 of 4"),
        ({"g_idx": g_idx(_7=2)}, "g_idx is not in order, but desc_act is false"),
        ({"g_idx": np.zeros(8, np.int32)}, "inputs"),
        ({"scales": np.full((4, SHAPE.hidden_size), np.nan, np.float16)}, "NaN or infinity"),
        ({"scales": np.ones((4, SHAPE.hidden_size), np.int32)}, "floating point is expected"),
        ({"scales": np.ones((7, SHAPE.hidden_size), np.float16)}, "7 groups"),
        ({"scales": np.ones(SHAPE.hidden_size, np.float16)}, f"scales has shape [{SHAPE.hidden_size}], two sides"),
        ({"qzeros": np.zeros(16, np.int32)}, "qzeros has shape [16], two sides"),
        ({"qzeros": np.zeros((4, 3), np.int32)}, "qzeros have shape [4, 3]"),
        ({"qweight": np.zeros((SHAPE.intermediate_size // 8, SHAPE.hidden_size), np.float32)}, "int32 is expected"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind(64), changed={f"{MODULE}.{part}": array for part, array in changed.items()})
    refused(tmp_path, "QH-C73", MODULE, words)


def in_one_group() -> np.ndarray[Any, Any]:
    return np.zeros(SHAPE.intermediate_size, np.int32)


@pytest.mark.fault("C73")
@pytest.mark.parametrize(
    ("groups", "words"),
    [(in_one_group(), "puts 256 inputs into one group"), (g_idx(_7=2), "puts 65 inputs into one group")],
    ids=["zeros", "one_moved"],
)
def test_act_order_changes_the_order_of_groups_and_not_their_size(
    groups: np.ndarray[Any, Any], words: str, tmp_path: Path
) -> None:
    """A g_idx that nobody filled would decode every weight with the first scale."""
    write_checkpoint(tmp_path, Kind(64, act_order=True), changed={f"{MODULE}.g_idx": groups})
    refused(tmp_path, "QH-C73", MODULE, words, "group_size is 64")


ASYMMETRIC_V2 = Kind(symmetric=False, convention=V2)
"""Nothing in its tensors tells v1 from v2; read as v1 every weight is one step off."""


@pytest.mark.fault("C73")
@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("quantize_config.json", "checkpoint_format", "gptq"),
        ("quant_config.json", "checkpoint_format", "gptq"),
        ("quantize_config.json", "format", "gptq"),
        ("quantize_config.json", "bits", 8),
        ("quantize_config.json", "group_size", 128),
        ("quantize_config.json", "sym", True),
        ("quantize_config.json", "desc_act", True),
    ],
)
def test_two_descriptions_that_contradict_each_other_are_refused(
    file: str, field: str, value: object, tmp_path: Path
) -> None:
    """transformers reads config.json, gptqmodel and auto-gptq quantize_config.json."""
    write_checkpoint(tmp_path, ASYMMETRIC_V2)
    (tmp_path / file).write_text(json.dumps({"bits": 4, field: value}))
    refused(tmp_path, "QH-C73", "in config.json", f"{field} is", f"in {file}")


@pytest.mark.fault("C73")
def test_two_names_of_the_layout_that_differ_are_refused(tmp_path: Path) -> None:
    """transformers takes checkpoint_format, gptqmodel format."""
    write_checkpoint(tmp_path, ASYMMETRIC_V2, described={**ASYMMETRIC_V2.described, "format": "gptq"})
    refused(tmp_path, "QH-C73", "checkpoint_format is 'gptq_v2' in config.json", "format is 'gptq' in config.json")


def test_what_one_description_leaves_out_the_other_says(tmp_path: Path) -> None:
    silent = {key: value for key, value in ASYMMETRIC_V2.described.items() if key != "checkpoint_format"}
    decoded = write_checkpoint(tmp_path, ASYMMETRIC_V2, described={**silent, "format": None})
    (tmp_path / "quantize_config.json").write_text(json.dumps(ASYMMETRIC_V2.described))
    with opened(tmp_path) as trainer:
        assert np.array_equal(trainer.dequantized_weight(MODULE).astype(np.float64), decoded[MODULE])


@pytest.mark.parametrize("size", ["64", 0, -5, 64.0, True])
def test_a_group_size_that_is_no_number_of_inputs_is_refused(size: object, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind(64), described={**Kind(64).described, "group_size": size})
    refused(tmp_path, "QH-C73", f"group_size holds {size!r}")


@pytest.mark.fault("C73")
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("written", "told", "zero"),
    [(V2, "gptq", 9), (V2, None, 9), (V1, "gptq_v2", 7)],  # without the key a checkpoint is v1
)
def test_symmetric_zero_points_off_the_middle_tell_another_format(
    written: ZeroPointConvention, told: str | None, zero: int, act_order: bool, tmp_path: Path
) -> None:
    """Decoded all the same, every weight would be one step off."""
    kind = Kind(convention=written, act_order=act_order)
    described = {**kind.described, "checkpoint_format": told}
    write_checkpoint(tmp_path, kind, described={key: value for key, value in described.items() if value is not None})
    words = (f"its qzeros hold {zero} as checkpoint_format {told or 'gptq'}", f"as {written.value} they would hold 8")
    refused(tmp_path, "QH-C73", "sym: true", *words)


def test_asymmetric_zero_points_under_a_symmetric_description_are_refused(tmp_path: Path) -> None:
    kind = Kind(symmetric=False)
    write_checkpoint(tmp_path, kind, described={**kind.described, "sym": True})
    refused(tmp_path, "QH-C73", "with sym: true every zero point is 8")


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_description_without_sym_takes_nothing_for_granted(symmetric: bool, tmp_path: Path) -> None:
    kind = Kind(symmetric=symmetric)
    described = {key: value for key, value in kind.described.items() if key != "sym"}
    decoded = write_checkpoint(tmp_path, kind, described=described)
    with opened(tmp_path) as trainer:
        assert np.array_equal(trainer.dequantized_weight(MODULE).astype(np.float64), decoded[MODULE])


@pytest.mark.parametrize("bits", [2, 3])
def test_other_widths_than_four_and_eight_bits_are_refused(bits: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind(), described={**Kind().described, "bits": bits})
    refused(tmp_path, "QH-C72", f"in {bits} bits")


@pytest.mark.parametrize("told", [{"is_marlin_format": True}, {"checkpoint_format": "marlin"}])
def test_a_checkpoint_packed_for_marlin_is_refused(told: dict[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind(), described={**Kind().described, **told})
    refused(tmp_path, "QH-C72", "Marlin kernel only")


def test_marlins_own_tensors_are_known(tmp_path: Path) -> None:
    changed: dict[str, Any] = {}
    for module in linear_shapes(SHAPE):
        changed |= {f"{module}.{part}": None for part in PARTS}
        changed |= {f"{module}.B": np.zeros((8, 8), np.int32), f"{module}.s": np.ones((2, 8), np.float16)}
    write_checkpoint(tmp_path, Kind(), changed=changed)
    refused(tmp_path, "QH-C72", "Marlin kernel only")


@pytest.mark.parametrize("layout", ["gptq_p", "exl2"])
def test_another_layout_is_refused(layout: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind(), described={**Kind().described, "checkpoint_format": layout})
    refused(tmp_path, "QH-C72", layout)


def test_a_quantized_head_is_refused(tmp_path: Path) -> None:
    parts: dict[str, Any] = {
        "lm_head.qweight": np.zeros((SHAPE.hidden_size // 8, SHAPE.vocab_size), np.int32),
        "lm_head.qzeros": np.zeros((SHAPE.hidden_size // 64, SHAPE.vocab_size // 8), np.int32),
        "lm_head.scales": np.ones((SHAPE.hidden_size // 64, SHAPE.vocab_size), np.float16),
        "lm_head.g_idx": (np.arange(SHAPE.hidden_size) // 64).astype(np.int32),
        "lm_head.weight": None,
    }
    write_checkpoint(tmp_path, Kind(64), changed=parts)
    refused(tmp_path, "QH-C72", "lm_head: false")


@pytest.mark.fault("C17")
def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind(), config_file="quantize_config.json")
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-128g.bin")
    with pytest.raises(UnsafeInputError) as raised:
        source_of(tmp_path)
    assert (raised.value.code, raised.value.exit_status) == ("QH-C17", 10)
    assert f"qlora-hal unpickle {tmp_path}" in raised.value.fix


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4096])
    refused(tmp_path, "QH-C01")


@pytest.mark.fault("N15")
@pytest.mark.parametrize("kernel", ["marlin", "exllama"])
def test_an_inference_kernel_in_the_options_is_refused_at_load(kernel: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind())
    refused(tmp_path, "QH-N15", kernel, "trainable are: torch", kind=UnsupportedFeatureError, kernel=kernel)


def test_an_engine_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind())
    refused(tmp_path, "QH-E60", "auto-gptq is not installed", kind=UnsupportedFeatureError, engine="auto_gptq")


def test_another_group_size_than_the_stored_one_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind(64))
    with pytest.raises(ConfigError, match="128 was requested") as raised:
        checked_settings(source_of(tmp_path), Quantization(WeightFormat.INT4_GPTQ, 128))
    assert raised.value.code == "QH-U11"


def test_weights_that_are_not_quantized_are_refused_by_the_trainer(tmp_path: Path) -> None:
    from qlora_hal.demo import model_path
    from qlora_hal_backends.gptq_int4.trainer import open_trainer

    with open_trainer() as trainer, pytest.raises(UnsupportedFeatureError, match="quantize_on_load"):
        trainer.load(source_of(model_path()), Quantization(WeightFormat.INT4_GPTQ, 128), Compute("float32"))


def test_an_unknown_description_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind(), config_file="quantize_config.json")
    (tmp_path / "quantize_config.json").unlink()
    refused(tmp_path, "QH-C73", "neither quantization_config nor quantize_config.json")
    assert not json.loads((tmp_path / "config.json").read_text()).get("quantization_config")


def test_storage_of_a_checkpoint_is_its_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Kind(32))
    assert storage_of(source_of(tmp_path)).block_size == 32
