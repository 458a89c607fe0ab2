"""A merged folder has the chat templates that its model was trained with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from trainers import source_of

from qlora_hal.data.tokens.tokenizer_files import chat_templates
from qlora_hal.demo import model_path
from qlora_hal.errors import DataError
from qlora_hal.export.folder import chat_template_of, write_configuration


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The demo's model with a template for tools in a file of its own, and something else beside it."""
    folder = Path(shutil.copytree(model_path(), tmp_path / "base"))
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("with tools")
    (more / "notes.txt").write_text("no template")
    return folder


def test_templates_beside_the_default_one_come_along(base: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    write_configuration(tmp_path / "merged", source_of(base), "bfloat16", None)
    assert chat_templates(tmp_path / "merged") == chat_templates(base)
    assert chat_templates(base)["tool_use"] == "with tools"
    assert [path.name for path in (tmp_path / "merged" / "additional_chat_templates").iterdir()] == ["tool_use.jinja"]


def test_a_template_that_the_run_named_is_the_only_one(base: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    template = chat_template_of("tool_use", base)
    assert template == "with tools"
    write_configuration(tmp_path / "merged", source_of(base), "bfloat16", template)
    assert chat_templates(tmp_path / "merged") == {"default": "with tools"}


def test_a_template_is_found_as_the_run_found_it(base: Path, tmp_path: Path) -> None:
    assert chat_template_of(None, base) is None
    assert "<|im_start|>" in str(chat_template_of("chatml", base))
    (tmp_path / "mine.jinja").write_bytes("\ufeffmine".encode())
    assert chat_template_of(str(tmp_path / "mine.jinja"), base) == "mine"
    config = json.loads((base / "tokenizer_config.json").read_text())
    shutil.rmtree(base / "additional_chat_templates")
    (base / "chat_template.jinja").unlink()
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": {"rag": "with texts"}}))
    assert chat_template_of("rag", base) == "with texts"
    with pytest.raises(DataError, match=r"QH-D12.*no chat template 'tool_use'"):
        chat_template_of("tool_use", base)
