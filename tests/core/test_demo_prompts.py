"""What `train --demo` shows is true: its prompts are held-out rows that the recorded runs answered right."""

from __future__ import annotations

import json
from pathlib import Path

from qlora_hal.config.demo import demo_settings
from qlora_hal.demo import data_path

RECORD = json.loads((Path(__file__).parents[2] / "docs/runs/demo_answers.json").read_text(encoding="utf-8"))


def prompts() -> tuple[str, ...]:
    chosen = demo_settings()["training.sample_prompts"]
    assert isinstance(chosen, tuple)
    return chosen


def questions(split: str) -> list[str]:
    rows = map(json.loads, data_path(split).read_text(encoding="utf-8").splitlines())
    return [turn["content"] for row in rows for turn in row["messages"] if turn["role"] == "user"]


def test_every_sample_prompt_was_answered_right_after_every_recorded_run() -> None:
    right = {row["asked"]: row["row"] for row in RECORD["right_after_every_run"]}
    assert [right.get(prompt) for prompt in prompts()] == RECORD["sample_prompts"]
    assert len(RECORD["seeds"]) >= 2


def test_sample_prompts_are_held_out_and_each_of_another_kind() -> None:
    assert set(prompts()) <= set(questions("test"))
    assert set(prompts()).isdisjoint([*questions("train"), *questions("validation")])
    kinds = {row["asked"]: row["kind"] for row in RECORD["right_after_every_run"]}
    assert len({kinds[prompt] for prompt in prompts()}) == len(prompts())
