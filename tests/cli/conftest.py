"""The real command line in a child process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CommandLine = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def qlora_hal(tmp_path: Path) -> CommandLine:
    """Run `qlora-hal ARGS` in an empty folder, with no setting from the caller's environment."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("QLORA_HAL_")}
        kept.update({"NO_COLOR": "1", "COLUMNS": "120", **environment})
        return subprocess.run(
            [sys.executable, "-m", "qlora_hal.cli", *arguments],
            cwd=tmp_path,
            env=kept,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run
