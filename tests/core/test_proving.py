"""A proof that does not come to its end has failed; it never raises."""

from __future__ import annotations

from pathlib import Path

import pytest
from installed_plugins import GOOD, install

from qlora_hal.detect.self_test import self_test


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        ("print('{'); import os; os._exit(0)", "ended with exit status 0 and no response"),
        ("raise SystemExit(0)", "could not be opened: SystemExit: 0"),
        ("import os; os.abort()", "ended with signal 6"),
    ],
)
def test_a_trainer_that_leaves_or_prints_has_not_proved_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str, reason: str
) -> None:
    install(tmp_path, {"odd-plugin": ("odd", GOOD.replace("nowhere:Nothing", "odd_trainer:Trainer"))})
    (tmp_path / "odd_trainer.py").write_text(trainer)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = self_test("odd", timeout_seconds=60)
    assert said["verdict"] == "fail"
    assert reason in str(said["reason"])


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with signal 9"),
        (
            "from qlora_hal.errors import OutOfMemoryError\n"
            "from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer\n"
            "class Trainer(ReferenceTrainer):\n"
            "    def load(self, *given): raise OutOfMemoryError('QH-N07', 'the GPU is full', fix='x')\n",
            "the GPU is full",
        ),
    ],
    ids=["killed by the system", "refused by the device"],
)
def test_a_proof_that_lacked_memory_is_not_blamed_on_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str, reason: str
) -> None:
    install(tmp_path, {"odd-plugin": ("odd", GOOD.replace("nowhere:Nothing", "odd_trainer:Trainer"))})
    (tmp_path / "odd_trainer.py").write_text(trainer)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = self_test("odd", timeout_seconds=60)
    assert said["verdict"] == "fail"
    assert reason in str(said["reason"])
    assert "driver" not in str(said["fix"])
    assert "qlora-hal doctor --backend odd again" in str(said["fix"])


def test_a_proof_that_only_took_too_long_is_not_blamed_on_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, {"odd-plugin": ("odd", GOOD.replace("nowhere:Nothing", "odd_trainer:Trainer"))})
    (tmp_path / "odd_trainer.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("os.getloadavg", lambda: (1000.0, 0.0, 0.0))
    said = self_test("odd", timeout_seconds=1)
    assert said["verdict"] == "fail"
    assert "did not respond within 1 s, while the machine was busy (load 1000.0 on" in str(said["reason"])
    assert "driver" not in str(said["fix"])
    assert "qlora-hal doctor --backend odd --timeout 4" in str(said["fix"])
