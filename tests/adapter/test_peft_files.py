"""Our adapter folders are PEFT's, both ways, and everything plain LoRA does not have is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from qlora_hal.adapter import initial_adapter, read_adapter, read_provenance, resolve_targets, write_adapter
from qlora_hal.contract.values import Adapter, AdapterConfig, LinearShape
from qlora_hal.errors import AdapterError, QloraHalError, StorageError, UnsafeInputError

MODULES = {f"model.layers.{n}.self_attn.{leaf}": LinearShape(32, 16) for n in range(2) for leaf in ("q_proj", "v_proj")}
PROVENANCE = {"weight_format": "nf4", "block_size": 64, "base_fingerprint": "ab" * 32, "versions": {"numpy": "2"}}


def an_adapter(*targets: str, r: int = 4, alpha: float = 8.0, use_rslora: bool = False) -> Adapter:
    config = AdapterConfig(r, alpha, 0.05, use_rslora, resolve_targets(targets or ("q_proj",), MODULES))
    adapter = initial_adapter(config, MODULES, seed=1)
    random = np.random.default_rng(0)
    return Adapter({k: random.standard_normal(t.shape, dtype=np.float32) for k, t in adapter.tensors.items()}, config)


def write(folder: Path, adapter: Adapter, **changes: Any) -> Path:
    arguments: dict[str, Any] = {"base_name": "org/base", "base_revision": "abc", "provenance": PROVENANCE} | changes
    write_adapter(folder, adapter, **arguments)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_comes_back_bit_for_bit(tmp_path: Path, use_rslora: bool) -> None:
    adapter = an_adapter(r=3, alpha=4.5, use_rslora=use_rslora)
    found = read_adapter(write(tmp_path / "a", adapter))
    assert found.config == adapter.config
    assert {k: v.tobytes() for k, v in found.tensors.items()} == {k: v.tobytes() for k, v in adapter.tensors.items()}


def test_equal_input_gives_equal_bytes_in_every_file(tmp_path: Path) -> None:
    adapter = an_adapter()
    shuffled = Adapter(dict(reversed(list(adapter.tensors.items()))), adapter.config)
    first = write(tmp_path / "a", adapter)
    second = write(tmp_path / "b", shuffled, provenance=dict(reversed(PROVENANCE.items())))
    names = {"adapter_model.safetensors", "adapter_config.json", "qlora_hal.json", "README.md"}
    assert {p.name for p in first.iterdir()} == names
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_provenance_and_card_say_what_the_adapter_was_made_with(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", an_adapter(), base_name="/home/someone/models/base-7b")
    assert read_provenance(folder) == {
        **PROVENANCE,
        "base_name": "/home/someone/models/base-7b",
        "base_revision": "abc",
    }
    card = (folder / "README.md").read_text()
    assert "| weight_format | nf4 |" in card
    assert "| block_size | 64 |" in card
    assert "someone" not in card


def test_a_folder_is_replaced_as_a_whole_but_never_one_with_foreign_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", an_adapter())
    write(folder, an_adapter("v_proj"))
    assert read_adapter(folder).config == an_adapter("v_proj").config
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    (folder / "thesis.txt").write_text("x")
    with pytest.raises(StorageError, match=r"thesis\.txt") as refused:
        write(folder, an_adapter())
    assert (refused.value.code, refused.value.exit_status) == ("QH-S14", 8)


@pytest.mark.parametrize(
    ("targets", "written"),
    [(("q_proj",), ["q_proj"]), (("layers.0.self_attn.q_proj",), ["model.layers.0.self_attn.q_proj"])],
)
def test_target_modules_are_as_short_as_is_exact(tmp_path: Path, targets: tuple[str, ...], written: list[str]) -> None:
    folder = write(tmp_path / "a", an_adapter(*targets), linear_modules=MODULES)
    assert json.loads((folder / "adapter_config.json").read_bytes())["target_modules"] == written


UNSUPPORTED: dict[str, object] = {
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "use_dora": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "lora_bias": True,
    "fan_in_fan_out": True,
    "layer_replication": [[0, 1]],
    "target_parameters": ["experts"],
    "trainable_token_indices": [1],
    "init_lora_weights": "pissa",
    "a_field_of_next_year": 1,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_setting_beyond_plain_lora_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "a", an_adapter())
    edit_config(folder, **{name: UNSUPPORTED[name]})
    with pytest.raises(AdapterError, match=f"1 setting beyond plain LoRA: {name}=") as refused:
        read_adapter(folder)
    assert (refused.value.code, refused.value.exit_status) == ("QH-C51", 5)


def test_all_unsupported_settings_are_named_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", an_adapter())
    edit_config(folder, **UNSUPPORTED)
    with pytest.raises(AdapterError) as refused:
        read_adapter(folder)
    assert sorted(refused.value.context["unsupported"]) == sorted(UNSUPPORTED)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"}, {"r": 0}, {"r": "4"}, {"r": True}, {"lora_alpha": -1}, {"lora_alpha": None},
        {"lora_dropout": 1.0}, {"lora_dropout": "0"}, {"use_rslora": "yes"},
    ],
)  # fmt: skip
def test_a_wrong_field_is_refused_with_what_is_expected(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = write(tmp_path / "a", an_adapter())
    edit_config(folder, **changes)
    with pytest.raises(AdapterError, match=f"{next(iter(changes))} .*expected") as refused:
        read_adapter(folder)
    assert refused.value.code == "QH-C50"


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b'{"r":1,"r":2}', b'{"r":NaN}', b"{" * 99999, b"\xff", b'{"r":' + b"9" * 5000]
)
def test_a_config_that_is_not_strict_json_is_refused(tmp_path: Path, raw: bytes) -> None:
    folder = write(tmp_path / "a", an_adapter())
    (folder / "adapter_config.json").write_bytes(raw)
    with pytest.raises(AdapterError, match=r"adapter_config\.json is not valid JSON") as refused:
        read_adapter(folder)
    assert refused.value.code == "QH-C50"


@pytest.mark.fault("C08")
def test_another_tools_names_match_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", an_adapter())
    mlx = {"model.layers.0.self_attn.q_proj.lora_a": np.zeros((32, 4), np.float32)}
    save_file(mlx, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="0 of 1 tensors matched") as refused:
        read_adapter(folder)
    assert (refused.value.code, refused.value.exit_status) == ("QH-C08", 5)


@pytest.mark.fault("C09")
def test_extra_and_half_modules_are_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", an_adapter())
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    tensors["base_model.model.lm_head.weight"] = np.zeros((4, 4), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="1 unexpected tensors, 1 missing") as refused:
        read_adapter(folder)
    assert refused.value.code == "QH-C09"
    assert "lm_head" in refused.value.message


@pytest.mark.fault("C09")
def test_tensors_of_another_rank_than_stated_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", an_adapter(r=4))
    edit_config(folder, r=8)
    with pytest.raises(AdapterError, match="4 of 4 tensors are not of rank 8") as refused:
        read_adapter(folder)
    assert refused.value.code == "QH-C09"


@pytest.mark.fault("C11")
def test_float16_tensors_become_float32_and_float64_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", an_adapter())
    (folder / "qlora_hal.json").unlink()  # of another tool
    tensors = load_file(folder / "adapter_model.safetensors")
    halves = {k: t.astype(np.float16) for k, t in tensors.items()}
    save_file(halves, folder / "adapter_model.safetensors")
    found = read_adapter(folder).tensors
    assert all(
        np.array_equal(found[k], t.astype(np.float32)) and found[k].dtype == np.float32 for k, t in halves.items()
    )
    save_file({k: t.astype(np.float64) for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="without loss") as refused:
        read_adapter(folder)
    assert refused.value.code == "QH-C11"


@pytest.mark.fault("C01")
def test_a_truncated_adapter_is_refused_with_sizes(tmp_path: Path) -> None:
    path = write(tmp_path / "a", an_adapter()) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterError, match=r"has \d+ bytes, its header promises \d+") as refused:
        read_adapter(path.parent)
    assert (refused.value.code, refused.value.exit_status) == ("QH-C01", 5)


@pytest.mark.fault("C17")
def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", an_adapter())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UnsafeInputError, match="pickle") as refused:
        read_adapter(folder)
    assert (refused.value.code, refused.value.exit_status) == ("QH-C17", 10)


@pytest.mark.fault("X02")
def test_auto_mapping_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "canary_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = write(tmp_path / "a", an_adapter())
    edit_config(folder, auto_mapping={"parent_library": "canary_module", "base_model_class": "X"})
    assert read_adapter(folder).config.r == 4


def test_an_absent_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter_config\.json cannot be read") as refused:
        read_adapter(tmp_path)
    assert refused.value.code == "QH-C50"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["r", "lora_alpha", "lora_dropout", "use_rslora", "peft_type", "target_modules", "bias", "rank_pattern", "x"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), raw=st.none() | st.binary(max_size=100))
def test_any_config_gives_an_adapter_or_our_error(tmp_path: Path, changes: dict[str, Any], raw: bytes | None) -> None:
    folder = tmp_path / "a"
    if not folder.exists():
        write(folder, an_adapter())
        (folder / "adapter_config.json").rename(tmp_path / "whole.json")
    (folder / "adapter_config.json").write_bytes((tmp_path / "whole.json").read_bytes())
    edit_config(folder, **changes)
    if raw is not None:
        (folder / "adapter_config.json").write_bytes(raw)
    try:
        adapter = read_adapter(folder)
    except QloraHalError as refused:
        code = refused.code
    else:
        assert adapter.config.r == 4
        assert np.isfinite(adapter.config.scale)
        return
    assert code in ("QH-C50", "QH-C51", "QH-C09", "QH-C22")  # the last: sound, and not what was written here


def test_the_card_of_a_4_bit_run_opens_the_base_that_it_was_trained_on(tmp_path: Path) -> None:
    made = {**PROVENANCE, "weight_format": "nf4", "block_size": 64, "double_quant": True, "compute_dtype": "bfloat16"}
    card = (write(tmp_path / "a", an_adapter(), base_name="org/base", provenance=made) / "README.md").read_text()
    (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    assert 'bnb_4bit_quant_type="nf4"' in code
    assert "bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16" in code
    assert 'from_pretrained("org/base", quantization_config=four_bit)' in code
    compile(code, "card", "exec")
    for other in ({"weight_format": "none", "block_size": None}, {"block_size": 128}):
        folder = write(tmp_path / "b", an_adapter(), provenance={**made, **other})
        assert "BitsAndBytesConfig" not in (folder / "README.md").read_text()


# adapter_config.json against the tensors ------------------------------------------------------------------------------
@pytest.mark.fault("C09")
@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({"target_modules": ["q_proj"]}, ["v_proj", "v_proj"]),
        ({"target_modules": r".*layers\.0\..*q_proj"}, ["q_proj", "v_proj", "v_proj"]),
        ({"exclude_modules": ["v_proj"]}, ["v_proj", "v_proj"]),
        ({"exclude_modules": r".*\.1\..*"}, ["q_proj", "v_proj"]),
        ({"layers_to_transform": [0]}, ["q_proj", "v_proj"]),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, ["q_proj", "v_proj"]),
        ({"target_modules": []}, ["q_proj", "v_proj"] * 2),
    ],
)
def test_tensors_that_the_configuration_leaves_out_are_refused_by_name(
    changes: dict[str, Any], left_out: list[str], tmp_path: Path
) -> None:
    """PEFT would not use them: merged, they would be something that it does not compute."""
    folder = write(tmp_path / "a", an_adapter("q_proj", "v_proj"), linear_modules=MODULES)
    edit_config(folder, **changes)
    with pytest.raises(AdapterError, match=f"{len(left_out)} of 4 modules") as refused:
        read_adapter(folder)
    assert refused.value.code == "QH-C09"
    found = refused.value.context["left_out"]
    assert sorted(name.rpartition(".")[2] for name in found) == sorted(left_out)  # type: ignore[attr-defined]
    assert all(name in str(refused.value) for name in found)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear"},
        {"target_modules": None},  # PEFT then goes by the kind of model
        {"target_modules": ["q_proj", "v_proj", "o_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"layers_to_transform": [1, 0], "layers_pattern": ["layers", "blocks"]},
        {"layers_to_transform": []},
        {"exclude_modules": ["lm_head"]},
    ],
)
def test_a_configuration_that_means_all_the_tensors_is_read(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "a", an_adapter("q_proj", "v_proj"), linear_modules=MODULES)
    edit_config(folder, **changes)
    assert read_adapter(folder).config == an_adapter("q_proj", "v_proj").config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": 7}, "names or an expression"),
        ({"target_modules": ["q_proj", 7]}, "names or an expression"),
        ({"target_modules": "(q_proj"}, "no regular expression"),
        ({"target_modules": "x{99999999999}"}, "no regular expression"),
        ({"target_modules": "(" * 5000 + ")" * 5000}, "no regular expression"),
        ({"target_modules": "([a-z._0-9]+)+X"}, "takes more than 2 s"),
        ({"exclude_modules": ".*" * 14 + "X"}, "takes more than 2 s"),
        ({"target_modules": "(.|.)" * 30 + "X"}, "takes more than 2 s"),
        ({"layers_to_transform": ["0"]}, "layer numbers"),
        ({"layers_pattern": "(a+)+"}, "names such as layers"),
    ],
)
def test_fields_that_choose_modules_in_another_form_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "a", an_adapter("q_proj", "v_proj"), linear_modules=MODULES)
    edit_config(folder, **changes)
    with pytest.raises(AdapterError, match=words) as refused:
        read_adapter(folder)
    assert refused.value.code == "QH-C50"
