"""There and back gives the same bits, names and settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from qlora_hal.adapter import read_adapter, read_mlx_adapter, write_mlx_adapter
from qlora_hal.adapter.mlx_reading import _alpha
from qlora_hal.contract.values import Adapter, AdapterConfig
from qlora_hal.errors import AdapterError
from qlora_hal.export.converting import convert_adapter
from qlora_hal.model.facts import read_facts
from tests.adapter_mlx.both_tools import random_adapter, save_for_peft, train_in_mlx


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("choices", [{}, {"use_rslora": True}, {"r": 3, "alpha": 0.7}, {"r": 7, "alpha": 16.0}])
@pytest.mark.parametrize("targets", ["all-linear", ("layers.0.self_attn.q_proj", "layers.2.mlp.up_proj")])
def test_from_peft_to_mlx_and_back_is_the_same_folder(
    tmp_path: Path, llama: Path, targets: str | tuple[str, ...], choices: dict[str, Any]
) -> None:
    peft = save_for_peft(tmp_path / "peft", random_adapter(llama, targets, **choices), llama)
    convert_adapter(peft, tmp_path / "mlx", to="mlx")
    convert_adapter(tmp_path / "mlx", tmp_path / "back", to="peft")
    before, after = read_adapter(peft), read_adapter(tmp_path / "back")
    assert after.config == before.config
    assert files(tmp_path / "back")["adapter_model.safetensors"] == files(peft)["adapter_model.safetensors"]
    assert json.loads(files(tmp_path / "back")["qlora_hal.json"]) == json.loads(files(peft)["qlora_hal.json"])


def _flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "adapters.safetensors").read_bytes())
    content[-3] ^= 0x40
    (folder / "adapters.safetensors").write_bytes(content)


def _scale_otherwise(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_bytes())
    config["lora_parameters"]["scale"] *= 2
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _rename_the_run(folder: Path) -> None:
    record = json.loads((folder / "qlora_hal.json").read_bytes())
    (folder / "qlora_hal.json").write_text(json.dumps({**record, "run_id": "another"}))


@pytest.mark.fault("C22")
@pytest.mark.parametrize("change", [_flip_a_bit, _scale_otherwise, _rename_the_run])
def test_what_was_changed_after_it_was_converted_is_not_converted_back(
    tmp_path: Path, llama: Path, change: Callable[[Path], None]
) -> None:
    """It would get a new hash, and with it the name of the run that it no longer comes from."""
    peft = save_for_peft(tmp_path / "peft", random_adapter(llama, "all-linear"), llama)
    convert_adapter(peft, tmp_path / "mlx", to="mlx")
    change(tmp_path / "mlx")
    with pytest.raises(AdapterError, match="changed after it was written") as raised:
        convert_adapter(tmp_path / "mlx", tmp_path / "back", to="peft")
    assert raised.value.code == "QH-C22"
    assert not (tmp_path / "back").exists()
    (tmp_path / "mlx" / "qlora_hal.json").unlink()  # the change was intended
    convert_adapter(tmp_path / "mlx", tmp_path / "back", to="peft")


def test_from_mlx_to_peft_and_back_gives_mlx_lm_the_same_bits(tmp_path: Path, llama: Path) -> None:
    trained = train_in_mlx(llama, tmp_path / "mlx", num_layers=2, rank=8, scale=20.0)
    convert_adapter(trained, tmp_path / "peft", to="peft")
    convert_adapter(tmp_path / "peft", tmp_path / "back", to="mlx")
    before, after = (load_file(folder / "adapters.safetensors") for folder in (trained, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    old, new = (json.loads((folder / "adapter_config.json").read_bytes()) for folder in (trained, tmp_path / "back"))
    assert new["lora_parameters"]["scale"] == old["lora_parameters"]["scale"] == 20.0
    assert new["model"] == old["model"]


def test_both_ways_of_naming_modules_mean_the_same(tmp_path: Path, llama: Path) -> None:
    modules = read_facts(llama).linear_modules
    adapter = random_adapter(llama, tuple(name for name in modules if ".2." in name or ".1." in name))
    for folder, known in (("short", modules), ("long", None)):
        write_mlx_adapter(
            tmp_path / folder, adapter, base_name="b", base_revision=None, provenance={}, linear_modules=known
        )
    short, long = (json.loads(files(tmp_path / name)["adapter_config.json"]) for name in ("short", "long"))
    assert short["num_layers"] == 2
    assert short["lora_parameters"]["keys"] == sorted({name.split(".", 3)[3] for name in modules})
    assert long["num_layers"] == -1  # every layer may be looked at; only full paths match
    assert long["lora_parameters"]["keys"] == sorted(adapter.config.target_modules)
    assert files(tmp_path / "short")["adapters.safetensors"] == files(tmp_path / "long")["adapters.safetensors"]


def test_writing_twice_gives_equal_bytes(tmp_path: Path, llama: Path) -> None:
    adapter = random_adapter(llama)
    for folder in ("one", "two"):
        write_mlx_adapter(tmp_path / folder, adapter, base_name="b", base_revision="c", provenance={"step": 2})
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_an_adapter_in_sixteen_bits_becomes_float32_exactly(tmp_path: Path, llama: Path, dtype: mx.Dtype) -> None:
    trained = train_in_mlx(llama, tmp_path / "mlx", num_layers=1)
    stored = {name: tensor.astype(dtype) for name, tensor in mx.load(str(trained / "adapters.safetensors")).items()}
    mx.save_safetensors(str(trained / "adapters.safetensors"), stored)
    found = read_mlx_adapter(trained).tensors
    for name, tensor in stored.items():
        module, half = name.rsplit(".lora_", 1)
        key = f"base_model.model.{module}.lora_{half.upper()}.weight"
        assert found[key].dtype == np.float32
        assert np.array_equal(found[key].T, np.array(tensor.astype(mx.float32)))


def test_a_changed_scale_counts_once_nothing_vouches_for_the_old_one(tmp_path: Path, llama: Path) -> None:
    adapter = random_adapter(llama, use_rslora=True)
    write_mlx_adapter(tmp_path / "mlx", adapter, base_name="b", base_revision=None, provenance={})
    assert read_mlx_adapter(tmp_path / "mlx").config == adapter.config
    path = tmp_path / "mlx" / "adapter_config.json"
    config = json.loads(path.read_bytes())
    config["lora_parameters"]["scale"] = 2.0
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"(?s)QH-C22.*remove qlora_hal\.json"):
        read_mlx_adapter(tmp_path / "mlx")
    (tmp_path / "mlx" / "qlora_hal.json").unlink()
    assert read_mlx_adapter(tmp_path / "mlx").config.scale == 2.0
    assert not read_mlx_adapter(tmp_path / "mlx").config.use_rslora


@given(st.floats(1e-3, 1e3), st.integers(1, 512))
def test_alpha_gives_the_scale_back_to_the_last_bit_or_the_one_before(scale: float, rank: int) -> None:
    again = AdapterConfig(rank, _alpha(scale, rank)).scale
    # alpha and alpha / r are each rounded once: 2 u of the scale at most, which is one unit in its last place.
    assert abs(again - scale) <= 2.0**-52 * scale
    if rank & (rank - 1) == 0:
        assert again == scale


@pytest.mark.parametrize("alpha", [6, 6.0, None])
def test_an_alpha_that_changes_nothing_leaves_the_scale_its_meaning(tmp_path: Path, llama: Path, alpha: object) -> None:
    """scale * alpha / rank and the scale alone are the same number."""
    trained = train_in_mlx(llama, tmp_path / "mlx", num_layers=1)
    path = trained / "adapter_config.json"
    config = json.loads(path.read_bytes())
    config["lora_parameters"]["alpha"] = alpha
    path.write_text(json.dumps(config))
    # Off by a unit in the last place at most, as above.
    assert read_mlx_adapter(trained).config.scale == pytest.approx(config["lora_parameters"]["scale"], rel=2.0**-52)


def test_tensors_are_written_transposed_not_as_views(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    b = np.arange(8, dtype=np.float32).reshape(4, 2)
    names = (f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight")
    adapter = Adapter(dict(zip(names, (a, b), strict=True)), AdapterConfig(2, 4.0, target_modules=(module,)))
    write_mlx_adapter(tmp_path / "mlx", adapter, base_name="b", base_revision=None, provenance={})
    stored = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert np.array_equal(stored[f"{module}.lora_a"], a.T)
    assert np.array_equal(stored[f"{module}.lora_b"], b.T)
