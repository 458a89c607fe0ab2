"""Mistakes that people make with tools of this kind, typed in this process: each is answered with what came in, what
was expected, and one thing to do."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_hal.cli.__main__ import main
from qlora_hal.cli.completed_command import with_completed_command
from qlora_hal.config import habits
from qlora_hal.config.fields import settings
from qlora_hal.detect.discovery import listed, reports
from qlora_hal.detect.selection import backend_to_name
from qlora_hal.errors import BackendUnavailableError

FILES = {
    "run.yaml": "model:\n  name_or_path: model\ndata:\n  path: rows.jsonl\noutput_dir: out\n",
    "rows.jsonl": '{"prompt": "a", "completion": "b"}\n',
    "flat.yaml": "learning_rate: 1e-4\n",
    "group.yaml": "training:\n  r: 8\n",
    "short.yaml": "training:\n  lr: 1e-4\n",
    "axolotl.yaml": "base_model: model\nmicro_batch_size: 2\nlora_target_linear: true\n",
    "factory.yaml": "stage: sft\ncutoff_len: 512\nlora_target: q_proj,v_proj\n",
    "mlx.yaml": "iters: 100\nlora_parameters:\n  scale: 20.0\n",
    "names.yaml": "lora:\n  target_modules: q_proj, v_proj\n",
    "linear.yaml": "lora:\n  target_modules: all_linear\n",
    "colon.yaml": "training:\n  learning_rate 1e-4\n",
    "tab.yaml": "training:\n\tlearning_rate: 1e-4\n",
    "twice.yaml": "training:\n  seed: 1\n  seed: 2\n",
    "listed.yaml": "- training\n",
    "word.yaml": "training:\n  max_steps: ten\n",
    "yes.yaml": "training:\n  learning_rate: yes\n",
    "broken.toml": "[training]\nlearning_rate = 1e-4 # fine\nseed = seven\n",
    "comma.json": '{"training": {"seed": 1,}}\n',
    "notes.txt": "hello\n",
    "rows.xlsx": "rows",
    "pickled/config.json": '{"model_type": "llama"}',
    "pickled/pytorch_model.bin": "pickle",
    "model.gguf": "GGUF",
}


@dataclass(frozen=True)
class Mistake:
    """What is typed, the code and status of the answer, and words of it: what came in, what is expected, what to do."""

    typed: str
    code: str
    status: int
    came: str
    expected: str
    to_do: str


def flag(typed: str, came: str, expected: str, to_do: str) -> Mistake:
    return Mistake(f"train run.yaml {typed}", "QH-U04", 2, came, expected, to_do)


def value(typed: str, came: str, expected: str, to_do: str = "Correct it") -> Mistake:
    return Mistake(f"train run.yaml {typed}", "QH-U01", 2, came, expected, to_do)


def file(typed: str, code: str, came: str, expected: str, to_do: str) -> Mistake:
    return Mistake(f"train {typed}", code, 2, came, expected, to_do)


RATE, A_RATE = "--training.learning_rate", "with a number above 0 and up to 1"
COUNT = "a whole number above 0"
ON_CPU = "--model model --data rows.jsonl --output_dir out --backend cpu_torch"
MISTAKES = [
    # Words of other tools, and of no tool
    flag("--training.lr 1e-4", "--training.lr", "did you mean --training.learning_rate?", A_RATE),
    flag("--lr 1e-4", "--lr is not a flag", RATE, A_RATE),
    flag("--learning_rate 1e-4", "--learning_rate is not a flag", RATE, A_RATE),
    flag("--learning-rate=1e-4", "--learning-rate is not a flag", RATE, A_RATE),
    flag("-lr 1e-4", "-lr is not a flag", RATE, A_RATE),
    flag("-training.learning_rate 1e-4", "-training.learning_rate is not", RATE, A_RATE),
    flag("--training.learning_rat 1e-4", "--training.learning_rat is not", RATE, A_RATE),
    flag("--lora.learning_rate 1e-4", "--lora.learning_rate is not", RATE, A_RATE),
    flag("--training.r 16", "--training.r is not a flag", "did you mean --lora.r?", COUNT),
    flag("--lora_rank 16", "--lora_rank is not a flag", "did you mean --lora.r?", COUNT),
    flag("--lora_alpha 32", "--lora_alpha is not", "did you mean --lora.alpha?", "a number above 0"),
    flag("--bs 4", "--bs is not", "did you mean --training.per_device_train_batch_size?", COUNT),
    flag("--batch-size 4", "--batch-size is not", "--training.per_device_train_batch_size?", COUNT),
    flag("--epochs 3", "--epochs is not", "did you mean --training.num_train_epochs?", "a number above 0"),
    flag("--seq_len 512", "--seq_len is not", "did you mean --data.max_seq_length?", COUNT),
    flag("--dataset rows.jsonl", "--dataset is not", "did you mean --data.path?", "Write --data.path"),
    flag("--load_in_4bit", "--load_in_4bit is not", "write --quantization.weight_format nf4", "weight_format nf4"),
    flag("--bf16 true", "--bf16 is not", "--quantization.compute_dtype bfloat16", "compute_dtype bfloat16"),
    flag("--wandb_project x", "--wandb_project is not", "--training.report_to wandb", "Write"),
    flag("--scale 20", "--scale is not a flag", "lora.alpha takes it times lora.r", "lora.alpha takes it"),
    flag("--resume_from_checkpoint out", "--resume_from_checkpoint is", "qlora-hal resume RUN_DIR", "Go on with"),
    flag("--neftune_noise_alpha 5", "--neftune_noise_alpha is not a flag", "NEFTune adds noise", "Leave it out."),
    flag("--train_on_eos all", "--train_on_eos is not", "Assistant turns are trained whole", "Leave it out."),
    flag("--lora.exclude_modules x", "--lora.exclude_modules is", "Name the modules that get an adapter", "Use --lora"),
    flag("--max_memory 24GB", "--max_memory is not", "Write training.memory_limit", "Use --training.memory_limit, or"),
    flag("--val_batches 25", "--val_batches is not", "All rows that are held out are scored here", "Leave it out."),
    flag("--mask_history true", "--mask_history is", "is data.train_on here", "Write --data.train_on with one of"),
    flag("--dryrun", "--dryrun is not a flag", "did you mean --dry-run?", "Write --dry-run."),
    Mistake("train --config run.yaml", "QH-U04", 2, "--config is not", "without a flag", "qlora-hal train run.yaml"),
    # How a flag is written
    flag("training.seed=1", "training.seed=1 has no dashes", "did you mean --training.seed=1?", "Write --training"),
    flag("--training.seed = 1", "--training.seed = 1 has spaces", "--training.seed=1 is expected", "Write --training"),
    flag("--training.seed", "--training.seed requires", "a whole number from 0", "Write it after --training.seed."),
    flag("--training.seed --dry-run", "--training.seed requires", "a whole number from 0", "Write it after --training"),
    flag("--output_dir --overwrite", "--output_dir requires", "a string is expected", "Write it after --output_dir."),
    flag("--lora.target_modules --dry-run", "--lora.target_modules requires", "is expected", "Write it after"),
    flag("--data rows.jsonl more.jsonl", "'more.jsonl' follows it", "--data takes one value", "remove 'more.jsonl'"),
    flag("--data.packing maybe", "'maybe' follows it", "takes true or false", "Write --data.packing true"),
    flag("extra.yaml", "extra.yaml is one argument too many", "one settings file is expected", "Remove extra.yaml."),
    # Values
    value(f"{RATE} fast", '"fast"', "a number above 0 and up to 1 is expected"),
    value(f"{RATE} 2,5e-4", '"2,5e-4"', "a number above 0 and up to 1 is expected"),
    value("--training.max_steps 1.5", '"1.5"', f"{COUNT} is expected"),
    value("--lora.r 0", '"0"', f"{COUNT} is expected"),
    value("--training.optim adamw_torch", '"adamw_torch"', "did you mean adamw?"),
    value("--quantization.weight_format int4", '"int4"', "did you mean 4bit?"),
    value("--training.lr_scheduler_type cosin", '"cosin"', "did you mean cosine?"),
    value("--training.report_to none", '"none"', "leave it out for none"),
    value("--lora.target_modules all_linear", "all_linear", "all-linear is expected"),
    # Settings files
    file("rnu.yaml", "QH-U02", "rnu.yaml cannot be read", "did you mean run.yaml?", "Check the path"),
    file("notes.txt", "QH-U02", "ends in .txt", "one of .yaml, .yml, .toml, .json is expected", "Rename the file"),
    file("flat.yaml", "QH-U01", "learning_rate = 0.0001", "did you mean training.learning_rate?", "Correct it"),
    file("group.yaml", "QH-U01", "training.r = 8", "did you mean lora.r?", "Correct it"),
    file("short.yaml", "QH-U01", "training.lr = 0.0001", "did you mean training.learning_rate?", "Correct it"),
    file("axolotl.yaml", "QH-U01", "3 settings", "write lora.target_modules: all-linear", "axolotl.yaml ours.yaml"),
    file("factory.yaml", "QH-U01", '"q_proj,v_proj"', "did you mean lora.target_modules?", "factory.yaml ours.yaml"),
    file("mlx.yaml", "QH-U01", "iters = 100", "did you mean training.max_steps?", "qlora-hal init --from mlx.yaml"),
    file("mlx.yaml --data rows.jsonl", "QH-U01", "lora_parameters = {", "scale x rank) is lora.alpha", "--from"),
    file("names.yaml", "QH-U01", '"q_proj, v_proj"', "a list is expected for several names: [q_proj, v_proj]", "Corr"),
    file("linear.yaml", "QH-U01", '"all_linear"', "all-linear is expected", "Correct it"),
    file("colon.yaml", "QH-U01", '"learning_rate 1e-4"', "training is a group; its settings go below it", "Corre"),
    file("tab.yaml", "QH-U03", "tab.yaml:2", "cannot start any token", "Correct that line"),
    file("twice.yaml", "QH-U03", "twice.yaml:3", "duplicate key", "Correct that line"),
    file("listed.yaml", "QH-U03", "holds a list", "groups of settings are expected", "qlora-hal init"),
    file("word.yaml", "QH-U01", '"ten"', f"{COUNT} is expected", "Correct it"),
    file("yes.yaml", "QH-U01", '"yes"', "a number above 0 and up to 1 is expected", "Correct it"),
    file("broken.toml", "QH-U03", "broken.toml:3", "not well formed", "Correct that line"),
    file("comma.json", "QH-U03", "comma.json:1", "not well formed", "Correct that line"),
    # Commands
    Mistake("trian run.yaml", "QH-U04", 2, "trian is not a command", "did you mean train?", "qlora-hal train --help"),
    Mistake("finetune run.yaml", "QH-U04", 2, "finetune is not", "did you mean train?", "qlora-hal train --help"),
    Mistake("chat out", "QH-U04", 2, "out belongs to no flag", "did you mean --run out?", "Write --run out."),
    Mistake("merge out", "QH-U04", 2, "qlora-hal merge", "requires an argument OUT", "qlora-hal merge --help"),
    Mistake("init run.yaml", "QH-U07", 2, "run.yaml", "already exists", "qlora-hal init other.yaml"),
    Mistake("init run.txt", "QH-U02", 2, "ends in .txt", "one of .yaml, .yml, .toml is expected", "init run.yaml"),
    Mistake("explain D5", "QH-U06", 2, "D5 is not a fault code", "Similar codes", "qlora-hal explain"),
    Mistake("resume out", "QH-S50", 2, "out has no run.json", "an earlier run is expected", "Name the folder"),
    # What is not there, before a model is looked at
    Mistake(
        "train --model org/m --data rows.jsonl", "QH-U12", 2, "output_dir is not set", "qlora-hal train --model org/m",
        "--data rows.jsonl --output_dir runs/first",
    ),
    Mistake(
        "train run.yaml --data rows.jsnl", "QH-D50", 4, "'rows.jsnl'", "did you mean rows.jsonl?",
        "the path of a JSONL, JSON, CSV or Parquet file",
    ),
    Mistake("train run.yaml --data rows.xlsx", "QH-D51", 4, "ends in '.xlsx'", "was expected", "Name the file by"),
    Mistake("train run.yaml --model org/m --backend cpu", "QH-B03", 3, "'cpu'", "installed are", "--backend cpu_torch"),
    Mistake("train run.yaml --model ./modle --backend cpu_torch", "QH-E70", 5, "./modle", "no folder", "Name a folder"),
    Mistake("train run.yaml --model model.gguf --backend cpu_torch", "QH-E71", 5, "model.gguf", "is a file", "train"),
    Mistake("estimate --model pickled", "QH-C17", 10, "pytorch_model.bin", "safetensors are expected", "hal unpickle"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")


def test_there_are_fifty() -> None:
    assert len({mistake.typed for mistake in MISTAKES}) == len(MISTAKES) >= 50


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.typed)
def test_mistake_is_answered_with_what_came_what_was_expected_and_one_thing_to_do(
    mistake: Mistake, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(shlex.split(mistake.typed))
    told = capsys.readouterr()
    assert (status, re.findall(r"error\[(.+?)\]", told.err)) == (mistake.status, [mistake.code])
    assert mistake.came in told.err
    assert mistake.expected in told.err
    (help_,) = re.findall(r"^  help: +(.+)$", told.err, re.MULTILINE)
    assert mistake.to_do in help_
    assert "Traceback" not in told.err
    assert told.out == ""


@pytest.mark.parametrize("mistake", MISTAKES[:60:10], ids=lambda mistake: mistake.typed)
def test_same_answer_comes_as_json(mistake: Mistake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*shlex.split(mistake.typed), "--json"]) == mistake.status
    answer = json.loads(capsys.readouterr().out)
    assert (answer["code"], answer["exit_status"]) == (mistake.code, mistake.status)
    assert mistake.to_do in answer["help"]


def test_command_that_lacks_settings_is_completed(capsys: pytest.CaptureFixture[str]) -> None:
    entries = listed()
    to_name = backend_to_name(entries, reports(entries))
    assert main(["train", "--model", "org/m", "--data", "my rows.jsonl"]) == 2
    completed = "qlora-hal train --model org/m --data 'my rows.jsonl' --output_dir runs/first"
    named = f" --backend {to_name}" if to_name else ""
    assert f"help:  Type: {completed}{named}\n" in capsys.readouterr().err


@pytest.mark.fault("E01")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("train --model org/m --data rows.jsonl", "train --model org/m --data rows.jsonl --backend cpu_torch"),
        ("train --backend auto run.yaml", "train run.yaml --backend cpu_torch"),
        ("train --backend=auto run.yaml --dry-run", "train run.yaml --dry-run --backend cpu_torch"),
        ("chat --run 'a b' --backend mlx_lora", "chat --run 'a b' --backend cpu_torch"),
        ("merge --backend mlx_lora -- run merged", "merge --backend cpu_torch -- run merged"),
    ],
)
def test_command_that_lacks_a_backend_is_completed(typed: str, completed: str) -> None:
    refused = BackendUnavailableError("QH-E01", "None.", fix="Add one.", context={"add": {"--backend": "cpu_torch"}})
    assert with_completed_command(refused, shlex.split(typed)).fix == f"Type: qlora-hal {completed}"


@pytest.mark.parametrize("typed", ["'q_proj v_proj'", "q_proj v_proj", "q_proj,v_proj", "'q_proj, v_proj'"])
def test_several_target_modules_are_understood_as_they_are_typed(
    typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--print-config", "--json", "--lora.target_modules", *shlex.split(typed)]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["lora"]["target_modules"] == ["q_proj", "v_proj"]


def test_every_word_from_habit_leads_to_a_setting_that_exists() -> None:
    assert set(habits.SETTINGS.values()) <= settings().keys()
    named = re.findall(r"\b((?:lora|data|training|quantization)\.[a-z_]+)", " ".join(habits.REMARKS.values()))
    assert named
    assert set(named) <= settings().keys()


def test_no_word_from_habit_is_the_name_of_a_setting_here() -> None:
    own = {path.rpartition(".")[2] for path in settings()}
    assert not own & habits.SETTINGS.keys()
    assert not own & habits.REMARKS.keys()


@pytest.mark.fault("D08")
def test_a_prompt_that_is_no_text_is_refused_before_anything_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model can take minutes to load."""
    assert main(["generate", "--run", str(tmp_path / "none"), "--prompt", "a\udcff"]) == 4
    assert "it holds the byte 0xff" in capsys.readouterr().err
