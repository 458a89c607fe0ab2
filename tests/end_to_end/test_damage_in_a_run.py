"""Flipped bits, tails of zeros, files that vanish in a run's folder: told, mended where it can be, never trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from stopped_runs import (
    adapter_bytes,
    copied,
    flip,
    newest,
    record,
    resumed,
    rewritten,
    rows_in,
    stopped_run,
    whole_run,
)

from qlora_hal import TrainResult, merge, resume
from qlora_hal.adapter import read_adapter
from qlora_hal.checkpoint import load_checkpoint, save_checkpoint
from qlora_hal.checkpoint.manifest import encode_manifest, read_manifest
from qlora_hal.checkpoint.reading import kept_record
from qlora_hal.demo import model_path
from qlora_hal.errors import AdapterError, CheckpointError
from qlora_hal.files.durable import hashed
from qlora_hal.files.sealed_json import sealed
from qlora_hal.hooks import hookimpl
from qlora_hal.inference.generate import open_generation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return rows_in(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def whole(rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return whole_run(tmp_path_factory.mktemp("whole") / "run", rows)


@pytest.fixture(scope="module")
def stopped(rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped_run(tmp_path_factory.mktemp("stopped") / "run", rows)


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return copied(stopped, tmp_path / "run")


def zero_tail(path: Path) -> None:
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw[: -(len(raw) // 3)] + bytes(len(raw) // 3))


@pytest.mark.fault("C02", "C03")
@pytest.mark.parametrize("damage", [flip, zero_tail])
def test_damaged_tokens_are_prepared_again_and_change_nothing(
    damage: Callable[[Path], None], run: Path, whole: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of training rows, which would give another adapter, and of validation rows, which would give another loss."""
    stores = list((run / "tokens").glob("*.safetensors"))
    assert len(stores) == 2
    for store in stores:
        damage(store)
    result, said = resumed(run, capsys)
    for store in stores:
        assert f"{store.name} cannot be used, its tensors do not match their hash" in said
    assert adapter_bytes(result.adapter_dir) == adapter_bytes(whole.adapter_dir)
    assert result.eval_loss_after == whole.eval_loss_after


@pytest.mark.fault("D16")
def test_other_tokens_of_the_same_rows_are_refused(run: Path) -> None:
    """As another version of the tokenizer's library would make them: whole, and not those of the run."""
    from qlora_hal.data.tokens.store import TokenWriter, open_store
    from qlora_hal.data.tokens.token_rows import TokenRows

    for path in (run / "tokens").glob("*.safetensors"):
        store, metadata = open_store(path)
        ids = store.tokens[:].copy()
        ids[3] += 1
        kept = {key: value for key, value in metadata.items() if key in ("fingerprint", "report")}
        with TokenWriter(path) as writer:
            writer.append(TokenRows(ids, store.trained[:], store.lengths, store.row_numbers, store.digests))
            writer.finish(kept)
    with pytest.raises(CheckpointError, match="token_hashes was") as refused:
        resume(run)
    assert (refused.value.code, refused.value.exit_status) == ("QH-D16", 9)


def with_loop(checkpoint: Path, **changes: object) -> None:
    """The state as a program that makes mistakes would have written it: with hashes that fit."""
    path, manifest = checkpoint / "trainer_state.json", read_manifest(checkpoint)
    document = json.loads(path.read_text())
    document["loop"] |= changes
    path.write_text(json.dumps(document))
    files = {**manifest.files, path.name: hashed(path)}
    (checkpoint / "MANIFEST.json").write_bytes(encode_manifest(manifest.step, files, manifest.summary))


@pytest.mark.fault("C04")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"best_loss": "x"}, r"best_loss is a str \('x'\), float \| None is expected"),
        ({"micro_batch_splits": None}, "micro_batch_splits is a NoneType"),
        ({"steering": 5}, "steering is a int"),
        ({"steering": {"due": 5}}, "its loop cannot be read"),
        ({"steering": {"factors": [1]}}, "its loop cannot be read"),
        ({"tokens_seen": [1]}, "tokens_seen is a list"),
        ({"step": -1}, "its loop is at step -1, its state at step 2"),
        ({"step": 1e300}, "step is a float"),
    ],
    ids=["best_loss", "splits", "steering", "due", "factors", "tokens", "other_step", "no_step"],
)
def test_a_state_that_the_loop_cannot_go_on_from_is_refused_before_the_model_loads(
    changes: dict[str, object], words: str, run: Path
) -> None:
    with_loop(newest(run), **changes)
    with pytest.raises(CheckpointError, match=words) as refused:
        resume(run)
    assert (refused.value.code, refused.value.exit_status) == ("QH-C04", 9)


# the adapters ---------------------------------------------------------------------------------------------------------
def edited(**changes: object) -> Callable[[Path], None]:
    def edit(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_provenance(adapter: Path) -> None:
    path = adapter / "qlora_hal.json"
    path.write_text(path.read_text().replace('"weight_format": "nf4"', '"weight_format": "fp4"'))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (lambda adapter: flip(adapter / "adapter_model.safetensors"), "its tensors differ"),
    "a zero tail": (lambda adapter: zero_tail(adapter / "adapter_model.safetensors"), "its tensors differ"),
    "another alpha": (edited(lora_alpha=64), "alpha is 64.0, 16.0 was written"),
    "rank-stabilized": (edited(use_rslora=True), "use_rslora is True, False was written"),
    "another storage": (edit_provenance, "qlora_hal.json does not match its own hash"),
}


@pytest.mark.fault("C22")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_changed_adapter_is_not_opened(damage: str, whole: TrainResult, tmp_path: Path) -> None:
    run = copied(whole.run_dir, tmp_path / "run")
    change, words = DAMAGES[damage]
    change(run / "adapter")
    for opening in (
        lambda: open_generation(run_dir=run),
        lambda: open_generation(adapter_dir=run / "adapter", model=str(model_path())),
        lambda: merge(run, tmp_path / "merged"),
        lambda: read_adapter(run / "adapter"),
    ):
        with pytest.raises(AdapterError, match="was changed after it was written") as refused:
            opening()
        assert (refused.value.code, refused.value.exit_status) == ("QH-C22", 5)
        assert words in refused.value.message
    assert not (tmp_path / "merged").exists()


def test_what_a_publisher_edits_is_no_damage(whole: TrainResult, tmp_path: Path) -> None:
    adapter = copied(whole.adapter_dir, tmp_path / "adapter")
    edited(base_model_name_or_path="somebody/base")(adapter)
    (adapter / "README.md").write_text("# Mine")
    before = read_adapter(whole.adapter_dir)
    assert all((read_adapter(adapter).tensors[name] == tensor).all() for name, tensor in before.tensors.items())


@pytest.mark.fault("C22")
def test_a_damaged_adapter_of_an_ended_run_is_written_again_to_the_same_bits(
    whole: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(whole.run_dir, tmp_path / "run")
    flip(run / "adapter" / "adapter_model.safetensors")
    damaged = adapter_bytes(run / "adapter")
    result, said = resumed(run, capsys)
    assert "the run has ended, but adapter is not what it wrote there" in said
    assert adapter_bytes(run / "adapter") == adapter_bytes(whole.adapter_dir)
    assert result.eval_loss_after == whole.eval_loss_after
    (aside,) = run.glob(".damaged-adapter-*")
    assert adapter_bytes(aside) == damaged
    assert "already finished" in resumed(run, capsys)[1]


@pytest.fixture
def judged_best_at_step_2(run: Path) -> Path:
    """As if no later step could be better: what the run ends with is its best adapter, that of step 2."""
    path = newest(run)
    state, kept = load_checkpoint(path), kept_record(path)
    assert state.loop["best_step"] == state.step == 2
    save_checkpoint(run, replace(state, loop={**state.loop, "best_loss": 1e-6}), keep=2, record=kept)
    return run


@pytest.mark.fault("C22")
@pytest.mark.parametrize("damage", ["flipped", "of another alpha", "of another step", "gone"])
def test_a_damaged_best_adapter_comes_back_from_the_checkpoint_of_its_step(
    damage: str, judged_best_at_step_2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = judged_best_at_step_2
    expected = adapter_bytes(newest(run))
    if damage == "flipped":
        flip(run / "best_adapter" / "adapter_model.safetensors")
    elif damage == "gone":
        shutil.rmtree(run / "best_adapter")
    elif damage == "of another step":
        path = run / "best_adapter" / "qlora_hal.json"
        path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "step": 3})))
    else:
        edited(lora_alpha=64)(run / "best_adapter")
    result, said = resumed(run, capsys)
    assert "best_adapter was written again from the checkpoint of step 2" in said
    assert "the adapter of step 2 is kept" in said
    assert adapter_bytes(result.adapter_dir) == expected
    kept_aside = list(run.glob(".damaged-best_adapter-*"))
    assert len(kept_aside) == (0 if damage in ("gone", "of another step") else 1)


@pytest.mark.fault("C22")
def test_a_best_adapter_that_is_damaged_while_the_run_lives_is_not_given_out(
    judged_best_at_step_2: Path, whole: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    class Damage:
        @hookimpl
        def qlora_hal_step_finished(self, step: int) -> None:
            if step == 4:
                flip(judged_best_at_step_2 / "best_adapter" / "adapter_model.safetensors")

    result, said = resumed(judged_best_at_step_2, capsys, observers=[Damage()])
    assert "the adapter of step 2, with the lowest validation loss, cannot be used" in said
    assert "the last adapter is kept" in said
    assert adapter_bytes(result.adapter_dir) == adapter_bytes(whole.adapter_dir)


def test_a_best_adapter_that_no_checkpoint_keeps_is_said_to_be_lost(
    whole: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(whole.run_dir, tmp_path / "run")
    shutil.rmtree(newest(run))  # of step 4; that of step 3 knows a best adapter of step 2, whose checkpoint is gone
    flip(run / "best_adapter" / "adapter_model.safetensors")
    result, said = resumed(run, capsys)
    assert "the adapter of step 2, with the lowest validation loss so far, is lost" in said
    assert adapter_bytes(result.adapter_dir) == adapter_bytes(whole.adapter_dir)


# run.json and metrics.jsonl -------------------------------------------------------------------------------------------
@pytest.mark.fault("S50")
def test_a_run_whose_run_json_is_gone_goes_on_to_the_same_bits(
    run: Path, whole: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    before = record(run)
    (run / "run.json").unlink()
    result, said = resumed(run, capsys)
    assert "run.json was written again from the copy in step-00000002, because it is missing" in said
    assert adapter_bytes(result.adapter_dir) == adapter_bytes(whole.adapter_dir)
    assert result.eval_loss_before == whole.eval_loss_before
    after = record(run)
    assert {key: after[key] for key in ("run_id", "config", "created", "started_at", "origins")} == {
        key: before[key] for key in ("run_id", "config", "created", "started_at", "origins")
    }


@pytest.mark.fault("S50")
def test_a_damaged_record_is_not_answered_from(whole: TrainResult, tmp_path: Path) -> None:
    from qlora_hal.errors import ConfigError

    run = copied(whole.run_dir, tmp_path / "run")
    rewritten(run, lambda content: content["resolved"].update(seed=8), seal=False)
    with pytest.raises(ConfigError, match="it was changed after it was written") as refused:
        open_generation(run_dir=run)
    assert refused.value.code == "QH-S50"
    assert "qlora-hal resume" in refused.value.fix


@pytest.mark.fault("S26")
def test_a_log_that_was_cut_in_the_middle_is_told_by_the_steps_that_are_gone(
    run: Path, whole: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run / "metrics.jsonl"
    raw = log.read_bytes()
    log.write_bytes(raw[: raw.index(b'"step": 1') + 40])
    result, said = resumed(run, capsys)
    assert "metrics.jsonl: the last line was torn" in said
    assert "metrics.jsonl is missing steps 1 to 2" in said
    assert adapter_bytes(result.adapter_dir) == adapter_bytes(whole.adapter_dir)
    assert "tokens_per_second" not in record(run)["timings"]
    assert any("is missing steps 1 to 2" in note for note in record(run)["notes"])
    assert "is missing steps 1 to 2" in " ".join((run / "report.html").read_text().split())


# the model ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def own_model(run: Path, tmp_path: Path) -> Path:
    """A copy of the model, more than the fingerprint reads whole."""
    folder = Path(shutil.copytree(model_path(), tmp_path / "model"))
    assert (folder / "model.safetensors").stat().st_size > 64 * 64 * 1024
    return folder


def flip_between_windows(model: Path) -> None:
    from qlora_hal.model.fingerprint import windows
    from qlora_hal.model.safetensors_headers import read_header

    header = read_header(model / "model.safetensors")
    start, end = 8 + len(header.raw), max(tensor.end for tensor in header.tensors.values())
    (first, length), (second, _) = windows(start, end)[:2]
    assert first + length + 1 < second
    flip(model / "model.safetensors", first + length + 1)


@pytest.mark.fault("E15")
@pytest.mark.long
def test_a_bit_between_the_samples_of_the_fingerprint_is_found_where_the_run_began_with_verify(
    rows: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from small_runs import SMALL, merged
    from stopped_runs import SHORT, StopAfter

    from qlora_hal import train
    from qlora_hal.errors import StoppedError

    model = Path(shutil.copytree(model_path(), tmp_path / "model"))
    changes = {**SHORT, **rows, "model.name_or_path": str(model), "output_dir": str(tmp_path / "run")}
    with pytest.raises(StoppedError):
        train(merged(SMALL, changes), observers=[StopAfter(1)], verify=True)
    run = tmp_path / "run"
    assert "hashed 2 files of the model, 11 MiB" in " ".join(capsys.readouterr().err.split())
    assert set(record(run)["model"]["files"]) == {"config.json", "model.safetensors"}
    assert record(run)["model"]["fingerprint_covers"].startswith("the headers and 64 windows of 64 KiB of each file: ")
    flip_between_windows(model)
    with pytest.raises(
        CheckpointError, match=r"1 of 2 files .* not those that the run began with: model\.safetensors"
    ) as refused:
        resume(run)
    assert (refused.value.code, refused.value.exit_status) == ("QH-E15", 9)
    flip_between_windows(model)
    assert "verified 2 files of the model, 11 MiB" in resumed(run, capsys)[1]


def test_a_run_that_began_without_verify_keeps_the_hashes_from_a_resume_on(
    run: Path, own_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "files" not in record(run)["model"]
    assert "hashed 2 files of the model" in resumed(run, capsys, model=own_model, verify=True)[1]
    flip_between_windows(own_model)
    assert "already finished" in resumed(run, capsys)[1]
    with pytest.raises(CheckpointError, match="QH-E15"):
        resume(run, verify=True)


@pytest.mark.fault("E15")
def test_a_config_json_that_says_something_else_is_refused_without_verify(run: Path, own_model: Path) -> None:
    path = own_model / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "rms_norm_eps": 0.1}))
    with pytest.raises(CheckpointError, match="base_config_hash was") as refused:
        resume(run, model=own_model)
    assert refused.value.code == "QH-E15"
    path.write_text(json.dumps({**content, "transformers_version": "9", "_name_or_path": "elsewhere"}, indent=4))
    assert load_checkpoint(newest(run)).step == 2
    assert resume(run, model=own_model).steps == 4


def test_a_run_whose_checkpoints_were_removed_is_not_called_unsaved(
    run: Path, whole: TrainResult, tmp_path: Path
) -> None:
    finished = copied(whole.run_dir, tmp_path / "finished")
    for folder, fix in ((run, "Start the run again"), (finished, "its adapter can be used as it is")):
        shutil.rmtree(folder / "checkpoints")
        with pytest.raises(CheckpointError, match="its checkpoints were removed since") as refused:
            resume(folder)
        assert refused.value.code == "QH-C04"
        assert fix in refused.value.fix


def test_a_run_that_has_ended_says_that_it_goes_on_nowhere_else(
    whole: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(whole.run_dir, tmp_path / "run")
    resume(run, backend="mlx_lora")
    assert "mlx_lora is not used: the run has ended on cpu_torch" in capsys.readouterr().err
    resume(run, backend="cpu_torch")
    assert "is not used" not in capsys.readouterr().err
