"""The commands of docs/tutorial.md, run as they stand and one after the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_hal.adapter.peft_files import read_adapter

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_command_of_the_tutorial_works_in_turn(tmp_path: Path) -> None:
    blocks = re.findall(r"(?ms)^```sh\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 6
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"adapter: .*Fredville", done.stdout)
    assert (tmp_path / "compare.html").is_file()
    assert (tmp_path / "merged" / "config.json").is_file()
    assert read_adapter(tmp_path / "runs" / "faq" / "adapter").config.r == 16
    assert (tmp_path / "mlx_adapter" / "adapters.safetensors").is_file()
