"""An adapter whose adapter_config.json leaves out stored tensors is refused exactly where mlx-lm refuses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from qlora_hal.adapter import read_mlx_adapter, write_mlx_adapter
from qlora_hal.errors import AdapterError
from qlora_hal.model.facts import read_facts
from tests.adapter_mlx.both_tools import random_adapter

Q, GATE = "self_attn.q_proj", "mlp.gate_proj"
PATHS = [f"model.layers.{layer}.{name}" for layer in (1, 2) for name in (Q, GATE)]


@pytest.fixture
def stored(tmp_path: Path, llama: Path) -> Path:
    """Query and gate of the last two of three layers."""
    adapter = random_adapter(llama, tuple(PATHS))
    write_mlx_adapter(tmp_path / "a", adapter, base_name="base", base_revision=None, provenance={})
    return tmp_path / "a"


def describe(folder: Path, **told: object) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_bytes())
    if "keys" in told:
        config["lora_parameters"]["keys"] = told.pop("keys")
    path.write_text(json.dumps({**config, **told}))


def left_out_by_mlx_lm(llama: Path, folder: Path) -> set[str]:
    model, _ = load_model(llama)
    try:
        load_adapters(model, str(folder))
    except ValueError as refusal:
        named = (line.split(":")[0].strip() for line in str(refusal).splitlines()[1:])
        return {name.rpartition(".")[0] for name in named}
    return set()


@pytest.mark.fault("C09")
@pytest.mark.parametrize("num_layers", [-1, 0, 1, 2, 16])
@pytest.mark.parametrize(
    "keys",
    [
        None, [], [Q], [Q, GATE], ["q_proj", "gate_proj"], PATHS, PATHS[:3], [*PATHS[:2], Q, GATE],
        [f"layers.1.{Q}", f"1.{Q}", GATE], [f"{Q} ", Q.upper()],
    ],
)  # fmt: skip
def test_what_mlx_lm_would_leave_out_is_refused_by_name(
    llama: Path, stored: Path, num_layers: int, keys: list[str] | None
) -> None:
    describe(stored, num_layers=num_layers, keys=keys)
    left_out = left_out_by_mlx_lm(llama, stored)
    modules = read_facts(llama).linear_modules
    if not left_out:
        assert read_mlx_adapter(stored, modules).config.target_modules == tuple(sorted(PATHS))
        return
    with pytest.raises(
        AdapterError, match=r"modules have tensors that adapter_config.json leaves out \(num_layers="
    ) as no:
        read_mlx_adapter(stored, modules)
    assert (no.value.code, no.value.context["left_out"]) == ("QH-C09", sorted(left_out))


def test_the_layers_of_a_model_that_is_not_named_reach_at_least_to_the_adapters_last(stored: Path) -> None:
    describe(stored, num_layers=2, keys=[Q, GATE])
    read_mlx_adapter(stored)
    describe(stored, num_layers=1, keys=[Q, GATE])
    with pytest.raises(AdapterError, match=r"num_layers=1") as refusal:
        read_mlx_adapter(stored)
    assert refusal.value.context["left_out"] == sorted(PATHS[:2])


def test_early_files_call_the_number_of_layers_lora_layers(stored: Path) -> None:
    path = stored / "adapter_config.json"
    config = json.loads(path.read_bytes())
    del config["num_layers"]
    config["lora_parameters"]["keys"] = [Q, GATE]
    path.write_text(json.dumps({**config, "lora_layers": 2}))
    read_mlx_adapter(stored)
    path.write_text(json.dumps({**config, "lora_layers": 1}))
    with pytest.raises(AdapterError, match=r"lora_layers=1"):
        read_mlx_adapter(stored)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"keys": Q}, "keys = 'self_attn.q_proj', a list of names"),
        ({"keys": [3]}, "a list of names"),
        ({"num_layers": "2"}, "num_layers = '2', a whole number"),
        ({"num_layers": None}, "num_layers = None, a whole number"),
        ({"num_layers": True}, "a whole number"),
        ({"num_layers": 2.0}, "a whole number"),
    ],
)
def test_fields_of_another_form_are_refused(stored: Path, told: dict[str, Any], words: str) -> None:
    describe(stored, **told)
    with pytest.raises(AdapterError, match=words) as refusal:
        read_mlx_adapter(stored)
    assert refusal.value.code == "QH-C50"
