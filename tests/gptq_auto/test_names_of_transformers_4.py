"""A config.json of transformers 5 in the names that transformers 4 reads."""

from __future__ import annotations

import pytest

from qlora_hal.errors import ModelError
from qlora_hal_backends.torch_family.transformers_versions import older_names

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
