"""Published templates: the row's ids are those of transformers, and turns are whole."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
from data.chat_templates.conversations import (
    ASKED,
    DRY,
    END,
    THINKING,
    Render,
    parts,
    said,
)


def _published() -> dict[str, str]:
    """The chat templates that transformers' own code holds."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    found = {}
    for name in ("llama4", "qwen2_audio", "smolvlm"):
        path = Path(spec.origin).parent / "models" / name / f"processing_{name}.py"
        for node in ast.walk(ast.parse(path.read_text("utf-8"))) if path.is_file() else ():
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "in messages %}" in node.value:
                found[name] = node.value
    return found


@pytest.mark.parametrize("name", sorted(_published()))
def test_published_templates_give_the_ids_of_transformers_and_whole_turns(name: str, render: Render) -> None:
    messages = [said(m["role"], parts(m["content"])) for m in (said("system", "Brief."), *THINKING[2:], ASKED, DRY)]
    eos = {"llama4": "<|eot|>", "smolvlm": "<end_of_utterance>"}.get(name, END)
    found = render(_published()[name], messages, eos=eos)
    assert found.ids == found.theirs(tokenize=True)
    assert len(found.trained) == 2
    assert [text in part for text, part in zip(("See you.", "No, it is dry."), found.trained, strict=True)] == [
        True
    ] * 2
    assert not any("Brief" in part or "Bye" in part or "ssistant" in part for part in found.trained)
