"""What config.json asks for is computed as transformers computes it, or refused by name before data are read.

All keys of all architectures are compared by `benchmarks/mlx_architectures.py`; these are some of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_models import check_base_logits
from tiny_models import FAMILIES, SMALL_TEXT, edit_config, write_model
from trainers import OpenTrainer, random_batch, source_of

from qlora_hal.errors import ModelError, QloraHalError
from qlora_hal_backends.mlx_lora.outline import outline

pytestmark = pytest.mark.slow

Opened = Callable[..., OpenTrainer]


def refusal(folder: Path) -> QloraHalError:
    """What a dry run ends with."""
    with pytest.raises(ModelError) as caught:
        outline(source_of(folder), {})
    return caught.value


# activations ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "activation"),
    [
        ("starcoder2", "gelu_pytorch_tanh"),  # mlx-lm's is the exact form
        ("gpt_bigcode", "gelu_pytorch_tanh"),
        ("gpt_neox", "gelu"),  # mlx-lm's is the tanh form
        ("phi", "gelu"),
        ("phi3", "gelu_fast"),  # a gate and what it multiplies in one projection
        pytest.param("llama", "quick_gelu", marks=pytest.mark.long),
        pytest.param("nemotron", "silu", marks=pytest.mark.long),
        pytest.param("cohere", "relu2", marks=pytest.mark.long),
    ],
)
def test_the_activation_that_is_asked_for_is_computed(
    family: str, activation: str, tmp_path: Path, opened: Opened
) -> None:
    key = "activation_function" if family == "gpt_bigcode" else "hidden_act"
    folder = write_model(tmp_path, family, **{key: activation})
    check_base_logits(opened(folder), folder, random_batch(0))


@pytest.mark.parametrize(
    ("family", "activation"),
    [
        ("afmoe", "gelu"),
        ("afmoe", "gelu_pytorch_tanh"),
        ("afmoe", "relu2"),
        ("mixtral", "gelu_pytorch_tanh"),
        ("qwen3_moe", "gelu_pytorch_tanh"),
    ],
)
def test_an_activation_of_experts_that_mlx_lm_takes_for_silu_is_refused(
    family: str, activation: str, tmp_path: Path
) -> None:
    error = refusal(write_model(tmp_path, family, hidden_act=activation))
    assert error.code == "QH-M51"
    assert f'hidden_act = "{activation}"' in error.cause


@pytest.mark.parametrize("family", ["ernie4_5_moe"])
def test_another_activation_than_the_usual_is_refused_where_nobody_compared(family: str, tmp_path: Path) -> None:
    error = refusal(write_model(tmp_path, family, hidden_act="gelu_pytorch_tanh"))
    assert error.code == "QH-M51"
    assert "with the activation gelu_pytorch_tanh" in error.message


def test_an_activation_under_a_name_nobody_knows_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    edit_config(folder, hidden_act="xielu_new")
    assert "activation xielu_new" in refusal(folder).message


# rotary position ------------------------------------------------------------------------------------------------------
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0 + 0.1 * pair for pair in range(8)], "long_factor": [2.0 + 0.3 * pair for pair in range(8)],
}  # fmt: skip


@pytest.mark.parametrize("time", [12, 16, 17, 24], ids=lambda time: f"{time}_tokens")
def test_long_rotary_factors_are_taken_by_rows_beyond_the_original_length(
    time: int, tmp_path: Path, opened: Opened
) -> None:
    """The original length is 16 tokens. mlx-lm takes the long factors always."""
    folder = write_model(tmp_path, "phi3", rope_parameters=LONG, original_max_position_embeddings=16)
    check_base_logits(opened(folder), folder, random_batch(0, time=time))


def test_long_rotary_factors_under_the_names_of_published_files(tmp_path: Path, opened: Opened) -> None:
    folder = write_model(tmp_path, "phi3")
    scaling = {"type": "longrope", "short_factor": LONG["short_factor"], "long_factor": LONG["long_factor"]}
    edit_config(
        folder, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling, original_max_position_embeddings=16
    )
    for time in (12, 24):
        check_base_logits(opened(folder), folder, random_batch(0, time=time))


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("starcoder2", {"rope_type": "linear", "factor": 3.0}),  # mlx-lm leaves the scaling out
        ("cohere", YARN),
        ("gpt_neox", {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 16}),
        ("glm", {"rope_type": "default", "partial_rotary_factor": 0.5}),  # mlx-lm rotates whole heads
        ("glm", {**YARN, "partial_rotary_factor": 0.25}),
        ("llama", {**YARN, "attention_factor": 1.5}),
        ("llama", {**YARN, "truncate": False}),
        ("llama", {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 16.0, "beta_slow": 2.0}),
        ("qwen3_moe", LONG),
    ],
    ids=lambda value: value if isinstance(value, str) else value["rope_type"],
)  # fmt: skip
def test_scaled_rotary_positions_are_those_of_transformers(
    family: str, rope: dict[str, Any], tmp_path: Path, opened: Opened
) -> None:
    folder = write_model(tmp_path, family, rope_parameters={"rope_theta": 500.0, **rope})
    check_base_logits(opened(folder), folder, random_batch(1, time=20))


def test_dynamic_rotary_positions_within_the_longest_row_are_those_of_transformers(
    tmp_path: Path, opened: Opened
) -> None:
    """Longer rows are refused (`test_rotary_lengths`)."""
    rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0}
    folder = write_model(tmp_path, "starcoder2", rope_parameters=rope, max_position_embeddings=16)
    check_base_logits(opened(folder), folder, random_batch(1, time=16))


@pytest.mark.parametrize("family", ["gemma3_text", "gemma3"])
def test_kinds_of_layers_rotate_by_their_own_scaling(family: str, tmp_path: Path, opened: Opened) -> None:
    """The larger of Gemma 3 come as part of a model that sees pictures."""
    rope = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
    }
    changes: dict[str, Any] = {"num_hidden_layers": 6, "rope_parameters": rope}
    if family == "gemma3":
        changes = {"text_config": {**SMALL_TEXT, **FAMILIES["gemma3_text"], **changes}}
    folder = write_model(tmp_path, family, **changes)
    check_base_logits(opened(folder), folder, random_batch(1, time=20))


# windows, defaults, multipliers ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),  # a window on every layer, which mlx-lm leaves out
        ("starcoder2", {}),
        ("exaone4", {}),  # transformers writes kinds of layers, mlx-lm reads a pattern of letters
        ("qwen3_moe", {}),  # experts under the names that transformers writes
        ("cohere", {"use_qk_norm": True, "logit_scale": 0.5}),
        ("granite", {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
                     "residual_multiplier": 0.5}),
        ("gemma3_text", {"num_hidden_layers": 6, "hidden_size": 96}),  # a root that bfloat16 rounds
    ],
)  # fmt: skip
def test_what_mlx_lm_reads_otherwise_is_computed_as_transformers_does(
    family: str, changes: dict[str, Any], tmp_path: Path, opened: Opened
) -> None:
    folder = write_model(tmp_path, family, **changes)
    check_base_logits(opened(folder), folder, random_batch(0, time=20))


@pytest.mark.parametrize("key", ["rms_norm_eps", "head_dim", "num_key_value_heads", "rope_parameters"])
def test_a_key_that_is_absent_means_what_it_means_to_transformers(key: str, tmp_path: Path, opened: Opened) -> None:
    """mlx-lm has other defaults, or none."""
    import json

    from transformers import AutoConfig

    default = getattr(AutoConfig.for_model("qwen3"), key)
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32} if key == "num_key_value_heads" else {}
    folder = write_model(tmp_path, "qwen3", **{"head_dim": 8, **heads, key: default})
    config = json.loads((folder / "config.json").read_text())
    config.pop(key)
    (folder / "config.json").write_text(json.dumps(config))
    check_base_logits(opened(folder), folder, random_batch(0))


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = false"),
        ("falcon_h1", {"key_multiplier": 0.3}, "key_multiplier = 0.3"),  # folded into a weight: an adapter misses it
        ("gemma3_text", {"num_hidden_layers": 6, "final_logit_softcapping": 3.0}, "final_logit_softcapping = 3.0"),
        ("cohere2", {"layer_types": ["full_attention"] * 4}, "layer_types = "),
        ("jamba", {}, "something else than transformers"),
    ],
)
def test_what_mlx_lm_leaves_out_is_refused_by_name(
    family: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    error = refusal(write_model(tmp_path, family, **changes))
    assert error.code == "QH-M51"
    assert named in error.cause


@pytest.mark.parametrize(
    ("family", "key", "value"), [("llama", "is_causal", False), ("gemma", "use_bidirectional_attention", True)]
)
def test_attention_to_what_comes_later_is_refused(family: str, key: str, value: bool, tmp_path: Path) -> None:
    """transformers' masks heed the first for every kind of model, its classes declare it for none."""
    folder = write_model(tmp_path, family)
    edit_config(folder, **{key: value})
    problem = refusal(folder)
    assert problem.code == "QH-M51"
    assert problem.message.endswith("ForCausalLM is not a causal language model.")
    assert f"{key} = {str(value).lower()}" in problem.cause


def test_a_config_that_transformers_refuses_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama")
    edit_config(folder, num_attention_heads="four")
    error = refusal(folder)
    assert error.code == "QH-M51"
    assert "num_attention_heads" in error.cause


# keys that transformers does not read ---------------------------------------------------------------------------------
TWO_KINDS = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("family", "beside"),
    [
        ("llama", {"sliding_window": 4}),
        ("llama", {"sliding_window": 4, "layer_types": TWO_KINDS}),
        ("llama", {"rope_traditional": True}),
        ("qwen2", {"rope_traditional": True}),
        ("phi3", {"rope_traditional": True}),
        ("gemma", {"rope_traditional": True}),
        ("gemma2", {"rope_traditional": True, "sliding_window": 64}),
        ("gemma", {"hidden_activation": "silu"}),  # the first Gemma has hidden_act
        ("gemma2", {"hidden_act": "silu", "sliding_window": 64}),  # the second has hidden_activation
    ],
)
def test_a_key_that_transformers_does_not_read_has_no_effect_and_is_told(
    family: str, beside: dict[str, Any], tmp_path: Path, opened: Opened
) -> None:
    folder = write_model(tmp_path, family)
    edit_config(folder, **beside)
    check_base_logits(opened(folder), folder, random_batch(0))
    notes = outline(source_of(folder), {}).notes
    for key in beside.keys() & {"rope_traditional", "layer_types"}:
        assert any(note.startswith(f"config.json has {key} = ") and "no effect" in note for note in notes)


@pytest.mark.parametrize(
    ("family", "beside"),
    [
        ("llama", {"rope_theta": 77.0}),
        ("phi", {"partial_rotary_factor": 1.0}),
        ("phi3", {"partial_rotary_factor": 0.5}),
        ("nemotron", {"partial_rotary_factor": 1.0}),
        ("glm", {"partial_rotary_factor": 1.0}),
        ("gpt_neox", {"rotary_pct": 1.0}),
        ("gpt_neox", {"rotary_emb_base": 77}),
        ("gemma3_text", {"rope_theta": 55.0, "rope_local_base_freq": 33.0}),
    ],
)
def test_an_older_name_beside_rope_parameters_means_what_it_means_to_transformers(
    family: str, beside: dict[str, Any], tmp_path: Path, opened: Opened
) -> None:
    layers = {"num_hidden_layers": 6} if family == "gemma3_text" else {}
    folder = write_model(tmp_path, family, **layers)
    edit_config(folder, **beside)
    check_base_logits(opened(folder), folder, random_batch(0))


def test_a_mistral_with_kinds_of_layers_is_the_ministral_that_transformers_takes_it_for(
    tmp_path: Path, opened: Opened
) -> None:
    folder = write_model(tmp_path, "mistral", sliding_window=4)
    edit_config(folder, layer_types=TWO_KINDS)
    check_base_logits(opened(folder), folder, random_batch(0))


def test_a_key_that_the_code_of_a_model_asks_for_is_read_though_its_configuration_does_not_declare_it() -> None:
    """OLMo 2's `head_dim`."""
    from qlora_hal_backends.mlx_lora.config_reading import keys_read

    assert "head_dim" in (keys_read("olmo2") or ())
    assert "sliding_window" not in (keys_read("llama") or ())
    assert keys_read("of_nobody") is None


def test_a_window_that_mlx_lm_leaves_out_is_told_before_a_row_is_read(tmp_path: Path) -> None:
    notes = outline(source_of(write_model(tmp_path, "gemma2")), {}).notes
    assert any("sliding window of 8 tokens" in note for note in notes)


@pytest.mark.parametrize(("family", "tokens"), [("gemma2", 8), ("mixtral", None)], ids=["some layers", "every layer"])
def test_samples_beyond_a_window_that_is_put_into_the_mask_need_no_limit(
    family: str, tokens: int | None, tmp_path: Path
) -> None:
    """Where all layers have it; else the limit is the window."""
    found = outline(source_of(write_model(tmp_path, family)), {})
    assert (found.longest_sample and found.longest_sample.tokens) == tokens
    assert any("ignores the sliding window" in note for note in found.notes) == (tokens is not None)
