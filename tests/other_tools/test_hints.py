"""A key of another tool that is typed as a setting is answered in its own words."""

from __future__ import annotations

import json

import pytest
from other_tools.conftest import FILES

from qlora_hal.cli.__main__ import main
from qlora_hal.config.fields import known_by_name, settings
from qlora_hal.config.other_tools.catalogue import TOOLS
from qlora_hal.config.other_tools.hints import hint_for
from qlora_hal.config.other_tools.tables import Tool
from qlora_hal.config.resolve import resolve_settings
from qlora_hal.errors import ConfigError

ARGUMENTS = json.loads((FILES / "arguments.json").read_text(encoding="utf-8"))
"""The names of each tool's arguments, as its release lists them."""


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("micro_batch_size", "training.per_device_train_batch_size"),
        ("--training.micro-batch-size", "training.per_device_train_batch_size"),
        ("num_layers", "by a regular expression over full paths"),
        ("neftune_noise_alpha", "has no place here: NEFTune adds noise"),
        ("flash_attn_cross_entropy", "is not needed here: It is for speed"),
        ("layers_to_transform", "has no place here: Write the layers into an expression"),
        ("lr_schedule.name", "lr_schedule.name of mlx-lm (Constant when there is none) is training.lr_scheduler_type"),
        ("steps_per_save", "steps_per_save of mlx-lm (Micro-batches) is checkpoint.save_steps"),
        ("lora_parameters", "scale (The factor itself: alpha = scale x rank) is lora.alpha"),
    ],
)
def test_a_known_key_says_what_it_is_here(key: str, said: str) -> None:
    hint = hint_for(key)
    assert said in (hint.said or hint.meant)


def test_a_variable_of_the_environment_is_answered_alike() -> None:
    with pytest.raises(ConfigError, match="NEFTune adds noise to embeddings"):
        resolve_settings({}, environ={"QLORA_HAL_TRAINING__NEFTUNE_NOISE_ALPHA": "5"})


def test_an_unknown_key_says_nothing() -> None:
    assert not hint_for("frobnicate")


def is_known(name: str) -> bool:
    """Whether its answer is about this very name, and not about one that is spelled alike."""
    hint = hint_for(name)
    return name in settings() or bool(hint.said) or hint.meant == known_by_name(name)


@pytest.mark.parametrize("tool", ARGUMENTS)
def test_every_argument_of_a_tool_is_answered_with_its_setting_or_its_reason(tool: str) -> None:
    assert [name for name in ARGUMENTS[tool]["names"] if not is_known(name)] == []


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_no_key_of_a_table_is_taken_for_a_setting_that_is_only_spelled_like_it(tool: Tool) -> None:
    assert [name for name in tool.by_name() if not is_known(name)] == []


def test_letters_count_for_a_name_that_no_tool_has() -> None:
    assert hint_for("training.learning_rat").meant == "training.learning_rate"
    assert not is_known("learning_rat")


def test_a_key_without_a_place_is_answered_where_settings_are_read() -> None:
    with pytest.raises(ConfigError, match="NEFTune adds noise to embeddings"):
        resolve_settings({"neftune_noise_alpha": 5}, environ={})


@pytest.mark.parametrize(
    ("key", "setting"), [("evals_per_epoch", "training.eval_steps"), ("saves_per_epoch", "checkpoint.save_steps")]
)
def test_a_number_in_an_epoch_is_not_taken_for_a_number_of_steps(key: str, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"set {setting} to the steps of an epoch / the number"):
        resolve_settings({key: 4}, environ={})


@pytest.mark.parametrize(
    ("flag", "help_begins"), [("--scale", "lora.alpha takes it"), ("--max_memory", "Use --training.memory_limit")]
)
def test_help_begins_with_a_capital_or_with_the_name_of_a_setting(
    flag: str, help_begins: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", flag, "20"]) == 2
    assert f"help:  {help_begins}" in capsys.readouterr().err
