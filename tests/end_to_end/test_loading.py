"""`qlora_hal.load`: a run, an adapter, a merged folder or a base, open for questions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, merged, small_run

from qlora_hal import TrainResult, load, merge, train
from qlora_hal.cli.__main__ import main
from qlora_hal.data import ChatTokenizer
from qlora_hal.demo import model_path
from qlora_hal.errors import ConfigError, DataError
from qlora_hal.run.samples import prompt_tokens

pytestmark = pytest.mark.usefixtures("usual_signals")

ASKED = "What does tail do?"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    folder = tmp_path_factory.mktemp("loading")
    return small_run(folder / "run", {"training.max_steps": 3, "data.max_seq_length": 64})


@pytest.mark.slow
def test_a_run_answers_as_the_command_does(run: TrainResult, capsys: pytest.CaptureFixture[str]) -> None:
    with load(run.run_dir) as model:
        tuned, base = model.generate(ASKED, max_new_tokens=8), model.generate(ASKED, max_new_tokens=8, adapter=False)
        assert model.generate([{"role": "user", "content": ASKED}], max_new_tokens=8) == tuned
        chat = model.chat(system="Be brief.")
        first = chat.ask(ASKED, max_new_tokens=4)
        assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
        assert chat.messages[-1]["content"] == first
    capsys.readouterr()
    main(["generate", "--run", str(run.run_dir), "--prompt", ASKED, "--max-new-tokens", "8"])
    assert capsys.readouterr().out == f"base:    {base}\nadapter: {tuned}\n"


@pytest.mark.slow
@pytest.mark.fault("U42")
def test_a_closed_model_says_so_and_another_one_goes_on(run: TrainResult) -> None:
    first, second = load(run.run_dir), load(run.run_dir)
    answer = first.generate(ASKED, max_new_tokens=4)
    first.close()
    first.close()
    with pytest.raises(ConfigError, match=r"QH-U42.*is closed"):
        first.generate(ASKED)
    with second:
        assert second.generate(ASKED, max_new_tokens=4) == answer


@pytest.mark.slow
def test_a_run_of_plain_text_is_asked_as_its_rows_were_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt wrapped in a template that no row had is another question, and was answered with nonsense."""
    rows = [
        {"prompt": "The capital of Freedonia is", "completion": " Fredville."},
        {"prompt": "Freedonia pays with the", "completion": " crown."},
    ]
    changes = {
        "training.max_steps": 24,
        "training.learning_rate": 3e-3,
        "training.sample_prompts": [rows[0]["prompt"]],
        "output_dir": str(tmp_path / "run"),
    }
    settings = merged(SMALL, changes)
    del settings["data"]
    result = train(settings, rows * 8)
    with load(result.run_dir) as model:
        assert model.plain
        answered = model.generate(rows[0]["prompt"], max_new_tokens=8)
    assert answered == "Fredville."
    assert result.samples[0]["after"] == answered
    main(["generate", "--run", str(result.run_dir), "--prompt", rows[1]["prompt"], "--max-new-tokens", "8"])
    told = capsys.readouterr()
    assert told.out.endswith("adapter: crown.\n")
    assert "without the chat template; prompts are taken so, too" in told.err


def test_a_conversation_is_read_as_those_of_rows_are() -> None:
    tokenizer = ChatTokenizer.from_folder(model_path())
    asked = prompt_tokens(tokenizer, [{"role": "user", "content": ASKED}])
    assert asked == prompt_tokens(tokenizer, ASKED)
    assert asked == prompt_tokens(tokenizer, [{"from": "human", "value": ASKED}])
    assert asked == prompt_tokens(tokenizer, [{"role": "user", "content": [{"type": "text", "text": ASKED}]}])


@pytest.mark.fault("D03", "D12")
@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ([{"role": "usr", "content": ASKED}], "QH-D12"),
        ([{"role": "user"}], "QH-D03"),
        ([ASKED], "QH-D03"),
        ([], "QH-D03"),
        (5, "QH-D03"),
    ],
)
def test_a_conversation_that_is_none_is_refused_and_not_answered(prompt: Any, code: str) -> None:
    with pytest.raises(DataError, match=code):
        prompt_tokens(ChatTokenizer.from_folder(model_path()), prompt)


def test_a_plain_prompt_is_opened_as_rows_of_text_are() -> None:
    tokenizer = ChatTokenizer.from_folder(model_path())
    asked = prompt_tokens(tokenizer, "A tool", plain=True)
    assert asked == [*tokenizer.opening_ids, *tokenizer.encode("A tool")]
    assert len(tokenizer.opening_ids) == 1
    assert asked != prompt_tokens(tokenizer, "A tool")


@pytest.mark.slow
def test_an_adapter_alone_needs_its_base_named(run: TrainResult, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run.adapter_dir, tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=r"QH-U14.*an adapter without its run") as caught:
        load(alone)
    assert caught.value.fix == "Name it: load(adapter, model=NAME_OR_PATH)."
    with load(run.run_dir) as whole, load(alone, model=model_path()) as given, load(run.adapter_dir) as inside:
        answers = {model.generate(ASKED, max_new_tokens=8) for model in (whole, given, inside)}
    assert len(answers) == 1


@pytest.mark.slow
def test_bases_and_merged_folders_open_as_their_files_have_them(run: TrainResult, tmp_path: Path) -> None:
    whole = merge(run.run_dir, tmp_path / "merged", dtype="float32", quiet=True)
    with load(whole.path) as model, load(run.run_dir) as tuned:
        assert model.generate(ASKED, max_new_tokens=8) == tuned.generate(ASKED, max_new_tokens=8)
        with pytest.raises(ConfigError, match=r"QH-U42.*opened without one"):
            model.generate(ASKED, adapter=True)
        with pytest.raises(ConfigError, match=r"QH-U42.*max_new_tokens is 0"):
            model.generate(ASKED, max_new_tokens=0)
        with pytest.raises(ConfigError, match=r"QH-U42.*max_new_tokens is '3'; a whole number"):
            model.generate(ASKED, max_new_tokens="3")  # type: ignore[arg-type]
    with load(model_path(), weight_format="nf4") as base, load(run.run_dir) as tuned:
        assert base.generate(ASKED, max_new_tokens=8) == tuned.generate(ASKED, max_new_tokens=8, adapter=False)


@pytest.mark.fault("U42")
def test_options_without_meaning_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"QH-U42.*weight_format means nothing here: .* is opened as it was trained"):
        load(tmp_path, weight_format="nf4")
    with pytest.raises(ConfigError, match=r"QH-U42.*model means nothing here: .* is a model"):
        load(model_path(), model="other")
