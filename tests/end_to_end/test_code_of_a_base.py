"""No command that opens a run folder runs the Python files of its base, unless it was told to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import qlora_hal
from qlora_hal import train
from qlora_hal.config.schema import RunConfig
from qlora_hal.demo import data_path, model_path
from qlora_hal.errors import CheckpointError, UnsafeInputError
from qlora_hal.files import sealed_json, strict_json
from qlora_hal.inference.generate import open_generation
from qlora_hal.run.trained_base import trained_config

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
    ("opened", "code"),
    [
        # An edited record is found first where a checkpoint holds a copy of it.
        pytest.param(lambda run: qlora_hal.resume(run, verify=True), "QH-C20", id="resume"),
        pytest.param(lambda run: open_generation(run_dir=run), "QH-X03", id="generate"),
        # For a base named anew the record's word counts for nothing: the base is refused for itself.
        pytest.param(
            lambda run: open_generation(adapter_dir=run / "adapter", model=str(run.parent / "base")),
            "QH-E14",
            id="generate with an adapter",
        ),
        pytest.param(lambda run: qlora_hal.merge(run, run.parent / "merged"), "QH-X03", id="merge"),
        pytest.param(
            lambda run: qlora_hal.merge(run / "adapter", run.parent / "merged"), "QH-X03", id="merge an adapter"
        ),
    ],
)
def test_code_of_a_base_is_not_run_because_a_record_says_so(
    strange_run: Path, opened: Callable[[Path], object], code: str
) -> None:
    with pytest.raises((UnsafeInputError, CheckpointError)) as refusal:
        opened(strange_run)
    assert refusal.value.code == code
    assert not list(strange_run.parent.rglob("ran"))
    assert not (strange_run.parent / "merged").exists()


@pytest.mark.parametrize(
    ("run_config", "model", "trusted", "revision"),
    [
        (None, None, False, "b" * 40),
        (None, "/elsewhere/base", False, None),
        (None, "elsewhere/base", True, "b" * 40),
        (RunConfig.model_validate({"model": {"name_or_path": "m", "revision": "a" * 40}}), None, False, "a" * 40),
        (RunConfig.model_validate({"model": {"name_or_path": "m", "revision": "a" * 40}}), "other", False, None),
        (RunConfig.model_validate({"model": {"name_or_path": "m", "revision": "a" * 40}}), "other", True, "a" * 40),
    ],
)
def test_a_revision_is_of_the_repository_that_training_named(
    run_config: RunConfig | None, model: str | None, trusted: bool, revision: str | None
) -> None:
    """Code of a base that is named anew is run only as it was pinned for training."""
    provenance = {"base_name": "m", "base_revision": "b" * 40}
    found = trained_config(run_config, provenance, {}, model=model, trust_remote_code=trusted, where=Path("adapter"))
    assert (found.model.revision, found.model.trust_remote_code) == (revision, trusted)
