"""A key of another tool that is typed as a setting is answered in its own words."""

from __future__ import annotations

import pytest

from qlora_hal.config.other_tools.hints import foreign_key_hint
from qlora_hal.config.resolve import resolve_settings
from qlora_hal.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("micro_batch_size", "training.per_device_train_batch_size"),
        ("--training.micro-batch-size", "training.per_device_train_batch_size"),
        ("num_layers", "The last so many layers"),
        ("neftune_noise_alpha", "no place here"),
    ],
)
def test_a_known_key_says_what_it_is_here(key: str, said: str) -> None:
    assert said in (foreign_key_hint(key) or "")


def test_an_unknown_key_says_nothing() -> None:
    assert foreign_key_hint("frobnicate") is None


def test_a_key_without_a_place_is_answered_where_settings_are_read() -> None:
    with pytest.raises(ConfigError, match="NEFTune adds noise to embeddings"):
        resolve_settings({"neftune_noise_alpha": 5}, environ={})


@pytest.mark.parametrize(
    ("key", "setting"), [("evals_per_epoch", "training.eval_steps"), ("saves_per_epoch", "checkpoint.save_steps")]
)
def test_a_number_in_an_epoch_is_not_taken_for_a_number_of_steps(key: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"set {setting} to the steps of an epoch / the number"):
        resolve_settings({key: 4}, environ={})
