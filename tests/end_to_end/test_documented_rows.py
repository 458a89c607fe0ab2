"""The rows that docs/data.md shows are rows that are trained, each in the format under which it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from small_runs import SMALL, merged
from stopped_runs import SHORT

from qlora_hal import train
from qlora_hal.config.resolve import resolve_settings
from qlora_hal.data import ChatTokenizer, prepare
from qlora_hal.data.source.row_formats import Shape, shape_of
from qlora_hal.demo import model_path
from qlora_hal.report.run_file import read_run_file

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## One row of each format")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"\*\*(\w+)[^*]*\*\*:[^`]*?(?:`[^`]+`[^`]*?)*```jsonl\n(.*?)```", SECTION, re.DOTALL)
ROWS: list[tuple[str, dict[str, Any]]] = [
    (shape, json.loads(line)) for shape, block in BLOCKS for line in block.splitlines()
]


def test_every_format_is_shown_under_its_name() -> None:
    assert {shape for shape, _ in ROWS} == set(get_args(Shape))
    assert len(ROWS) == SECTION.count('\n{"')
    assert [shape_of(row) for _, row in ROWS] == [shape for shape, _ in ROWS]


def test_the_settings_that_are_shown_are_settings(tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    trees = [YAML(typ="safe").load(block) for block in blocks]
    given = [
        resolve_settings({"data": {"path": "x", **tree["data"]} if "sources" not in tree["data"] else tree["data"]})
        for tree in trees
    ]
    assert [bool(one.config.data.columns) or len(one.config.data.sources) for one in given] == [True, 3]


@pytest.mark.slow
@pytest.mark.usefixtures("usual_signals")
def test_a_run_trains_on_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _, row in ROWS))
    changes = {
        **{**SHORT, "training.eval_steps": None, "training.max_steps": None, "data.max_seq_length": 512},
        **{"data.path": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "run")},
    }
    result = train(merged(SMALL, changes))
    assert result.steps == len(ROWS)
    report = read_run_file(tmp_path / "run")["data_report"]
    assert isinstance(report, dict)
    assert report["train"]["rows_used"] == len(ROWS)


@pytest.mark.parametrize("place", range(len(ROWS)))
def test_each_row_is_trained_by_itself(place: int, tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.from_folder(model_path())
    data = resolve_settings({"data": {"max_seq_length": 512}}).config.data
    found = prepare(data, tokenizer, cache_dir=tmp_path, seed=0, rows=[ROWS[place][1]])
    assert found.report.train.trained_tokens > 0
