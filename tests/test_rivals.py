"""The adapters of other libraries stay thin and honest: light specs, contracts met, records that say why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_hal.contract.backend import BackendSpec
from qlora_hal.contract.values import IGNORE_LABEL, Batch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def spec_named(name: str) -> BackendSpec:
    from benchmarks import rivals

    spec: BackendSpec = getattr(rivals, name)
    return spec


@pytest.mark.parametrize("name", ["PEFT_BITSANDBYTES", "MLX_LM", "MLX_LM_SUMMED", "UNSLOTH"])
def test_a_spec_is_what_discovery_takes_and_its_probe_answers(name: str) -> None:
    spec = spec_named(name)
    assert spec.contract == 2
    report = spec.probe()
    assert report.ready or report.fix


def test_a_row_is_told_to_mlx_lm_as_its_own_batches_tell_it() -> None:
    """Prompt end and length; a row that skips a token in its middle cannot be told so."""
    pytest.importorskip("mlx_lm")
    from benchmarks.rivals.mlx_lm_trainer import is_one_span, spans

    ids = np.arange(10, dtype=np.int32).reshape(2, 5)
    labels = ids.copy()
    labels[0, :2] = labels[1, :1] = labels[1, 3:] = IGNORE_LABEL
    segments = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
    batch = Batch(ids, labels, ids, segments)
    assert spans(batch).tolist() == [[2, 5], [1, 3]]
    assert is_one_span(batch)
    labels[0, 3] = IGNORE_LABEL
    assert not is_one_span(batch)


def test_every_red_case_of_the_record_has_a_reason_and_stands_in_the_page() -> None:
    record: dict[str, Any] = json.loads((ROOT / "docs" / "runs" / "rivals.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "rivals.md").read_text(encoding="utf-8")
    for name, result in record.items():
        red = sum(section["failed"] for section in result["sections"].values())
        assert red == len(result["red"])
        assert [case["case"] for case in result["red"] if case["why"] == "Not known."] == []
        totals = [sum(s[kind] for s in result["sections"].values()) for kind in ("passed", "failed", "refused")]
        assert f"### `{name}`" in page
        assert f"| all | {' | '.join(map(str, totals))} | |" in page
