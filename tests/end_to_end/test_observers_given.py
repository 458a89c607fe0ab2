"""Observers given in Python: called as the page says, and refused when they never would be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, merged

import qlora_hal
from qlora_hal import resume, train
from qlora_hal.config.schema import RunConfig
from qlora_hal.errors import ConfigError
from qlora_hal.hooks import Hooks, hookimpl

PAGE = Path(qlora_hal.__file__).parent.parent / "docs" / "run-folder.md"


class Unmarked:
    def qlora_hal_step_finished(self, step: int) -> None:
        raise AssertionError


class Misspelt:
    @hookimpl
    def qlora_hal_step_finnished(self, step: int) -> None:
        raise AssertionError


class OtherArguments:
    @hookimpl
    def qlora_hal_step_finished(self, batch: int) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("observer", "problem"),
    [
        (Unmarked(), r"\(Unmarked\) has no hook; mark its methods with qlora_hal\.hooks\.hookimpl"),
        (5, r"\(int\) has no hook"),
        (Misspelt(), r"\(Misspelt\) has qlora_hal_step_finnished, and no hook has that name; qlora_hal_step_finished"),
        (OtherArguments(), r"\(OtherArguments\) cannot be called: .*batch"),
    ],
)
def test_an_observer_that_would_never_be_called_is_refused(observer: object, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"QH-U20.*Observer 1 {problem}") as caught:
        Hooks([observer])
    assert "<" not in caught.value.message


@pytest.mark.fault("U20", "U41")
@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"observers": Unmarked()}, r"QH-U20.*observers is a value of type Unmarked; a list of observers"),
        ({"observers": None}, r"QH-U20.*observers is a value of type NoneType"),
        ({"observers": "wandb"}, r"QH-U20.*observers is a value of type str"),
        ({"metrics": [len]}, r"QH-U41.*metrics is a value of type list; a mapping of names to functions"),
    ],
)
def test_what_is_no_list_of_observers_and_no_mapping_of_metrics_is_refused(
    given: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        train(merged(SMALL, {"output_dir": str(tmp_path / "run")}), **given)
    with pytest.raises(ConfigError, match=problem):
        resume(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


class NoSteps:
    @hookimpl
    def qlora_hal_config_ready(self, config: RunConfig) -> RunConfig:
        return config.model_copy(update={"training": config.training.model_copy(update={"max_steps": -5})})


@pytest.mark.fault("U01")
def test_a_configuration_of_a_plugin_is_held_against_the_schema(tmp_path: Path) -> None:
    settings = merged(SMALL, {"output_dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"QH-U01.*training.max_steps = -5") as caught:
        train(settings, observers=[NoSteps()], dry_run=True, quiet=True)
    assert caught.value.where == "qlora_hal_config_ready"


def test_the_observer_of_the_page_prints_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = merged(SMALL, {"output_dir": "run", "training.max_steps": 2})
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall("```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(example, {})
    said = capsys.readouterr().out
    assert re.findall(r"step (\d) of 2: loss \d\.\d{3}", said) == ["1", "2"]


def test_a_warm_up_longer_than_the_epochs_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}"} for n in range(16)]
    changes = {
        "output_dir": str(tmp_path / "run"),
        "training.max_steps": None,
        "training.num_train_epochs": 2,
        "training.warmup_steps": 5,
    }
    with pytest.raises(ConfigError, match=r"QH-U01.*training\.warmup_steps is 5, and the run has 4 steps"):
        train(merged(SMALL, changes), data=rows, dry_run=True)
    assert train(merged(SMALL, {**changes, "training.warmup_steps": 4}), data=rows, dry_run=True).plan["steps"] == 4
