"""`train(model, data, learning_rate=...)`: which argument is what, and which keyword is which setting."""

from __future__ import annotations

import inspect
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from small_runs import SMALL, merged

import qlora_hal
from qlora_hal import RunConfig, train
from qlora_hal.config.fields import groups, settings
from qlora_hal.config.keywords import CommonSettings, SettingsByKeyword, is_settings_of_data
from qlora_hal.config.resolve import resolve_settings
from qlora_hal.demo import data_path, model_path
from qlora_hal.errors import ConfigError, DataError


def resolved(**keywords: object) -> dict[str, object]:
    return dict(resolve_settings(None, keywords=keywords, environ={}).values())


def plain(kind: object) -> object:
    """A type without what pydantic checks beyond it."""
    if hasattr(kind, "__metadata__"):
        return plain(kind.__origin__)
    if get_origin(kind) in (types.UnionType, typing.Union):
        return frozenset(map(plain, get_args(kind)))
    if get_origin(kind) is Literal:
        return frozenset(get_args(kind))
    if get_origin(kind) is tuple:
        return ("tuple", plain(get_args(kind)[0]))
    return kind


@pytest.mark.parametrize("name", CommonSettings.__annotations__)
def test_each_common_keyword_is_one_setting_with_its_type(name: str) -> None:
    (path,) = [path for path in settings() if path.rpartition(".")[2] == name]
    group, _, leaf = path.rpartition(".")
    of_schema = RunConfig.model_fields[group].annotation
    assert of_schema is not None
    declared = typing.get_type_hints(CommonSettings)[name]
    assert plain(declared) == plain(typing.get_type_hints(of_schema, include_extras=True)[leaf])


def test_every_group_is_a_keyword() -> None:
    arguments = {"model", "data", "backend", *SettingsByKeyword.__annotations__} - CommonSettings.__annotations__.keys()
    assert arguments == set(groups())


def test_help_and_completion_show_the_settings() -> None:
    shown = inspect.signature(train).parameters
    assert {"learning_rate", "r", "max_steps", "training", "quiet"} <= shown.keys()
    assert "settings" not in shown


def test_keywords_become_settings_with_their_origin() -> None:
    found = resolve_settings(
        None,
        keywords={"learning_rate": 1e-3, "r": 4, "training": {"adam_beta2": 0.95}, "lora.alpha": 8, "save_steps": None},
        environ={},
    )
    values = found.values()
    expected = {"training.learning_rate": 1e-3, "lora.r": 4, "training.adam_beta2": 0.95, "lora.alpha": 8.0}
    assert {path: values[path] for path in expected} == expected
    assert values["checkpoint.save_steps"] is None
    assert {found.origins[path] for path in (*expected, "checkpoint.save_steps")} == {"keyword"}


@pytest.mark.parametrize(
    ("keyword", "told"),
    [
        ({"lr": 1e-3}, r"lr = 0\.001: no setting has that name; did you mean learning_rate\?"),
        ({"lora_r": 8}, r"did you mean r\?"),
        ({"adam_beta2": 0.9}, r'did you mean training=\{"adam_beta2": \.\.\.\}\?'),
        ({"dataset": "x"}, r"did you mean data\?"),
        ({"trainning": {"seed": 1}}, r"no group has that name; did you mean training\?"),
        ({"learning_rate": None}, r"training\.learning_rate = None: a number above 0 and up to 1 is expected"),
        ({"seed": 1, "training": {"seed": 2}}, r"it is set twice"),
    ],
)
def test_a_keyword_that_is_wrong_is_told_as_a_call_spells_it(keyword: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"QH-U01.*{told}"):
        resolved(**keyword)


def test_the_first_argument_is_a_model_or_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows, named = SMALL["data"]["path"], {"output_dir": "run", "dry_run": True, "quiet": True, "backend": "cpu_torch"}
    (tmp_path / "run.yaml").write_text(f"data: {{path: {rows}}}\n")
    planned = [
        train(str(model_path()), rows, max_steps=3, **named),
        train("run.yaml", model=model_path(), max_steps=3, **named),
        train(config=Path("run.yaml"), model=str(model_path()), max_steps=3, **named),
        train(merged(SMALL, {"training.max_steps": 3, "output_dir": "run"}), dry_run=True, quiet=True),
        train(RunConfig.model_validate(SMALL), max_steps=3, **named),
    ]
    assert {result.plan["steps"] for result in planned} == {3}


@pytest.mark.fault("U40")
def test_two_models_or_two_configurations_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"QH-U40.*'m'.*is taken as the model, and model= is there"):
        train("m", "rows.jsonl", model="other")
    with pytest.raises(ConfigError, match=r"QH-U40.*is taken as the config"):
        train({"training": {"seed": 1}}, config="run.yaml")


@pytest.mark.parametrize(
    ("data", "is_settings"),
    [
        ({"max_seq_length": 5}, True),
        ({}, True),
        ({"sources": [{"path": "a.jsonl"}]}, True),
        ({"sources": [{"path": "a.jsonl"}], "max_rows": 5}, True),
        ({"prompt": ["a"], "completion": ["b"]}, False),
        ({"prompt": ["a"], "completion": ["b"], "sources": [["book"]]}, False),
        ({"prompt": ["a"], "completion": ["b"], "sources": [{"path": "a.pdf"}]}, False),
        ([{"text": "a"}], False),
    ],
)
def test_a_mapping_as_data_is_settings_unless_all_of_it_is_columns(data: object, is_settings: bool) -> None:
    assert is_settings_of_data(data) is is_settings


def test_settings_of_the_data_go_by_group() -> None:
    assert resolved(data={"path": "rows.jsonl", "on_bad_row": "skip"})["data.on_bad_row"] == "skip"


def test_columns_are_taken_as_rows(tmp_path: Path) -> None:
    columns = {"prompt": ["a", "c"], "completion": ["b", "d"], "sources": [["book"], ["page"]]}
    planned = train(str(model_path()), columns, output_dir=tmp_path / "run", backend="cpu_torch", dry_run=True)
    assert planned.plan["sequences"] == 2


def test_validation_rows_of_a_file_stand_beside_those_of_the_settings(tmp_path: Path) -> None:
    settings = {"training": {"eval_steps": 2}, "data": {"validation_path": str(data_path("validation"))}}
    here = {"output_dir": tmp_path / "run", "backend": "cpu_torch", "dry_run": True}
    train(settings, [{"text": "a"}], model=model_path(), **here)
    with pytest.raises(DataError, match=r"QH-D50.*gone\.jsonl") as caught:
        train(settings, [{"text": "a"}], model=model_path(), validation_data="gone.jsonl", **here)
    assert caught.value.where == "data.validation_path"


def test_the_splits_of_a_data_set_are_rows_and_no_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": letter, "completion": "b"} for letter in "acdef"])
    splits = datasets.DatasetDict(train=rows.select(range(3)), validation=rows.select(range(3, 5)))
    here = {"output_dir": tmp_path / "run", "backend": "cpu_torch", "dry_run": True}
    assert train(str(model_path()), splits, eval_steps=1, **here).plan["sequences"] == 3
    assert "training on 3 sequences, validating on 2" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError, match=r"QH-U40.*validation_data and the validation split of data"):
        train(str(model_path()), splits, validation_data="rows.jsonl", **here)
    with pytest.raises(ConfigError, match=r"QH-U40.*validation_data and validation_path"):
        train(str(model_path()), "rows.jsonl", validation_data="a.jsonl", validation_path="b.jsonl", **here)


def test_only_public_names_are_listed() -> None:
    assert dir(qlora_hal) == sorted(qlora_hal.__all__)
    assert all(getattr(qlora_hal, name) is not None for name in dir(qlora_hal))
