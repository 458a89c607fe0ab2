"""`backend.options` of the training: each model of a merge is opened with them, by the backend whose they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from qlora_hal.contract.checked_trainer import CheckedTrainer
from qlora_hal.detect import discovery

MakeTrained = Callable[..., Any]
ASKED = {"attention": "eager"}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Mapping[str, object], Mapping[str, object]]]:
    """(backend, options that decide the environment of its import, options that it loads with) of each model."""
    found: list[tuple[str, Mapping[str, object], Mapping[str, object]]] = []
    imported: list[tuple[str, Mapping[str, object]]] = []
    open_trainer, load = discovery.open_trainer, CheckedTrainer.load

    def watched_import(spec: Any, options: Mapping[str, object] | None = None) -> Any:
        imported.append((spec.name, dict(options or {})))
        return open_trainer(spec, options)

    def watched_load(self: CheckedTrainer, source: Any, quantization: Any, compute: Any) -> None:
        found.append((*imported[-1], dict(compute.options)))
        load(self, source, quantization, compute)

    monkeypatch.setattr(discovery, "open_trainer", watched_import)
    monkeypatch.setattr(CheckedTrainer, "load", watched_load)
    return found


def test_every_model_is_opened_as_the_run_trained(
    trained: MakeTrained, tmp_path: Path, opened: list[tuple[str, Mapping[str, object], Mapping[str, object]]]
) -> None:
    trained("nf4", backend_options=ASKED).merge(tmp_path / "merged", requantize="nf4")
    # The trained base, both candidates, and the requantized model.
    assert opened == [("cpu_torch", ASKED, ASKED)] * 4


@pytest.mark.long
def test_a_backend_that_did_not_train_gets_none_of_them(
    trained: MakeTrained, tmp_path: Path, opened: list[tuple[str, Mapping[str, object], Mapping[str, object]]]
) -> None:
    one = trained("nf4", backend_options=ASKED)
    result = one.merge(tmp_path / "merged", base="dequantized", requantize="int4_gptq")
    assert opened == [*[("cpu_torch", ASKED, ASKED)] * 2, ("gptq_int4", {}, {})]
    assert any("none is left to calibrate on" in note for note in result.record["notes"])
