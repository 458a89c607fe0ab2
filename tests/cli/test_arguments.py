"""Spelling of flags."""

from __future__ import annotations

import pytest

from qlora_hal.cli.arguments import canonical


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
        (["--data.packing", "run.yaml"], ["--data.packing", "run.yaml"]),
        (["--backend.options.use-it", "1"], ["--backend.options.use-it", "1"]),
        (["--lora.r", "false"], ["--lora.r", "false"]),
        (["--prompt", "a_b-c"], ["--prompt", "a_b-c"]),
        (["--", "--dry_run"], ["--", "--dry_run"]),
    ],
)
def test_dashes_and_underscores_mean_the_same_and_yes_no_flags_take_a_value(typed: list[str], meant: list[str]) -> None:
    assert canonical(typed) == meant
