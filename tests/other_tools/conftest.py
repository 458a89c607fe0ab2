"""Files of other tools: their published keys and values, in files of this project."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_hal.config.other_tools.importing import Imported, imported

FILES = Path(__file__).parent / "files"
BY_TOOL = {
    "axolotl": "axolotl.yml",
    "llama-factory": "llama_factory.yaml",
    "mlx-lm": "mlx_lm.yaml",
    "trl": "trl.yaml",
    "unsloth": "unsloth_script.py",
}

Importer = Callable[..., Imported]


@pytest.fixture
def import_text(tmp_path: Path) -> Importer:
    """Import a text as a file of this name."""

    def run(text: str, name: str = "theirs.yaml", tool: str | None = None) -> Imported:
        file = tmp_path / name
        file.write_text(text, encoding="utf-8")
        return imported(file, tool)

    return run
