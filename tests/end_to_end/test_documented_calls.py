"""The Python that README.md, docs/python.md and docs/data.md show works as it stands there, with the demo's model and
two steps in the place of what they name. The page's observers are tested in test_steered_runs.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.demo import data_path, model_path

ROOT = Path(__file__).resolve().parents[2]
HERE = {
    '"meta-llama/Llama-3.1-8B"': "model_here",
    '"path/to/model"': "model_here",
    "train(...,": 'train(model_here, "chats.jsonl", output_dir="runs/b", max_steps=2,',
    "r=32)": "r=32, max_steps=2)",
    "max_steps=500": "max_steps=2",
    'output_dir="runs/first")': 'output_dir="runs/first", max_steps=2)',
}


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an example finds: the working folder with rows, the demo's model, held-out pairs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_HAL_BACKEND__NAME", "cpu_torch")
    rows = data_path("train").read_text(encoding="utf-8").splitlines(keepends=True)[:40]
    (tmp_path / "chats.jsonl").write_text("".join(rows), encoding="utf-8")
    turns = [json.loads(row)["messages"] for row in rows[:2]]
    return {"model_here": str(model_path()), "held_out": [(user["content"], reply["content"]) for user, reply in turns]}


@pytest.mark.slow
@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize(("page", "count"), [("README.md", 1), ("docs/python.md", 3), ("docs/data.md", 1)])
def test_the_calls_of_a_page_work_one_after_the_other(page: str, count: int, names: dict[str, Any]) -> None:
    shown = examples(page)[:count]
    assert len(shown) == count
    for example in shown:
        for written, meant in HERE.items():
            example = example.replace(written, meant)
        exec(example, names)
    assert list(Path("runs").glob("*/adapter/adapter_model.safetensors"))
