"""What people type, and what comes back: the real program in a child process."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_hal.cli.application import VERBS
from qlora_hal.config.fields import settings

CommandLine = Callable[..., "subprocess.CompletedProcess[str]"]


def test_help_lists_every_verb(qlora_hal: CommandLine) -> None:
    done = qlora_hal("--help")
    assert done.returncode == 0
    assert all(re.search(rf"\b{verb}\b", done.stdout) for verb in VERBS)
    assert done.stderr == ""


def test_help_of_train_has_a_flag_for_every_setting(qlora_hal: CommandLine) -> None:
    shown = qlora_hal("train", "--help").stdout
    assert [path for path in settings() if f"--{path}" not in shown] == []


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "train"])
def test_every_verb_has_help(qlora_hal: CommandLine, verb: str) -> None:
    done = qlora_hal(verb, "--help")
    assert done.returncode == 0
    assert f"qlora-hal {verb}" in done.stdout


def test_version_is_the_packages(qlora_hal: CommandLine) -> None:
    import qlora_hal as package

    assert qlora_hal("--version").stdout.strip() == package.__version__


def test_print_config_shows_value_and_origin_of_every_setting(qlora_hal: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lora:\n  r: 4\n", encoding="utf-8")
    done = qlora_hal(
        "train",
        "run.yaml",
        "--model=some/model",
        "--training.learning-rate",
        "3e-4",
        "--data.shuffle",
        "false",
        "--data.packing",
        "--print-config",
        QLORA_HAL_TRAINING__SEED="7",
    )
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in done.stdout.splitlines()}
    assert done.returncode == 0, done.stderr
    assert set(rows) == set(settings())
    assert rows["lora.r"] == ["4", "run.yaml:2"]
    assert rows["model.name_or_path"] == ["some/model", "command line --model.name_or_path"]
    assert rows["training.learning_rate"] == ["0.0003", "command line --training.learning_rate"]
    assert rows["data.shuffle"][0] == "false"
    assert rows["data.packing"][0] == "true"
    assert rows["training.seed"] == ["7", "environment QLORA_HAL_TRAINING__SEED"]
    assert rows["lora.alpha"][1] == "default"


def test_print_config_shows_settings_that_hold_others(qlora_hal: CommandLine, tmp_path: Path) -> None:
    given = {"data": {"sources": [{"path": "a.csv", "weight": 2}]}, "backend": {"options": {"layers": "plain"}}}
    (tmp_path / "run.json").write_text(json.dumps(given), encoding="utf-8")
    done = qlora_hal("train", "run.json", "--print-config")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split(maxsplit=1)[1].rsplit("  ", 1)[0].strip() for line in done.stdout.splitlines()}
    assert json.loads(rows["data.sources"]) == [{"path": "a.csv", "split": "train", "weight": 2.0, "columns": {}}]
    assert json.loads(rows["backend.options"]) == {"layers": "plain"}


def test_print_config_as_json_is_a_configuration_again(qlora_hal: CommandLine, tmp_path: Path) -> None:
    printed = json.loads(qlora_hal("train", "--lora.r", "3", "--print-config", "--json").stdout)
    (tmp_path / "again.json").write_text(json.dumps(printed["config"]), encoding="utf-8")
    again = json.loads(qlora_hal("train", "again.json", "--print-config", "--json").stdout)
    assert again["config"] == printed["config"]
    assert again["config"]["lora"]["r"] == 3


@pytest.mark.fault("U04")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--lora.rr", "8"), "did you mean --lora.r?"),
        (("train", "--trainig.seed", "8"), "did you mean --training.seed?"),
        (("train", "--learning-rate", "8"), "did you mean --training.learning_rate?"),
        (("train", "--dry-rum"), "did you mean --dry-run?"),
        (("train", "--quite"), "did you mean --quiet?"),
        (("resume", "x", "--force-unlok"), "did you mean --force-unlock?"),
        (("generate", "--prompt", "x", "--base-ony"), "did you mean --base-only?"),
        (("generate", "--prompt", "x", "--dry-rum"), "--dry-rum is not a flag of qlora-hal generate."),
        (("generate", "--prompt", "x", "--learning-rate", "8"), "is not a flag of qlora-hal generate."),
        (("trian",), "did you mean train?"),
        (("train", "--lora.r"), "--lora.r requires an argument"),
        (("train", "a.yaml", "b.yaml"), "b.yaml"),
        (("resume",), "RUN_DIR"),
    ],
)
def test_a_wrong_command_line_is_exit_2_with_the_nearest_word(
    qlora_hal: CommandLine, arguments: tuple[str, ...], words: str
) -> None:
    done = qlora_hal(*arguments)
    assert done.returncode == 2
    assert "error[QH-U04]" in done.stderr
    assert words in done.stderr
    assert done.stdout == ""


@pytest.mark.fault("U01")
def test_wrong_values_are_listed_on_stderr_with_a_hint_to_explain(qlora_hal: CommandLine) -> None:
    done = qlora_hal("train", "--lora.r", "ten", "--training.learning_rate", "5")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error[QH-U01]: 2 settings are wrong." in done.stderr
    assert 'lora.r = "ten": a whole number above 0 is expected' in done.stderr
    assert "qlora-hal explain QH-U01" in done.stderr


def test_json_errors_go_to_stdout_as_one_object(qlora_hal: CommandLine) -> None:
    done = qlora_hal("train", "--lora.r", "ten", "--json")
    error = json.loads(done.stdout)
    assert done.returncode == 2
    assert (error["code"], error["exit_status"]) == ("QH-U01", 2)
    assert {"message", "where", "cause", "help", "problems"} <= set(error)


@pytest.mark.fault("U12")
def test_a_run_without_model_and_data_is_refused_before_anything_loads(qlora_hal: CommandLine) -> None:
    done = qlora_hal("estimate")
    assert done.returncode == 2
    assert "model.name_or_path" in done.stderr


def test_the_schema_describes_every_setting(qlora_hal: CommandLine) -> None:
    schema = json.loads(qlora_hal("schema").stdout)

    def leaves(node: dict[str, object], prefix: str = "") -> set[str]:
        found: set[str] = set()
        properties = node["properties"]
        assert isinstance(properties, dict)
        for name, item in properties.items():
            reference = item.get("$ref") or (item.get("allOf") or [{}])[0].get("$ref")
            inner = schema["$defs"][reference.rpartition("/")[2]] if reference else None
            found |= leaves(inner, f"{prefix}{name}.") if inner else {f"{prefix}{name}"}
        return found

    assert leaves(schema) == set(settings())


def test_init_writes_a_file_that_train_reads(qlora_hal: CommandLine, tmp_path: Path) -> None:
    assert qlora_hal("init").returncode == 0
    first = (tmp_path / "run.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=qlora-hal.schema.json"
    assert json.loads((tmp_path / "qlora-hal.schema.json").read_text(encoding="utf-8"))["properties"]
    printed = qlora_hal("train", "run.yaml", "--print-config").stdout
    assert "runs/first" in printed


def test_the_defaults_in_the_file_of_init_are_the_defaults(qlora_hal: CommandLine, tmp_path: Path) -> None:
    commented = qlora_hal("init", "-").stdout
    (tmp_path / "a.yaml").write_text(commented, encoding="utf-8")
    (tmp_path / "b.yaml").write_text(re.sub(r"(?m)^( *)# (\w+:)", r"\1\2", commented), encoding="utf-8")
    first, second = (
        json.loads(qlora_hal("train", name, "--print-config", "--json").stdout) for name in ("a.yaml", "b.yaml")
    )
    assert first["config"] == second["config"]
    assert all(origin.startswith("b.yaml:") for origin in second["origins"].values())


def test_init_writes_the_format_that_the_ending_names(qlora_hal: CommandLine, tmp_path: Path) -> None:
    assert qlora_hal("init", "run.toml").returncode == 0
    written = (tmp_path / "run.toml").read_text(encoding="utf-8")
    assert written.startswith("#:schema ./qlora-hal.schema.json\n")
    with_defaults = re.sub(r"(?m)^# (\w+ = \S)", r"\1", written)
    (tmp_path / "defaults.toml").write_text(with_defaults, encoding="utf-8")
    assert qlora_hal("init", "run.yaml").returncode == 0
    asked = (json.loads(qlora_hal("train", name, "--print-config", "--json").stdout)["config"]
             for name in ("run.toml", "defaults.toml", "run.yaml"))  # fmt: skip
    plain, uncommented, yaml = asked
    assert plain == uncommented == yaml


@pytest.mark.fault("U02")
@pytest.mark.parametrize("name", ["run.json", "run", "run.ini", "run.yaml.bak"])
def test_init_refuses_an_ending_that_it_cannot_write(qlora_hal: CommandLine, tmp_path: Path, name: str) -> None:
    done = qlora_hal("init", name)
    assert done.returncode == 2
    assert "one of .yaml, .yml, .toml is expected" in done.stderr
    assert not list(tmp_path.glob("run*"))


@pytest.mark.fault("U07")
def test_init_never_replaces_a_file(qlora_hal: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("mine", encoding="utf-8")
    done = qlora_hal("init")
    assert done.returncode == 2
    assert (tmp_path / "run.yaml").read_text(encoding="utf-8") == "mine"


def test_explain_takes_a_code_as_people_type_it(qlora_hal: CommandLine) -> None:
    for code in ("QH-D05", "d05"):
        done = qlora_hal("explain", code)
        assert done.returncode == 0
        assert done.stdout.startswith("QH-D05: ")
    assert json.loads(qlora_hal("explain", "D05", "--json").stdout)["exit_status"] == 4


@pytest.mark.fault("U06")
def test_an_unknown_code_is_refused_with_near_ones(qlora_hal: CommandLine) -> None:
    done = qlora_hal("explain", "D99")
    assert done.returncode == 2
    assert "QH-D" in done.stderr


@pytest.mark.fault("S50")
def test_generating_from_a_folder_that_is_no_run_names_it(qlora_hal: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = qlora_hal("generate", "--run", "empty", "--prompt", "-hello")
    assert done.returncode == 2
    assert "error[QH-S50]: empty is not a run folder" in done.stderr


@pytest.mark.fault("I01")
@pytest.mark.fault("U14")
@pytest.mark.fault("U51")
@pytest.mark.parametrize(("words", "code"), [(("generate", "--prompt", "x"), "QH-U14"), (("conformance",), "QH-U51")])
def test_a_verb_without_its_subject_says_what_to_name(
    qlora_hal: CommandLine, words: tuple[str, ...], code: str
) -> None:
    done = qlora_hal(*words)
    assert (done.returncode, code in done.stderr, "help:" in done.stderr) == (2, True, True), done.stderr


def test_a_defect_shows_one_place_and_how_to_get_the_whole_story(qlora_hal: CommandLine, tmp_path: Path) -> None:
    # A module that fails on import stands before the real one: an error that nobody foresaw.
    (tmp_path / "ruamel" / "yaml").mkdir(parents=True)
    (tmp_path / "ruamel" / "yaml" / "__init__.py").write_text(
        "raise RuntimeError('broken on purpose')", encoding="utf-8"
    )
    (tmp_path / "run.yaml").write_text("lora: {r: 1}", encoding="utf-8")
    done = qlora_hal("train", "run.yaml", "--print-config", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "error[QH-I01]: RuntimeError: broken on purpose" in done.stderr
    assert "QLORA_HAL_TRACEBACK=1" in done.stderr
    assert "Traceback" not in done.stderr
    loud = qlora_hal("train", "run.yaml", "--print-config", PYTHONPATH=str(tmp_path), QLORA_HAL_TRACEBACK="1")
    assert "Traceback" in loud.stderr


def test_colour_follows_no_color_and_force_color(qlora_hal: CommandLine) -> None:
    assert "\x1b[" not in qlora_hal("explain", "D99").stderr
    assert "\x1b[" in qlora_hal("explain", "D99", NO_COLOR="", FORCE_COLOR="1").stderr


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        "set -o pipefail; qlora-hal schema | head -1",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_shell_completes_commands_once_that_is_installed(qlora_hal: CommandLine, tmp_path: Path) -> None:
    done = qlora_hal("--install-completion", "--shell", "bash", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    script = tmp_path / ".local/share/bash-completion/completions/qlora-hal"
    assert str(script) in done.stdout
    assert str(script) in (tmp_path / ".bashrc").read_text()
    ask = f"source {script}; COMP_WORDS=(qlora-hal do); COMP_CWORD=1; _qlora_hal; echo ${{COMPREPLY[*]}}"
    offered = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout
    assert offered.split() == ["doctor"]


def test_completion_that_cannot_be_written_is_told_as_that(qlora_hal: CommandLine, tmp_path: Path) -> None:
    (tmp_path / ".local").write_text("in the way")
    done = qlora_hal("--install-completion", "--shell", "bash", HOME=str(tmp_path))
    assert "error[QH-S11]" in done.stderr
    assert "The completion script could not be written" in done.stderr
