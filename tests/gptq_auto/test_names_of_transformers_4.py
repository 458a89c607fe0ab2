"""A config.json of transformers 5 in the names that transformers 4 reads."""

from __future__ import annotations

import pytest

from qlora_hal.errors import ModelError
from qlora_hal_backends.torch_family.transformers_versions import older_length, older_names

LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("rotary", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 500.0}, {"rope_theta": 500.0, "rope_scaling": None}),
        ({"rope_theta": 500.0, **LLAMA_3}, {"rope_theta": 500.0, "rope_scaling": LLAMA_3}),
        (
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.5},
        ),
    ],
)
def test_rotary_parameters_get_their_older_names(rotary: dict[str, object], expected: dict[str, object]) -> None:
    assert older_names({"model_type": "llama", "rope_parameters": rotary}, where="here") == expected


def test_config_with_older_names_alone_is_left_as_it_is() -> None:
    assert older_names({"model_type": "llama", "rope_theta": 500.0}, where="here") == {}


@pytest.mark.fault("M51")
@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
        {"text_config": {"rope_parameters": {"rope_theta": 1e6}}},
        {"rope_parameters": "default"},
    ],
)
def test_rotary_parameters_without_an_older_name_are_refused(config: dict[str, object]) -> None:
    """Transformers 4 would take its default theta, and the model would be another one."""
    with pytest.raises(ModelError, match="rope_parameters") as caught:
        older_names(config, where="here")
    assert caught.value.code == "QH-M51"
    assert caught.value.exit_status == 5


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("scaling", [YARN, {**YARN, "type": YARN["rope_type"]}])
def test_yarn_is_stretched_by_the_factor_that_is_written(scaling: dict[str, object]) -> None:
    """transformers 4 takes the longest length over the original one: 2048 / 64 would stretch by 32."""
    config = {"max_position_embeddings": 2048, "rope_scaling": scaling}
    assert older_length(config, where="here") == {"max_position_embeddings": 512}


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, {**YARN, "factor": None}])
def test_length_stays_where_transformers_4_and_5_take_the_same(scaling: object) -> None:
    assert older_length({"max_position_embeddings": 2048, "rope_scaling": scaling}, where="here") == {}


def test_a_factor_that_no_length_gives_is_refused() -> None:
    with pytest.raises(ModelError, match=r"by 8\.01"):
        older_length({"rope_scaling": {**YARN, "factor": 8.01}}, where="here")
