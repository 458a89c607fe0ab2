"""Settings from all layers, and the errors that name every wrong one."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from qlora_hal.cli.settings import resolved
from qlora_hal.config.fields import settings
from qlora_hal.config.resolve import require_settings, resolve_settings, revalidated
from qlora_hal.config.schema import RunConfig
from qlora_hal.errors import ConfigError, UnsafeInputError


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_each_layer_wins_over_the_one_below(tmp_path: Path) -> None:
    file = written(tmp_path, "lora:\n  r: 4\n  alpha: 4\ntraining:\n  seed: 4\n  max_steps: 4\n")
    settings = resolve_settings(
        file,
        environ={
            "QLORA_HAL_LORA__ALPHA": "3",
            "QLORA_HAL_TRAINING__SEED": "3",
            "QLORA_HAL_TRAINING__MAX_STEPS": "3",
        },
        keywords={"training.seed": 2, "training.max_steps": 2},
        flags={"training.max_steps": "1"},
        defaults={"lora.r": 5, "data.path": "demo.jsonl"},
    )
    config = settings.config
    assert (config.lora.r, config.lora.alpha, config.training.seed, config.training.max_steps) == (4, 3.0, 2, 1)
    assert config.data.path == "demo.jsonl"
    named = ("lora.r", "lora.alpha", "training.seed", "training.max_steps", "data.path", "lora.dropout")
    assert [settings.origins[name] for name in named] == [
        "run.yaml:2",
        "environment QLORA_HAL_LORA__ALPHA",
        "keyword",
        "command line --training.max_steps",
        "demo",
        "default",
    ]


def test_the_few_keywords_of_train_name_settings_and_auto_means_not_given() -> None:
    settings = resolve_settings(
        {"backend": {"name": "cpu_torch"}},
        keywords={"model": Path("m"), "data": "d.jsonl", "output_dir": None, "backend": "auto"},
        environ={},
    )
    config = settings.config
    assert (config.model.name_or_path, config.data.path, config.backend.name) == ("m", "d.jsonl", "cpu_torch")


def test_resolving_twice_keeps_values_and_origins() -> None:
    first = resolve_settings(None, flags={"lora.r": "8"}, environ={})
    assert (
        resolve_settings(first, keywords={"backend": "auto", "model": None}, environ={"QLORA_HAL_LORA__R": "4"})
        is first
    )
    second = resolve_settings(first, keywords={"model": "m"}, environ={"QLORA_HAL_LORA__R": "4"})
    assert (second.config.lora.r, second.origins["lora.r"]) == (8, "command line --lora.r")
    assert second.origins["model.name_or_path"] == "keyword"


def test_a_run_config_given_in_python_counts_as_the_file() -> None:
    config = RunConfig.model_validate({"lora": {"r": 2}})
    settings = resolve_settings(config, environ={"QLORA_HAL_LORA__ALPHA": "9"})
    assert (settings.config.lora.r, settings.config.lora.alpha) == (2, 9.0)
    assert settings.origins["lora.r"] == "config argument"


@pytest.mark.fault("U01")
def test_every_wrong_setting_is_listed_with_place_value_and_expectation(tmp_path: Path) -> None:
    file = written(tmp_path, "lora:\n  rr: 8\n  alpha: -1\nlearning_rate: 1e-4\ndata: 5\nbakend: {name: x}\n")
    with pytest.raises(ConfigError) as caught:
        resolve_settings(file, flags={"lora.r": "ten"}, environ={"QLORA_HAL_LORA_ALPHA": "1"})
    error = caught.value
    assert (error.code, error.exit_status) == ("QH-U01", 2)
    for words in (
        "7 settings are wrong",
        "run.yaml:2  lora.rr = 8: no setting has that name; did you mean lora.r?",
        "run.yaml:3  lora.alpha = -1: a number above 0 is expected",
        "run.yaml:4  learning_rate = 0.0001: no setting has that name; did you mean training.learning_rate?",
        "run.yaml:5  data = 5: data is a group",
        "run.yaml:6  bakend = {'name': 'x'}: no group has that name; did you mean backend?",
        'command line --lora.r  lora.r = "ten": a whole number above 0 is expected',
        "did you mean QLORA_HAL_LORA__ALPHA?",
    ):
        assert words in error.message
    problems = error.context["problems"]
    assert isinstance(problems, list)
    assert len(problems) == 7


@pytest.mark.fault("N18")
@pytest.mark.parametrize("text", ["1e-4", '"1e-4"', "1E-4", "0.0001", "1.0e-4"])
def test_a_learning_rate_is_a_number_however_yaml_spells_it(tmp_path: Path, text: str) -> None:
    file = written(tmp_path, f"training:\n  learning_rate: {text}\n")
    assert resolve_settings(file, environ={}).config.training.learning_rate == 1e-4


@pytest.mark.fault("N18")
def test_a_learning_rate_that_is_no_number_is_an_error_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a number above 0 and up to 1") as caught:
        resolve_settings(written(tmp_path, "training:\n  learning_rate: fast\n"), environ={})
    assert (caught.value.code, caught.value.where, caught.value.exit_status) == ("QH-U01", "run.yaml:2", 2)


@pytest.mark.fault("N18")
@pytest.mark.parametrize(
    ("path", "value"),
    [("training.learning_rate", "1_0e-5"), ("training.max_steps", "1_0"), ("lora.r", "_8"), ("training.seed", "0x_")],
)
def test_an_underscore_is_no_part_of_a_number(tmp_path: Path, path: str, value: str) -> None:
    """Python would read 1_0e-5 as 1e-4."""
    group, _, name = path.partition(".")
    for given in (
        lambda: resolve_settings(None, flags={path: value}, environ={}),
        lambda: resolve_settings(None, environ={settings()[path].environment_name: value}),
        lambda: resolve_settings(written(tmp_path, f"{group}:\n  {name}: {value}\n"), environ={}),
        lambda: resolve_settings({group: {name: value}}, environ={}),
    ):
        with pytest.raises(ConfigError, match=rf"{value}.*is expected") as caught:
            given()
        assert caught.value.code == "QH-U01"


@pytest.mark.fault("N19")
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("training.learning_rate", "0"),
        ("training.learning_rate", "1.5"),
        ("training.learning_rate", "nan"),
        ("training.max_steps", "0"),
        ("training.num_train_epochs", "0"),
        ("training.warmup_ratio", "1"),
        ("lora.r", "0"),
        ("lora.dropout", "1"),
        ("checkpoint.save_total_limit", "1"),
    ],
)
def test_a_value_outside_its_range_is_refused_with_the_range(path: str, value: str) -> None:
    with pytest.raises(ConfigError, match="is expected") as caught:
        resolve_settings(None, flags={path: value}, environ={})
    assert path in caught.value.message
    assert caught.value.exit_status == 2


def test_fewer_tokens_in_a_batch_than_in_a_row_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tokens_per_batch 1024 is less than one row of data\.max_seq_length 2048"):
        resolve_settings({}, flags={"training.tokens_per_batch": "1024", "data.max_seq_length": "2048"}, environ={})


def test_a_batch_by_tokens_has_as_many_full_rows_as_fit_into_them() -> None:
    flags = {"training.tokens_per_batch": "8192", "data.max_seq_length": "2000"}
    assert resolve_settings({}, flags=flags, environ={}).config.full_batch_rows == 4


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (
            {"data.validation_path": "v.jsonl", "data.validation_fraction": "0.2"},
            "data.validation_path and data.validation_fraction are mutually exclusive",
        ),
        ({"data.validation_split": "test"}, "data.validation_split needs data.validation_path"),
    ],
)
def test_settings_of_validation_that_contradict_each_other_are_refused(flags: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"QH-U01.*{problem}") as caught:
        resolve_settings({}, flags=flags, environ={})
    assert str(caught.value.where).startswith("command line --data.validation_")


@pytest.mark.parametrize(("typed", "steps"), [("none", None), ("0", 0), ("7", 7)])
def test_a_run_is_saved_every_hundred_steps_unless_told_otherwise(typed: str, steps: int | None) -> None:
    assert RunConfig().checkpoint.save_steps == 100
    flags = {"checkpoint.save_steps": typed}
    assert resolve_settings({}, flags=flags, environ={}).config.checkpoint.save_steps == steps


@pytest.mark.fault("N19")
def test_settings_that_contradict_each_other_are_refused_at_their_origin() -> None:
    flags = {"training.max_steps": "5", "training.warmup_steps": "6"}
    with pytest.raises(ConfigError, match=r"training\.warmup_steps is larger than training.max_steps") as caught:
        resolve_settings(None, flags=flags, environ={})
    assert caught.value.where == "command line --training.warmup_steps"


def test_true_is_not_read_as_the_number_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora.r = true: a whole number above 0 is expected"):
        resolve_settings(written(tmp_path, "lora:\n  r: true\n"), environ={})


@pytest.mark.fault("X13")
def test_remote_code_is_not_allowed_by_the_environment() -> None:
    with pytest.raises(ConfigError, match="not taken from the environment"):
        resolve_settings(None, environ={"QLORA_HAL_MODEL__TRUST_REMOTE_CODE": "1"})
    assert not resolve_settings(None, environ={"TRUST_REMOTE_CODE": "1"}).config.model.trust_remote_code


def test_lists_and_mappings_can_be_typed_as_text() -> None:
    settings = resolve_settings(
        None,
        flags={
            "lora.target_modules": ["q_proj", "v_proj"],
            "training.report_to": "wandb, mlflow",
            "training.sample_prompts": ["one, two"],
            "backend.options": {"compile": "true", "name": "x"},
            "training.seed": "none",
        },
        environ={"QLORA_HAL_BACKEND__OPTIONS": '{"depth": 3}'},
    )
    config = settings.config
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.training.report_to == ("wandb", "mlflow")
    assert config.training.sample_prompts == ("one, two",)
    assert config.backend.options == {"depth": 3, "compile": True, "name": "x"}
    assert config.training.seed is None


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("q_proj", ("q_proj",)),
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        (r".*\.layers\.[0-3]\..*", r".*\.layers\.[0-3]\..*"),
        ('["q_proj"]', ("q_proj",)),
    ],
)
def test_target_modules_are_names_unless_they_look_like_a_pattern(typed: str, meant: object) -> None:
    settings = resolve_settings(None, flags={"lora.target_modules": typed}, environ={})
    assert settings.config.lora.target_modules == meant


def test_all_linear_stays_the_word() -> None:
    settings = resolve_settings(None, flags={"lora.target_modules": "all-linear"}, environ={})
    assert settings.config.lora.target_modules == "all-linear"


@pytest.mark.fault("U12")
def test_settings_that_a_verb_needs_are_all_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.name_or_path, data\.path are not set") as caught:
        require_settings(resolve_settings(None, environ={}).config, "model.name_or_path", "data.path")
    assert caught.value.exit_status == 2


# Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("run.yaml", "lora:\n  r: 4\n", 2),
        ("run.yml", "\ufefflora:\r\n  r: 4\r\n", 2),
        ("run.toml", "[lora]\nr = 4\n", 2),
        ("run.json", '{\n  "lora": {\n    "r": 4\n  }\n}\n', 3),
    ],
)
def test_yaml_toml_and_json_give_values_and_lines(tmp_path: Path, name: str, text: str, line: int) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    settings = resolve_settings(path, environ={})
    assert (settings.config.lora.r, settings.origins["lora.r"]) == (4, f"{name}:{line}")


@pytest.mark.fault("U03")
@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("run.yaml", "lora:\n  r: 3\n  r: 4\n", ":3"),
        ("run.yaml", "lora: [\n", ":2"),
        ("run.toml", "[lora]\nr = 3\nr = 4\n", ":3"),
        ("run.json", '{\n"lora": {,}}', ":2"),
        ("run.json", '{"lora": {"r": 1, "r": 2}}', ""),
        ("run.json", '{"lora": {"alpha": NaN}}', ""),
        ("run.yaml", "- a\n- b\n", ""),
    ],
)
def test_a_malformed_file_is_an_error_with_its_line(tmp_path: Path, name: str, text: str, place: str) -> None:
    path = written(tmp_path, text, name)
    with pytest.raises(ConfigError) as caught:
        resolve_settings(path, environ={})
    assert (caught.value.code, caught.value.exit_status) == ("QH-U03", 2)
    assert caught.value.where == f"{path}{place}"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{this}: &{this} [{','.join([f'*{before}'] * 9)}]\n" for before, this in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.fault("X07")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases"),
        ("a: &a [*a]\n", "contains itself"),
        ("lora: !!python/object/apply:os.system [echo]\n", "tag"),
        ("lora: !custom 3\n", "tag"),
        ("[" * 50_000, "nested more than 32 deep"),
        ("# " + "x" * 1_000_001, "more than the limit"),
    ],
)
def test_a_hostile_file_is_refused_for_safety(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UnsafeInputError, match=words) as caught:
        resolve_settings(written(tmp_path, text), environ={})
    assert (caught.value.code, caught.value.exit_status) == ("QH-X07", 10)


@pytest.mark.fault("X07")
@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.toml", "a." * 50_000 + "a = 1", "nested more than 32 deep"),
        ("run.toml", "[" + "a." * 50_000 + "a]\nb = 1", "nested more than 32 deep"),
        ("run.toml", '"a"."b".' * 5_000 + "a = 1", "nested more than 32 deep"),
        ("run.toml", "a = " + "[" * 2_000, "nested more than 32 deep"),
        ("run.toml", "a = " + "{b = " * 2_000, "nested more than 32 deep"),
        ("run.toml", "\n".join(f"k{n} = 1" for n in range(9_000)), "more than 5000 values"),
        ("run.toml", "\n".join(f"[t{n}]" for n in range(9_000)), "more than 5000 values"),
        ("run.yaml", "a: [" + "1," * 100_000 + "]", "more than 5000 values"),
        ("run.yaml", "\n".join(f"k{n}: 1" for n in range(9_000)), "more than 5000 values"),
        ("run.yaml", "- " * 100_000, "nested more than 32 deep"),
        ("run.yaml", "? " * 100_000, "nested more than 32 deep"),
        ("run.json", '{"a":' * 40_000, "more than 5000 values"),
        ("run.json", "[" * 40_000, "more than 5000 values"),
        ("run.json", "{" + ",".join(f'"k{n % 9}": 1' for n in range(9_000)) + "}", "more than 5000 values"),
        ("run.json", '{"' + "x" * 300_000 + '": 1}', "more than the limit"),
    ],
)
def test_a_file_that_would_take_memory_or_time_is_refused_at_once(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    path, started = written(tmp_path, text, name), time.process_time()
    with pytest.raises(UnsafeInputError, match=words) as caught:
        resolve_settings(path, environ={})
    assert caught.value.code == "QH-X07"
    assert time.process_time() - started < 2.0


@pytest.mark.fault("U03")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.toml", "a = " + "9" * 5_000),
        ("run.toml", "a = 2001-99-99"),
        ("run.yaml", "a: " + "9" * 5_000),
        ("run.yaml", "a: 2001-99-99"),
        ("run.yaml", "a: !!int abc"),
        ("run.yaml", "a: !!bool x"),
        ("run.yaml", "a: !!timestamp x"),
        ("run.yaml", "{a: 1}: 3"),
        ("run.json", '{"training": {"seed": ' + "9" * 4_000 + "}}"),
    ],
)
def test_a_value_that_its_format_cannot_hold_makes_the_file_malformed(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_settings(written(tmp_path, text, name), environ={})
    assert caught.value.code == "QH-U03"
    assert "sys.set_int_max_str_digits" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "training:\n  seed: 0x" + "f" * 50_000),
        ("run.toml", "[training]\nseed = 0x" + "f" * 50_000),
    ],
)
def test_a_number_of_thousands_of_digits_is_told_by_its_length(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=r"QH-U01.*training.seed = a whole number of about \d+ digits") as caught:
        resolve_settings(written(tmp_path, text, name), environ={})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "typed",
    ["9" * 5_000, "[" * 50_000, '["' + "a" * 50_000, "{" * 50_000, '{"a":' * 5_000, "[" + "[]," * 400_000 + "1]"],
)
def test_what_is_typed_or_set_in_the_environment_is_bounded_as_files_are(typed: str) -> None:
    for key in ("training.seed", "lora.target_modules", "backend.options", "lora.r"):
        name = "QLORA_HAL_" + key.replace(".", "__").upper()
        for given in ({"flags": {key: typed}, "environ": {}}, {"flags": {}, "environ": {name: typed}}):
            started = time.process_time()
            with pytest.raises(ConfigError) as caught:
                resolve_settings({"training.learning_rate": "refused"}, **given)  # type: ignore[arg-type]
            assert len(str(caught.value)) < 2_000
            assert time.process_time() - started < 2.0


def test_thousands_of_unknown_settings_are_counted_and_the_first_are_told() -> None:
    started = time.process_time()
    unknown = {f"traning_{number}": {"learning_rat": 1} for number in range(20_000)}
    with pytest.raises(ConfigError) as caught:
        resolve_settings({**unknown, "training" * 20_000: {}, "lora": {"alpah" * 50_000: 1}}, environ={})
    assert time.process_time() - started < 2.0
    assert caught.value.message.startswith("20002 settings are wrong.")
    assert caught.value.message.endswith("and 19952 more")
    assert len(str(caught.value)) < 20_000
    assert len(str(caught.value.as_json())) < 30_000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_settings_file_that_is_a_pipe_is_not_advised_as_itself(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match=r"QH-U02.*not a regular file") as refused:
        resolve_settings(tmp_path / "run.yaml", environ={})
    assert "did you mean" not in str(refused.value)


@pytest.mark.fault("U02")
def test_a_file_that_is_absent_or_of_unknown_kind_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", written(tmp_path, "x", "run.ini")):
        with pytest.raises(ConfigError) as caught:
            resolve_settings(path, environ={})
        assert caught.value.code == "QH-U02"
        assert path.name in caught.value.message


def test_yaml_words_keep_their_meaning(tmp_path: Path) -> None:
    # Under YAML 1.1 `no` is false; a model may well be called no.
    file = written(tmp_path, "model:\n  name_or_path: no\ndata:\n  packing: true\n")
    config = resolve_settings(file, environ={}).config
    assert (config.model.name_or_path, config.data.packing) == ("no", True)


@pytest.mark.fault("U01")
def test_a_sample_prompt_that_is_no_text_is_refused_in_its_line(tmp_path: Path) -> None:
    file = written(tmp_path, 'training:\n  sample_prompts: ["a", "\\ud800"]\n')
    with pytest.raises(ConfigError, match=r"QH-U01.*U\+D800, half of a character") as caught:
        resolve_settings(file, environ={})
    assert caught.value.where == "run.yaml:2"


@pytest.mark.fault("U03")
@pytest.mark.parametrize("value", ["2020-13-01", "2020-99-99"])
def test_a_value_that_yaml_cannot_make_is_told_with_its_line(tmp_path: Path, value: str) -> None:
    file = written(tmp_path, f"lora:\n  r: 4\ntraining:\n  seed: {value}\n")
    with pytest.raises(ConfigError) as caught:
        resolve_settings(file, environ={})
    assert caught.value.where == f"{file}:4"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "training.max_steps: 3\ntraining:\n  max_steps: 4\n"),
        ("run.yaml", "training:\n  max_steps: 4\ntraining.max_steps: 4\n"),
        ("run.json", '{"training.max_steps": 3, "training": {"max_steps": 4}}'),
        ("run.toml", '"training.max_steps" = 3\n[training]\nmax_steps = 4\n'),
    ],
)
@pytest.mark.fault("U01")
def test_a_setting_that_one_file_gives_in_two_spellings_is_refused(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"QH-U01.*training\.max_steps = [34]: it is set twice"):
        resolve_settings(written(tmp_path, text, name), environ={})


def test_a_setting_that_one_mapping_gives_in_two_spellings_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora\.r = 8: it is set twice"):
        resolve_settings({"lora.r": 4, "lora": {"r": 8}}, environ={})


@pytest.mark.parametrize("version", ["1.1", "1.0", "1.3"])
def test_a_file_that_declares_another_yaml_is_not_read_by_its_rules(version: str, tmp_path: Path) -> None:
    """By those of 1.1 the steps were 8."""
    file = written(tmp_path, f"%YAML {version}\n---\ntraining:\n  max_steps: 010\n")
    with pytest.raises(ConfigError, match=rf"QH-U03.*declares YAML {re.escape(version)}"):
        resolve_settings(file, environ={})
    same = written(tmp_path, "%YAML 1.2\n---\ntraining:\n  max_steps: 010\n")
    assert resolve_settings(same, environ={}).config.training.max_steps == 10


def test_a_repeated_key_of_a_mapping_that_was_typed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"backend\.options.*a mapping of names to values is expected"):
        resolve_settings(None, flags={"backend.options": '{"layers": "plain", "layers": "auto"}'}, environ={})


WHOLE_NUMBERS = [name for name, setting in settings().items() if setting.kind == "whole number"]


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_whole_numbers_are_those_that_the_record_of_a_run_can_hold(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(name)} = 9223372036854775808: .*below 2\*\*63"):
        resolve_settings({name: 2**63}, environ={})


@pytest.mark.parametrize(
    "name",
    ["adam_epsilon", "learning_rate", "weight_decay", "max_grad_norm"],
)
def test_numbers_that_float32_cannot_hold_are_refused_by_name(name: str) -> None:
    """An epsilon that becomes 0 gives 0 / 0; a clipping norm that does lets no gradient through."""
    too_large = [] if name == "learning_rate" else [1e39, 1e300]
    for value in (1e-39, 1e-46, 5e-324, *too_large):
        with pytest.raises(ConfigError, match=rf"training\.{name} = .*float32 can hold"):
            resolve_settings({f"training.{name}": value}, environ={})
    assert resolve_settings({f"training.{name}": 1.2e-38}, environ={})


@pytest.mark.parametrize("alpha", [1e-300, 1e39])
def test_an_alpha_that_float32_cannot_hold_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"lora\.alpha = .*float32 can hold"):
        resolve_settings({"lora.alpha": alpha}, environ={})


def test_epochs_without_end_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_train_epochs = 1e\+308: a number above 0 and up to 1e\+09"):
        resolve_settings({"training.num_train_epochs": 1e308}, environ={})


def of_the_demo(**flags: str) -> RunConfig:
    return resolved(None, {name.replace("__", "."): value for name, value in flags.items()}, demo=True).config


def test_what_is_given_beside_the_demo_is_not_overruled_by_it() -> None:
    assert of_the_demo(training__num_train_epochs="1").training.max_steps is None
    assert of_the_demo(training__num_train_epochs="1", training__max_steps="3").training.max_steps == 3
    held_out = of_the_demo(data__validation_fraction="0.1")
    assert (held_out.data.validation_path, held_out.training.eval_steps) == (None, 50)
    others = of_the_demo(data__path="mine.jsonl")
    assert (others.data.validation_path, others.training.eval_steps) == (None, None)
    several = of_the_demo(data__sources='[{"path": "mine.jsonl"}]')
    assert (several.data.path, several.data.validation_path, several.training.eval_steps) == ("", None, None)
    both = of_the_demo(data__path="mine.jsonl", data__validation_path="held.jsonl")
    assert (both.data.validation_path, both.training.eval_steps) == ("held.jsonl", 50)
    assert of_the_demo(data__validation_path="none").training.eval_steps is None
    assert of_the_demo(data__path="mine.jsonl").training.sample_prompts == ()
    asked = of_the_demo(data__path="mine.jsonl", training__sample_prompts='["Who?"]')
    assert asked.training.sample_prompts == ("Who?",)


def test_the_demo_alone_is_as_it_was() -> None:
    config = of_the_demo()
    assert (config.training.max_steps, config.training.eval_steps) == (200, 50)
    assert config.data.validation_path
    assert config.training.sample_prompts


@pytest.mark.fault("U01")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"per_device_train_batch_size": 2**62}, "per_device_train_batch_size"),
        ({"per_device_train_batch_size": 2**21, "gradient_accumulation_steps": 2**20}, "per_device_train_batch_size"),
        ({"global_batch_size": 2**40 + 1}, "global_batch_size"),
    ],
)
def test_a_step_of_more_sequences_than_a_record_can_count_is_refused(settings: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"training.{named} makes a step of \d+ sequences") as caught:
        resolve_settings({"training": settings}, environ={})
    assert caught.value.where == "config argument"


@pytest.mark.fault("U01")
def test_a_configuration_that_code_has_made_is_held_against_the_schema() -> None:
    config = RunConfig()
    assert revalidated(config, "a plugin") == config
    wrong = config.model_copy(update={"training": config.training.model_copy(update={"max_steps": -5})})
    with pytest.raises(ConfigError, match=r"training.max_steps = -5: a whole number above 0 is expected") as caught:
        revalidated(wrong, "a plugin")
    assert caught.value.where == "a plugin"
    with pytest.raises(ConfigError, match="a RunConfig is expected, not a value of type dict"):
        revalidated({}, "a plugin")


def test_none_in_a_file_is_told_to_be_null(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r'save_steps = "none": a whole number from 0 is expected; null leaves it unset'
    ):
        resolve_settings(written(tmp_path, "checkpoint: {save_steps: none}\n"), environ={})
    assert (
        resolve_settings(written(tmp_path, "checkpoint: {save_steps: null}\n"), environ={}).config.checkpoint.save_steps
        is None
    )


def test_the_one_entry_of_a_list_is_answered_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"did you mean \[wandb\]\?"):
        resolve_settings({"training": {"report_to": "wandb"}}, environ={})
