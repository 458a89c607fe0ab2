"""A run that goes on elsewhere: what is kept, what is refused, what is said beforehand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_runs import SMALL, merged

from qlora_hal import TrainResult, resume, train
from qlora_hal.checkpoint import latest_valid_checkpoint, load_checkpoint
from qlora_hal.contract.backend import BackendSpec
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.errors import CheckpointError
from qlora_hal.hooks import hookimpl
from qlora_hal_backends.cpu_torch import SPEC

pytestmark = pytest.mark.slow

SETTINGS = {"training.max_steps": 6, "checkpoint.save_steps": 3, "training.lr_scheduler_type": "cosine"}


class Offering:
    """A second backend: the CPU's own under another name, with fewer capabilities."""

    def __init__(self, spec: BackendSpec) -> None:
        self._spec = replace(spec, probe=lambda: replace(SPEC.probe(), backend=spec.name))

    @hookimpl
    def qlora_hal_backends(self) -> Sequence[BackendSpec]:
        return [self._spec]


def second(**narrowed: object) -> BackendSpec:
    return replace(SPEC, name="second", capabilities=replace(SPEC.capabilities, **narrowed))  # type: ignore[arg-type]


WITHOUT_NF4 = second(
    weight_formats=SPEC.capabilities.weight_formats - {WeightFormat.NF4},
    levels={**SPEC.capabilities.levels, "4bit": WeightFormat.FP4},
)
WITHOUT_8BIT_OPTIMIZERS = second(
    features=SPEC.capabilities.features - {Feature.ADAMW_8BIT, Feature.PAGED_ADAMW, Feature.PAGED_ADAMW_8BIT}
)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, killed while it saved the last: three are safe."""
    return killed(tmp_path_factory.mktemp("runs") / "killed", {})


@pytest.fixture
def half(interrupted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(interrupted, tmp_path / "run", symlinks=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return train(merged(SMALL, {**SETTINGS, "output_dir": str(folder)}))


def killed(folder: Path, extra: dict[str, object]) -> Path:
    config = merged(SMALL, {**SETTINGS, **extra, "output_dir": str(folder)})
    program = f"import json\nfrom qlora_hal import train\ntrain(json.loads({json.dumps(config)!r}))"
    environment = {**os.environ, "QLORA_HAL_FAULTS": "ckpt.before_rename:kill@2"}
    subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=False)
    return folder


def hand_overs(run_dir: Path) -> list[dict[str, object]]:
    recorded: list[dict[str, object]] = json.loads((run_dir / "run.json").read_text())["hand_overs"]
    return recorded


def test_same_format_elsewhere_goes_on_to_the_same_bits(half: Path, whole: TrainResult) -> None:
    moved = resume(half, backend="second", observers=[Offering(second())])
    assert (moved.backend, moved.steps, moved.weight_format) == ("second", 6, "nf4")
    names = ("adapter", "adapter_model.safetensors")
    assert half.joinpath(*names).read_bytes() == whole.run_dir.joinpath(*names).read_bytes()
    (told,) = hand_overs(half)
    assert (told["from_backend"], told["to_backend"], told["step"], told["inexact"]) == ("cpu_torch", "second", 3, [])
    gap = told["gap"]
    assert isinstance(gap, dict)
    assert gap["rows"] == 8
    assert gap["top1"] == 1.0
    # The same arithmetic on the same weights: nothing is left but the rounding of the stored float32.
    assert gap["kl_max"] < 1e-6
    assert "Transferred at step 3: cpu_torch to second" in (half / "report.html").read_text()


@pytest.mark.fault("C12")
def test_other_weight_format_is_refused_with_both_names_until_it_is_asked_for(half: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)nf4 in blocks of 64.*becomes fp4.*--transfer") as caught:
        resume(half, backend="second", observers=[Offering(WITHOUT_NF4)])
    assert (caught.value.code, caught.value.exit_status) == ("QH-C12", 9)


def test_transfer_goes_on_with_the_other_format_and_says_how_far_it_is(half: Path) -> None:
    moved = resume(half, backend="second", transfer=True, observers=[Offering(WITHOUT_NF4)])
    assert (moved.weight_format, moved.steps) == ("fp4", 6)
    run = json.loads((half / "run.json").read_text())
    assert run["resolved"]["backend"] == run["detection"]["chosen"] == "second"
    (told,) = hand_overs(half)
    assert "weight format" not in told["exact"]  # type: ignore[operator]
    assert any("nf4" in change and "fp4" in change for change in told["inexact"])  # type: ignore[union-attr]
    assert 1e-4 < told["gap"]["kl_mean"] < 0.5  # type: ignore[index]


@pytest.mark.fault("C19")
def test_run_goes_there_and_back_again(half: Path, tmp_path: Path) -> None:
    resume(half, backend="second", transfer=True, observers=[Offering(WITHOUT_NF4)])
    path, _ = latest_valid_checkpoint(half)
    assert load_checkpoint(path).provenance["weight_format"] == "fp4"
    back = resume(half, backend="cpu_torch")
    assert back.weight_format == "fp4", "the stored format is kept where the backend has it"


@pytest.mark.long
def test_eight_bit_moments_go_on_in_full_precision_only_when_asked(tmp_path: Path) -> None:
    run = killed(tmp_path / "run", {"training.optim": "adamw_8bit"})
    elsewhere = [Offering(WITHOUT_8BIT_OPTIMIZERS)]
    with pytest.raises(CheckpointError, match=r"adamw_8bit is adamw"):
        resume(run, backend="second", observers=elsewhere)
    assert resume(run, backend="second", transfer=True, observers=elsewhere).steps == 6


@pytest.mark.long
def test_paging_is_no_part_of_the_arithmetic(tmp_path: Path) -> None:
    run = killed(tmp_path / "run", {"training.optim": "paged_adamw"})
    assert resume(run, backend="second", observers=[Offering(WITHOUT_8BIT_OPTIMIZERS)]).steps == 6
    assert hand_overs(run)[0]["inexact"] == []


def test_model_and_data_may_lie_elsewhere_on_the_other_machine(half: Path, tmp_path: Path) -> None:
    model = shutil.copytree(SMALL["model"]["name_or_path"], tmp_path / "model")
    data = shutil.copy(SMALL["data"]["path"], tmp_path / "rows.jsonl")
    assert resume(half, model=model, data=data).steps == 6


@pytest.mark.fault("D16")
def test_other_data_under_the_new_place_are_refused(half: Path, tmp_path: Path) -> None:
    rows = Path(SMALL["data"]["path"]).read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[1:]))
    with pytest.raises(CheckpointError, match="data_fingerprint"):
        resume(half, data=tmp_path / "rows.jsonl")


@pytest.mark.fault("C66")
def test_model_too_far_from_the_saved_one_is_refused_before_the_first_step(half: Path) -> None:
    """Answers of another model: every log-probability belongs to the wrong token."""
    from qlora_hal.run import transfer

    path, _ = latest_valid_checkpoint(half)
    state = load_checkpoint(path)
    answers = {**state.answers, "likeliest": np.roll(state.answers["likeliest"], 1, axis=-1)}
    shifted = np.where(answers["likeliest"] >= 0, (answers["likeliest"] + 1) % 4096, -1).astype(np.int32)

    class SaysWhatWasSaved:
        def logits(self, batch: object) -> np.ndarray:  # type: ignore[type-arg]
            return np.random.default_rng(0).normal(size=(1, batch.input_ids.shape[1], 4096)).astype(np.float32)  # type: ignore[attr-defined]

    gap = transfer.measured_divergence(SaysWhatWasSaved(), {**answers, "likeliest": shifted})
    with pytest.raises(CheckpointError, match="nats per token") as caught:
        transfer.check_divergence(gap)
    assert (caught.value.code, caught.value.exit_status) == ("QH-C66", 9)


def test_divergence_of_a_known_pair_is_the_one_by_formula() -> None:
    """Two places, four tokens: KL by hand in float64, all tokens being named."""
    from qlora_hal.run import transfer

    generator = np.random.default_rng(3)
    before, now = generator.normal(size=(2, 1, 5, 4)).astype(np.float32)

    class Fixed:
        def __init__(self, logits: np.ndarray) -> None:  # type: ignore[type-arg]
            self._logits = logits

        def logits(self, batch: object) -> np.ndarray:  # type: ignore[type-arg]
            return self._logits

    question = transfer.batch_of_tokens(np.arange(5, dtype=np.int32))
    gap = transfer.measured_divergence(Fixed(now), transfer.reference_logits(Fixed(before), [question]))
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True) for x in (before, now))
    expected = float((p * np.log(p / q)).sum(-1).mean())
    assert gap is not None
    # Log-softmax in float32: a few roundings of 2**-24 on numbers below 8, for each of 20 terms.
    assert abs(gap.kl_mean - expected) < 20 * 8 * 2.0**-22
    assert gap.top1 == float((before[0].argmax(-1) == now[0].argmax(-1)).mean())


@pytest.mark.long
def test_options_of_the_backend_left_behind_are_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = killed(tmp_path / "run", {"backend.options": {"attention": "eager"}})
    resume(half, backend="second", observers=[Offering(second())])
    assert "backend.options are those of cpu_torch; second uses its defaults" in capsys.readouterr().err
