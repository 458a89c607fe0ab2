"""`qlora-hal init --from`: the file that it writes, and that train accepts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from other_tools.conftest import BY_TOOL, FILES

from qlora_hal.cli.__main__ import main
from qlora_hal.config.other_tools.importing import imported
from qlora_hal.config.resolve import resolve_settings
from qlora_hal.demo import data_path, model_path


@pytest.mark.parametrize("name", BY_TOOL.values())
@pytest.mark.parametrize("written", ["run.yaml", "run.toml"])
def test_the_written_file_holds_what_was_read_and_names_every_key(tmp_path: Path, name: str, written: str) -> None:
    file = tmp_path / written
    assert main(["init", str(file), "--from", str(FILES / name)]) == 0
    made = imported(FILES / name)
    values = resolve_settings(file, environ={}).values()
    for path, value in made.settings.items():
        assert values[path] == (tuple(value) if isinstance(value, list) else value)
    text = file.read_text(encoding="utf-8")
    keys = [*(line.key for line in made.lines), *made.unset, *made.unknown]
    assert [key for key in keys if key not in text] == []
    assert (tmp_path / "qlora-hal.schema.json").is_file()


@pytest.mark.slow
def test_a_dry_run_accepts_the_written_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(data_path("train").read_text(encoding="utf-8").splitlines(keepends=True)[:40]))
    text = (FILES / "axolotl.yml").read_text(encoding="utf-8")
    text = text.replace("NousResearch/Llama-3.2-1B", str(model_path())).replace("teknium/GPT4-LLM-Cleaned", str(rows))
    theirs = tmp_path / "theirs.yml"
    theirs.write_text(
        text.replace("type: alpaca", "type: chat_template").replace("2048", "128").replace("8bit", "fused")
    )
    ours = tmp_path / "run.yaml"
    assert main(["init", str(ours), "--from", str(theirs)]) == 0
    dry = ["train", str(ours), "--dry-run", "--json", "--backend", "cpu_torch", "--output_dir", str(tmp_path / "run")]
    capsys.readouterr()
    assert main(dry) == 0
    assert json.loads(capsys.readouterr().out)["weight_format"] == "nf4"


def test_a_file_that_is_there_is_kept_and_a_line_break_in_a_value_ends_no_comment(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.yml"
    theirs.write_text('base_model: a/b\nlr_scheduler: "x\\noutput_dir: /etc"\n"y\\nlora: {r: 1}": 2\n')
    ours = tmp_path / "run.yaml"
    assert main(["init", str(ours), "--from", str(theirs)]) == 0
    before = ours.read_bytes()
    config = resolve_settings(ours, environ={}).config
    assert (config.lora.r, config.output_dir) == (16, "runs/first")
    assert main(["init", str(ours), "--from", str(theirs)]) == 2
    assert ours.read_bytes() == before


def test_a_tool_without_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "-", "--from-tool", "axolotl"]) == 2
    assert "QH-U04" in capsys.readouterr().err


@pytest.mark.parametrize("written", ["run.yaml", "run.toml"])
def test_several_data_sets_and_columns_are_written_in_either_format(tmp_path: Path, written: str) -> None:
    theirs = tmp_path / "theirs.yml"
    theirs.write_text(
        "base_model: a/b\nadapter: lora\ndatasets: [{path: 'x: y/ü z', field_messages: talk}, {path: c/d}]\n"
    )
    ours = tmp_path / written
    assert main(["init", str(ours), "--from", str(theirs)]) == 0
    first, second = resolve_settings(ours, environ={}).config.data.sources
    assert (first.path, first.columns, second.path) == ("x: y/ü z", {"messages": "talk"}, "c/d")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "model_name_or_path: a/b\nuse_peft: true\nhub_token: {0}\nenv: {{HF_TOKEN: {0}}}\n"),
        ("b.yaml", "model_name_or_path: a/b\nstage: sft\nhf_hub_token: {0}\nadapter_name_or_path: https://u:{0}@x/y\n"),
        (
            "c.py",
            "FastLanguageModel.from_pretrained('a/b', token='{0}')\nSFTConfig(hub_token=f('{0}'), deepspeed='{0}')\n",
        ),
    ],
)
def test_no_secret_is_carried_along(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str) -> None:
    secret = "hf_" + "aB3" * 11
    (tmp_path / name).write_text(text.format(secret))
    assert main(["init", str(tmp_path / "run.yaml"), "--from", str(tmp_path / name)]) == 0
    told = capsys.readouterr()
    assert secret not in (tmp_path / "run.yaml").read_text() + told.out + told.err


@pytest.mark.parametrize("written", ["run.yaml", "run.toml"])
def test_marks_that_no_file_may_hold_are_escaped(tmp_path: Path, written: str) -> None:
    theirs = tmp_path / "theirs.json"
    odd = "a\u2028b\x7f\u202e\x1b[31m\u0085😀"
    theirs.write_text(
        json.dumps({"base_model": "a/b", "adapter": "lora", "output_dir": odd, "lr_scheduler": odd, odd: 1})
    )
    ours = tmp_path / written
    assert main(["init", str(ours), "--from", str(theirs)]) == 0
    assert resolve_settings(ours, environ={}).config.output_dir == odd
