"""Tiny bases that transformers and mlx-lm both open."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_models import write_model

import qlora_hal.demo

THREE_LAYERS = 3
DEMO_VOCABULARY = 4096


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama") / "base", num_hidden_layers=THREE_LAYERS)


@pytest.fixture(scope="session")
def talking_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the demo's tokenizer, as `mlx_lm.load` wants one."""
    folder = write_model(tmp_path_factory.mktemp("talking") / "base", vocab_size=DEMO_VOCABULARY, eos_token_id=1)
    demo = Path(qlora_hal.demo.__file__).parent / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(demo / name, folder / name)
    return folder
