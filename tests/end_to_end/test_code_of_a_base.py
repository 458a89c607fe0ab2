"""No command that opens a run folder runs the Python files of its base, unless it was told to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import qlora_hal
from qlora_hal import train
from qlora_hal.demo import data_path, model_path
from qlora_hal.errors import CheckpointError, UnsafeInputError
from qlora_hal.files import sealed_json, strict_json
from qlora_hal.inference.generate import open_generation

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nraise SystemExit\n"


@pytest.fixture(scope="module")
def strange_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose record was written anew, hash and all, to trust a base that brings code."""
    folder = tmp_path_factory.mktemp("strange")
    base, run = folder / "base", folder / "run"
    shutil.copytree(model_path(), base)
    config: dict[str, object] = {
        "model.name_or_path": str(base),
        "data": {"path": str(data_path("train")), "max_seq_length": 32},
        "training": {"max_steps": 1, "per_device_train_batch_size": 1},
        "backend": {"name": "cpu_torch"},
    }
    train(config, output_dir=str(run))
    described = json.loads((base / "config.json").read_text())
    described["auto_map"] = {"AutoModelForCausalLM": "strange.Model", "AutoConfig": "strange.Config"}
    (base / "config.json").write_text(json.dumps(described))
    (base / "strange.py").write_text(CODE)
    record = strict_json.read_object(run / "run.json")
    record["config"]["model"] |= {"trust_remote_code": True, "revision": "a" * 40}  # type: ignore[index,operator]
    (run / "run.json").write_bytes(strict_json.encode(sealed_json.sealed(record)))
    return run


@pytest.mark.fault("X03")
@pytest.mark.parametrize(
    "opened",
    [
        lambda run: qlora_hal.resume(run, verify=True),
        lambda run: open_generation(run_dir=run),
        lambda run: open_generation(adapter_dir=run / "adapter", model=str(run.parent / "base")),
        lambda run: qlora_hal.merge(run, run.parent / "merged"),
        lambda run: qlora_hal.merge(run / "adapter", run.parent / "merged"),
    ],
    ids=["resume", "generate", "generate with an adapter", "merge", "merge an adapter"],
)
def test_code_of_a_base_is_not_run_because_a_record_says_so(
    strange_run: Path, opened: Callable[[Path], object]
) -> None:
    # An edited record is found first where a checkpoint holds a copy of it (C20); for a base named anew, the record's
    # word counts for nothing, so the base is refused for itself (E14).
    with pytest.raises((UnsafeInputError, CheckpointError), match=r"QH-X03|QH-C20|QH-E14"):
        opened(strange_run)
    assert not list(strange_run.parent.rglob("ran"))
    assert not (strange_run.parent / "merged").exists()
