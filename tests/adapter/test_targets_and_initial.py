"""Targets mean what PEFT means by them, and the first adapter is a pure function of seed and name."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

from qlora_hal.adapter import initial_adapter, lora_a_key, lora_b_key, module_of, resolve_targets
from qlora_hal.adapter.targets import shortest_names
from qlora_hal.contract.values import AdapterConfig, LinearShape
from qlora_hal.errors import ConfigError, ModelError

LEAVES = {"self_attn.q_proj": (64, 48), "self_attn.v_proj": (64, 16), "mlp.down_proj": (96, 64)}
MODULES = {f"model.layers.{n}.{leaf}": LinearShape(*size) for n in range(3) for leaf, size in LEAVES.items()}


def test_names_lead_to_their_module_and_back() -> None:
    assert module_of(lora_a_key("model.layers.0.q")) == ("model.layers.0.q", "A")
    assert module_of(lora_b_key("model.layers.0.q")) == ("model.layers.0.q", "B")


@pytest.mark.parametrize(
    "key", ["model.q.lora_A.weight", "base_model.model.q.weight", "base_model.model.lora_A.weight", "q.lora_a", ""]
)
def test_other_names_are_no_lora_tensors(key: str) -> None:
    with pytest.raises(ValueError, match="not a LoRA tensor name"):
        module_of(key)


def test_all_linear_means_every_module() -> None:
    assert resolve_targets("all-linear", MODULES) == tuple(sorted(MODULES))


@pytest.mark.parametrize(
    ("requested", "count"),
    [
        (("q_proj",), 3),
        (("self_attn.q_proj",), 3),
        (("q_proj", "v_proj"), 6),
        (("model.layers.1.mlp.down_proj",), 1),
        ((r".*\.(0|2)\.self_attn\..*"), 4),
        (("q_proj", "model.layers.0.self_attn.q_proj"), 3),
    ],
)
def test_names_match_path_ends_and_strings_are_expressions(requested: str | tuple[str, ...], count: int) -> None:
    assert len(resolve_targets(requested, MODULES)) == count


@pytest.mark.fault("C07")
@pytest.mark.parametrize("requested", [("q_projj", "v_proj"), ("proj",), ("layers.0",), r".*\.k_proj", "q_proj"])
def test_a_target_that_matches_nothing_is_refused_with_names_that_exist(requested: str | tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match=r"The model has: down_proj \(3\), q_proj \(3\), v_proj \(3\)") as refused:
        resolve_targets(requested, MODULES)
    assert (refused.value.code, refused.value.exit_status) == ("QH-C07", 5)
    assert "1 of the requested target modules match no linear layer" in refused.value.message


@pytest.mark.fault("C07")
def test_a_misspelled_target_shows_the_closest_names() -> None:
    with pytest.raises(ModelError, match=r"q_projj \(closest: q_proj") as refused:
        resolve_targets(("q_projj", "v_proj"), MODULES)
    assert refused.value.context["unmatched"] == ["q_projj"]
    with pytest.raises(ModelError) as as_expression:
        resolve_targets("q_proj", MODULES)
    assert "target_modules: [q_proj]" in as_expression.value.fix


@pytest.mark.fault("N13")
@pytest.mark.parametrize(("requested", "modules"), [((), MODULES), ("", MODULES), ("all-linear", {})])
def test_training_nothing_is_refused_with_status_2(
    requested: str | tuple[str, ...], modules: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match="Nothing would be trained") as refused:
        resolve_targets(requested, modules)  # type: ignore[arg-type]
    assert (refused.value.code, refused.value.exit_status) == ("QH-N13", 2)
    with pytest.raises(ConfigError, match="Nothing would be trained"):
        initial_adapter(AdapterConfig(4, 8.0), MODULES, seed=0)


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("(q_proj", "is no regular expression"),
        ("x{99999999999}", "is no regular expression"),
        (r"(([a-z.0-9_]+)+)+X", "takes more than 2 s"),
        (".*" * 14 + "X", "takes more than 2 s"),
    ],
)
def test_a_broken_expression_and_one_without_an_end_are_named(expression: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        resolve_targets(expression, MODULES)
    assert refused.value.code == "QH-S53"


@pytest.mark.parametrize(
    "expression",
    [
        r".*_proj",
        r"(?:.*?(?:language|layers).*?(?:self_attn|attn|mlp|ffn).*?(?:q_proj|v_proj|up_proj).*?)|(?:x\.[\d]{1,}\.y)",
        r"model\.(?!layers\.1)(\w+\.)+(q|v)_proj",
    ],
)
def test_an_expression_chooses_what_pythons_own_chooses(expression: str) -> None:
    expected = tuple(sorted(path for path in MODULES if re.fullmatch(expression, path)))
    assert resolve_targets(expression, MODULES) == expected


def test_leaf_names_are_written_only_where_they_mean_exactly_the_targets() -> None:
    queries = resolve_targets(("q_proj",), MODULES)
    assert shortest_names(queries, MODULES) == ["q_proj"]
    assert shortest_names(queries, None) == sorted(queries)
    assert shortest_names(queries[:1], MODULES) == [queries[0]]


def config(*requested: str) -> AdapterConfig:
    return AdapterConfig(8, 16.0, target_modules=resolve_targets(requested, MODULES))


def test_the_first_adapter_is_uniform_within_its_bound_and_has_no_effect() -> None:
    adapter = initial_adapter(config("q_proj", "down_proj"), MODULES, seed=3)
    assert len(adapter.tensors) == 12
    for key, tensor in adapter.tensors.items():
        module, half = module_of(key)
        fan_in, fan_out = MODULES[module].inputs, MODULES[module].outputs
        assert tensor.dtype == np.float32
        if half == "B":
            assert tensor.shape == (fan_out, 8)
            assert not tensor.any()
            continue
        assert tensor.shape == (8, fan_in)
        bound = fan_in**-0.5
        assert np.abs(tensor).max() <= np.float32(bound)
        # Uniform in +-b: mean 0 and mean square b^2/3, with standard errors b/sqrt(3n) and b^2 sqrt(4/45)/sqrt(n);
        # five of them are passed once in two million draws.
        n = tensor.size
        assert abs(tensor.mean()) < 5 * bound / (3 * n) ** 0.5
        assert abs((tensor.astype(np.float64) ** 2).mean() - bound**2 / 3) < 5 * bound**2 * (4 / 45 / n) ** 0.5


def test_adding_a_module_changes_no_other_tensor() -> None:
    few = initial_adapter(config("q_proj"), MODULES, seed=3).tensors
    many = initial_adapter(config("q_proj", "v_proj", "down_proj"), MODULES, seed=3).tensors
    assert all(np.array_equal(many[key], tensor) for key, tensor in few.items())


def test_every_seed_and_every_name_has_its_own_stream() -> None:
    draws = [initial_adapter(config("q_proj"), MODULES, seed=seed).tensors for seed in (0, 1, 2**63 - 1)]
    firsts = {float(tensor[0, 0]) for tensors in draws for key, tensor in tensors.items() if "lora_A" in key}
    assert len(firsts) == 9


def philox_block(key: tuple[int, int], counter: int) -> list[int]:
    """One block of Philox4x64-10 in plain integers (Salmon et al. 2011, section 3.3 and table 2)."""
    mask = 2**64 - 1
    words, (k0, k1) = [counter, 0, 0, 0], key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [(right >> 64) ^ words[1] ^ k0, right & mask, (left >> 64) ^ words[3] ^ k1, left & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return words


def test_the_stream_is_philox_keyed_by_seed_and_name_whatever_numpy_does() -> None:
    key = lora_a_key("model.layers.0.self_attn.q_proj")
    name_hash = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    blocks = [word for counter in (1, 2) for word in philox_block((42, name_hash), counter)]  # numpy counts from 1
    expected = [np.float32((2 * (word >> 40) / 2**24 - 1) * 64**-0.5) for word in blocks]
    tensor = initial_adapter(config("q_proj"), MODULES, seed=42).tensors[key]
    assert tensor[0, :8].tolist() == [float(value) for value in expected]


@pytest.mark.fault("C07")
def test_a_path_the_model_lacks_is_refused() -> None:
    with pytest.raises(ModelError) as refused:
        initial_adapter(AdapterConfig(4, 8.0, target_modules=("layers.0.self_attn.q_proj",)), MODULES, seed=0)
    assert refused.value.code == "QH-C07"
