"""What has no exact counterpart is refused by name, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import qlora_hal
from qlora_hal.errors import AdapterError, ConfigError, QloraHalError, StorageError, UnsafeInputError
from qlora_hal.export.converting import convert_adapter
from qlora_hal.model.source import resolve_model
from tests.adapter_mlx.both_tools import random_adapter, save_for_peft, train_in_mlx

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Edit = Callable[[Path], None]


def refused(source: Path, out: Path, to: Any, **more: Any) -> QloraHalError:
    with pytest.raises(QloraHalError) as refusal:
        convert_adapter(source, out, to=to, **more)
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    return refusal.value


def edited(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_bytes())
        config.update({name: value for name, value in changes.items() if name != "lora_parameters"})
        config["lora_parameters"].update(changes.get("lora_parameters", {}))
        path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))

    return edit


def with_tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "adapters.safetensors"
        save_file(change(load_file(path)), path)

    return edit


Q = "model.layers.2.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "code", "words"),
    [
        (edited(fine_tune_type="dora"), "QH-C51", "fine_tune_type='dora'"),
        (edited(fine_tune_type="full"), "QH-C51", "fine_tune_type='full'"),
        (edited(use_dora=True), "QH-C51", "use_dora=True"),
        (edited(lora_parameters={"rslora": True, "bias": "all"}), "QH-C51", "2 settings .*bias='all'.*rslora"),
        # scale * alpha / rank in early versions of mlx-lm, the scale alone in later ones, which wrote an idle alpha.
        (edited(lora_parameters={"alpha": 12, "scale": 10.0}), "QH-C51", "multiplied by 20 or by 10, depending"),
        (edited(lora_parameters={"alpha": 12.0, "scale": 10}), "QH-C51", "multiplied by 20 or by 10, depending"),
        (edited(lora_parameters={"alpha": 3, "scale": 1.5}), "QH-C51", "multiplied by 0.75 or by 1.5"),
        (edited(num_layers="absent", lora_layers=2, lora_parameters={"alpha": 12, "scale": 10.0}), "QH-C51", "by 20 o"),
        (edited(lora_parameters={"alpha": "16"}), "QH-C50", "alpha = '16', a positive number"),
        (edited(lora_parameters={"alpha": -1}), "QH-C50", "alpha = -1"),
        (edited(lora_parameters={"alpha": True}), "QH-C50", "alpha = True"),
        (edited(lora_parameters={"scale": None}), "QH-C50", "scale = None, a positive number"),
        (edited(lora_parameters={"scale": -1.0}), "QH-C50", "scale = -1.0"),
        (edited(lora_parameters={"rank": 0}), "QH-C50", "rank = 0"),
        (edited(lora_parameters={"dropout": 1.0}), "QH-C50", "dropout = 1.0"),
        (edited(lora_parameters={"rank": 4}), "QH-C09", "14 of 14 tensors are not of rank 4"),
        (with_tensors(lambda t: {**t, f"{Q}.m": np.ones(64, np.float32)}), "QH-C09", r"1 are unexpected.*q_proj\.m"),
        (with_tensors(lambda t: {n: v for n, v in t.items() if n != f"{Q}.lora_b"}), "QH-C09", "1 modules are incomp"),
        (with_tensors(lambda t: {"model.norm.weight": np.ones(4, np.float32)}), "QH-C08", "1 are unexpected"),
        (with_tensors(lambda t: {n: np.stack([v, v]) for n, v in t.items()}), "QH-C09", r"\[2, 64, 6\]"),
        (
            with_tensors(lambda t: {**t, f"{Q}.lora_a": t[f"{Q}.lora_a"][:, :3], f"{Q}.lora_b": t[f"{Q}.lora_b"][:3]}),
            "QH-C09",
            "2 of 14 tensors are not of rank 6",
        ),
        (with_tensors(lambda t: {n: v.astype(np.float64) for n, v in t.items()}), "QH-C11", "F64"),
        (
            with_tensors(lambda t: {n.replace("model.layers", "language_model.model.layers"): v for n, v in t.items()}),
            "QH-C65",
            "7 of 7 modules have no known counterpart",
        ),
        (
            with_tensors(lambda t: {**t, **{n.replace(Q, "lm_head"): v for n, v in t.items() if Q in n}}),
            "QH-C65",
            "'lm_head'",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text('{"lora_parameters": 3}'), "QH-C50", "an object"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"a": NaN}'), "QH-C50", "not valid JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "QH-C50", "neither peft_type nor lora_par"),
        (lambda folder: (folder / "adapters.safetensors").unlink(), "QH-C50", "adapters.safetensors is missing"),
    ],
)  # fmt: skip
def test_an_adapter_of_mlx_lm_that_is_not_plain_lora_is_refused(
    tmp_path: Path, llama: Path, edit: Edit, code: str, words: str
) -> None:
    trained = train_in_mlx(llama, tmp_path / "mlx", num_layers=1)
    edit(trained)
    error = refused(trained, tmp_path / "out", "peft")
    assert isinstance(error, AdapterError)
    assert error.code == code
    assert error.exit_status == 5
    with pytest.raises(AdapterError, match=words):
        raise error


def test_a_fused_model_is_told_from_an_adapter(tmp_path: Path, llama: Path) -> None:
    trained = train_in_mlx(llama, tmp_path / "mlx", num_layers=1)
    (trained / "adapters.safetensors").rename(trained / "model.safetensors")
    assert "perhaps a fused one" in str(refused(trained, tmp_path / "out", "peft"))


def test_a_malformed_header_is_refused_for_safety(tmp_path: Path, llama: Path) -> None:
    trained = train_in_mlx(llama, tmp_path / "mlx", num_layers=1)
    (trained / "adapters.safetensors").write_bytes(b"\xff" * 64)
    assert isinstance(refused(trained, tmp_path / "out", "peft"), UnsafeInputError | AdapterError)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
    ],
)
def test_an_adapter_of_peft_that_is_not_plain_lora_is_refused(
    tmp_path: Path, llama: Path, settings: dict[str, Any], words: str
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(str(llama))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "peft"))
    error = refused(tmp_path / "peft", tmp_path / "out", "mlx")
    assert error.code == "QH-C51"
    assert words in error.message


@pytest.mark.parametrize("layers", [["q_proj"], []])
def test_an_adapter_on_the_head_has_no_place_in_mlx_lm(tmp_path: Path, llama: Path, layers: list[str]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(str(llama))
    config = peft.LoraConfig(r=4, target_modules=["lm_head", *layers], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    error = refused(tmp_path / "peft", tmp_path / "out", "mlx")
    assert error.code == "QH-C65"
    assert error.context["modules"] == ["lm_head"]


@pytest.mark.fault("C09")
def test_an_adapter_of_another_shape_is_refused_when_its_model_is_named(tmp_path: Path, llama: Path) -> None:
    trained = train_in_mlx(llama, tmp_path / "mlx", num_layers=1)
    with_tensors(lambda t: {n: v[:32] if n.endswith("lora_a") else v for n, v in t.items()})(trained)
    source = resolve_model(str(llama), revision=None, trust_remote_code=False)
    assert refused(trained, tmp_path / "out", "peft", model=source).code == "QH-C09"
    assert convert_adapter(trained, tmp_path / "unchecked", to="peft").notes[0].startswith("Names and shapes were not")


@pytest.mark.fault("U53")
def test_a_layout_the_adapter_has_already_is_refused(tmp_path: Path, llama: Path) -> None:
    peft_folder = save_for_peft(tmp_path / "peft", random_adapter(llama), llama)
    error = refused(peft_folder, tmp_path / "out", "peft")
    assert isinstance(error, ConfigError)
    assert error.code == "QH-U53"
    assert error.exit_status == 2
    assert "--to mlx" in error.fix


@pytest.mark.fault("S14")
@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_a_place_that_is_taken_is_left_alone(tmp_path: Path, llama: Path, kind: str) -> None:
    source = save_for_peft(tmp_path / "peft", random_adapter(llama), llama)
    out = tmp_path / "out"
    {"folder": out.mkdir, "file": out.touch, "dangling link": lambda: out.symlink_to(tmp_path / "gone")}[kind]()
    with pytest.raises(StorageError, match="already exists") as refusal:
        convert_adapter(source, out, to="mlx")
    assert refusal.value.code == "QH-S14"
    assert not (out / "adapters.safetensors").exists()


def test_nothing_is_left_where_the_folder_cannot_be_written(tmp_path: Path, llama: Path) -> None:
    source = save_for_peft(tmp_path / "peft", random_adapter(llama), llama)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError) as refusal:
        convert_adapter(source, tmp_path / "file" / "out", to="mlx")
    assert refusal.value.code == "QH-S11"


def test_a_base_of_another_kind_is_noted(tmp_path: Path, llama: Path) -> None:
    from dataclasses import replace

    source = resolve_model(str(llama), revision=None, trust_remote_code=False)
    unknown = replace(source, facts=replace(source.facts, model_type="newer"))
    trained = train_in_mlx(llama, tmp_path / "mlx", num_layers=3)
    done = convert_adapter(trained, tmp_path / "out", to="peft", model=unknown)
    assert any("Module names of newer were not compared" in note for note in done.notes)
    assert mx.load(str(trained / "adapters.safetensors"))


def merge(folder: Path, **more: Any) -> object:
    return qlora_hal.merge(folder, folder.with_name("merged"), **more)


@pytest.mark.parametrize("opened", [qlora_hal.load, merge], ids=["load", "merge"])
def test_an_adapter_of_mlx_lm_is_opened_after_a_conversion_that_is_named(
    opened: Callable[..., object], tmp_path: Path, llama: Path
) -> None:
    trained = train_in_mlx(llama, tmp_path / "mlx", num_layers=1)
    with pytest.raises(AdapterError, match="is an adapter in mlx-lm's layout") as refusal:
        opened(trained, model=llama)
    assert refusal.value.fix.endswith(f"qlora-hal adapter convert {trained} {trained}-peft --to peft")
