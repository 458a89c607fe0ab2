"""A prompt and its answer stay within the model's positions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, merged, small_run

from qlora_hal import train
from qlora_hal.cli.__main__ import main
from qlora_hal.contract.checked_trainer import CheckedTrainer
from qlora_hal.data import ChatTokenizer
from qlora_hal.demo import model_path
from qlora_hal.errors import ConfigError
from qlora_hal.inference.loaded_model import LoadedModel
from qlora_hal.run.samples import prompt_tokens


class Lengths:
    """A trainer that answers with nothing and remembers for how many tokens it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def generate(self, prompt: Any, *, max_new_tokens: int, stop_tokens: Sequence[int], adapter: bool) -> Any:
        self.asked.append(max_new_tokens)
        return prompt[:0]


def asked_for(words: int, positions: int, max_new_tokens: int) -> list[int]:
    trainer = Lengths()
    pair = LoadedModel(trainer, ChatTokenizer.from_folder(model_path()), positions)  # type: ignore[arg-type]
    pair.answer([{"role": "user", "content": "ls " * words}], max_new_tokens=max_new_tokens)
    return trainer.asked


def test_an_answer_ends_where_the_positions_do() -> None:
    tokenizer = ChatTokenizer.from_folder(model_path())
    taken = len(prompt_tokens(tokenizer, "ls " * 5))
    assert asked_for(5, taken + 3, 64) == [3, 3]
    assert asked_for(5, taken + 64, 64) == [64, 64]


@pytest.mark.fault("U19")
def test_a_prompt_that_leaves_no_position_is_refused_with_both_numbers() -> None:
    tokenizer = ChatTokenizer.from_folder(model_path())
    taken = len(prompt_tokens(tokenizer, "ls " * 50))
    with pytest.raises(ConfigError, match=f"{taken} tokens; this model has positions up to {taken}") as caught:
        asked_for(50, taken, 1)
    assert (caught.value.code, caught.value.exit_status) == ("QH-U19", 2)


LONG = "ls " * 5000


def never(*given: object, **named: object) -> None:
    raise AssertionError("the model was loaded")


@pytest.mark.slow
@pytest.mark.fault("U19")
def test_what_is_too_long_is_found_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(tmp_path / "run", {"training.max_steps": 1}).run_dir
    monkeypatch.setattr(CheckedTrainer, "load", never)
    assert main(["generate", "--run", str(run), "--prompt", LONG]) == 2
    assert "error[QH-U19]" in capsys.readouterr().err
    prompts = {"training.sample_prompts": ["ls", LONG], "output_dir": str(tmp_path / "other")}
    with pytest.raises(ConfigError) as refused:
        train(merged(SMALL, prompts))
    assert (refused.value.code, refused.value.where) == ("QH-U19", "training.sample_prompts[1]")


@pytest.mark.slow
def test_samples_of_a_run_end_where_the_positions_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    generated = CheckedTrainer.generate

    def remembered(self: CheckedTrainer, prompt: Any, *, max_new_tokens: int, **named: Any) -> Any:
        asked.append((len(prompt), max_new_tokens))
        return generated(self, prompt, max_new_tokens=max_new_tokens, **named)

    monkeypatch.setattr(CheckedTrainer, "generate", remembered)
    positions = json.loads((model_path() / "config.json").read_text())["max_position_embeddings"]
    tokenizer = ChatTokenizer.from_folder(model_path())
    words = next(
        number for number in range(positions) if len(prompt_tokens(tokenizer, "ls " * number)) > positions - 20
    )
    small_run(tmp_path / "run", {"training.max_steps": 1, "training.sample_prompts": ["ls " * words]})
    assert asked
    assert all(taken + most <= positions for taken, most in asked)
