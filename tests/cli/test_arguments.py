"""Spelling of flags."""

from __future__ import annotations

import pytest

from qlora_hal.cli.arguments import canonical
from qlora_hal.errors import ConfigError


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--training.learning-rate", "1"], ["--training.learning_rate", "1"]),
        (["--output-dir=a-b"], ["--output_dir=a-b"]),
        (["--dry_run"], ["--dry-run"]),
        (["--data.packing", "false"], ["--data.packing=false"]),
        (["--data.packing", "Yes", "x"], ["--data.packing=yes", "x"]),
        (["--data.packing", "--lora.r", "1"], ["--data.packing", "--lora.r", "1"]),
        (["--data.packing"], ["--data.packing"]),
        (["--dry-run", "false"], ["--dry-run=false"]),
        (["--double_quant", "True", "out"], ["--double-quant=True", "out"]),
        (["--quiet", "no", "out"], ["--quiet", "no", "out"]),
        (["--prompt", "True"], ["--prompt=True"]),
        (["--", "--dry-run", "false"], ["--", "--dry-run", "false"]),
        (["--data.packing", "run.yaml"], ["--data.packing", "run.yaml"]),
        (["--backend.options.use-it", "1"], ["--backend.options.use-it", "1"]),
        (["--lora.r", "false"], ["--lora.r", "false"]),
        (["--prompt", "a_b-c"], ["--prompt", "a_b-c"]),
        (["--", "--dry_run"], ["--", "--dry_run"]),
    ],
)
def test_dashes_and_underscores_mean_the_same_and_yes_no_flags_take_a_value(typed: list[str], meant: list[str]) -> None:
    assert canonical(typed) == meant


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lora.target_modules q_proj v_proj", "--lora.target_modules q_proj --lora.target_modules v_proj"),
        ("--training.report_to=wandb mlflow", "--training.report_to=wandb --training.report_to mlflow"),
        (
            "--training.sample-prompts a b --lora.r 1",
            "--training.sample_prompts a --training.sample_prompts b --lora.r 1",
        ),
        ("--lora.target_modules q_proj run.yaml", "--lora.target_modules q_proj run.yaml"),
        ("run.toml --lora.target_modules q_proj", "run.toml --lora.target_modules q_proj"),
        ("--data rows.jsonl run.yaml", "--data rows.jsonl run.yaml"),
        ("--dry-run run.yaml", "--dry-run run.yaml"),
        ("--lora.target_modules q_proj -- v_proj", "--lora.target_modules q_proj -- v_proj"),
        ("--backend.options.a 1", "--backend.options.a 1"),
    ],
)
def test_a_flag_that_takes_a_list_takes_several_values(typed: str, meant: str) -> None:
    assert canonical(["train", *typed.split()]) == ["train", *meant.split()]


@pytest.mark.fault("U04")
@pytest.mark.parametrize(
    ("typed", "second"),
    [
        ("--training.learning_rate 1e-4 2e-4", "2e-4"),
        ("--data a.jsonl b.jsonl", "b.jsonl"),
        ("--model.name_or_path=a b", "b"),
        ("--data.packing true false", "false"),
        ("run.yaml --lora.r 8 16 32", "16"),
    ],
)
def test_a_second_value_of_a_setting_that_takes_one_is_named(typed: str, second: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        canonical(["train", *typed.split()])
    assert refusal.value.code == "QH-U04"
    assert f"takes one value; {second!r}" in refusal.value.message


def test_words_of_other_commands_are_left_where_they_stand() -> None:
    words = ["merge", "--model", "m", "runs/a", "merged"]
    assert canonical(words) == words
