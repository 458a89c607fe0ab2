"""What `--help` prints can be copied: an option's name is never broken, however narrow the terminal."""

from __future__ import annotations

import re

import pytest
from cli.conftest import CommandLine

from qlora_hal.cli.application import VERBS
from qlora_hal.config.fields import settings


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_every_setting_stands_whole_in_the_help_of_train(qlora_hal: CommandLine, columns: int) -> None:
    shown = qlora_hal("train", "--help", COLUMNS=str(columns)).stdout
    words = set(re.findall(r"--[a-z][\w.]*", shown))
    assert {f"--{path}" for path in settings()} <= words
    assert max(map(len, shown.splitlines())) <= columns


@pytest.mark.parametrize("verb", VERBS)
def test_no_line_of_a_help_starts_inside_a_name(qlora_hal: CommandLine, verb: str) -> None:
    shown = qlora_hal(verb, "--help", COLUMNS="80").stdout
    assert "Usage: qlora-hal" in shown
    assert not re.search(r"(?m)^│ +[._][a-z]", shown)
