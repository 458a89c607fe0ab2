"""One row, prepared with a template, beside what transformers writes for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from data.chat_templates.conversations import (
    SPECIAL,
    Message,
    Prepare,
    Render,
    Rendered,
    Trained,
)

from qlora_hal.data import ChatTokenizer


@pytest.fixture(scope="session")
def base(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder without a template; its special tokens are those of several families."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(folders["bare"] / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    folder = tmp_path_factory.mktemp("base")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def render(base: Path, tmp_path: Path, prepared: Prepare, trained_text: Trained) -> Render:
    """Prepare one row with a template (or what tokenizer_config.json holds in its place), as transformers reads it."""

    def run(
        template: object,
        messages: Sequence[Message],
        tools: Sequence[object] | None = None,
        *,
        eos: str = "<|im_end|>",
        ends: Sequence[str] = (),
        files: Mapping[str, str] | None = None,
        chosen: str | None = None,
        **settings: object,
    ) -> Rendered:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": "<|endoftext|>"}
        if template is not None:
            config["chat_template"] = template  # type: ignore[assignment]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        for name, text in (files or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        if ends:
            numbers = ChatTokenizer.from_folder(folder).special.ids
            ids = [numbers[token] for token in ends]
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        tokenizer = ChatTokenizer.from_folder(folder, chat_template=chosen)
        row = {"messages": list(messages), **({"tools": tools} if tools is not None else {})}
        data = prepared([row], tokenizer=tokenizer, **settings)
        ids = data.train.row(0)[0].tolist()

        def theirs(given: Sequence[Message] = messages, **more: object) -> Any:
            from transformers import AutoTokenizer

            loaded: Any = AutoTokenizer.from_pretrained(str(folder))
            return loaded.apply_chat_template(list(given), tools=tools, return_dict=False, **more)

        text = tokenizer.decode(ids, skip_special_tokens=False)
        return Rendered(data, text, trained_text(data, tokenizer), ids, theirs)

    return run
