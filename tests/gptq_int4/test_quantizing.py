"""Quantizing with calibration: in a child process, into a whole folder or none, found again, better than rounding."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptq_int4.gptq_checkpoints import Kind, opened, source_of, write_checkpoint
from gptq_int4.stand_in import GROUP, StandIn
from small_runs import merged

from qlora_hal import RunConfig, resume, train
from qlora_hal.cli.__main__ import main
from qlora_hal.contract.backend import BackendSpec, CalibrationJob, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.demo import data_path, model_path
from qlora_hal.errors import BackendError, ConfigError, DataError, ModelError, QloraHalError
from qlora_hal.inference.generate import open_generation
from qlora_hal.model.source import ModelSource
from qlora_hal.quantize.calibration import Recipe, cached, checked_calibration, quantize_into
from qlora_hal.quantize.folder import MANIFEST_FILE
from qlora_hal_backends.gptq_int4 import SPEC
from qlora_hal_backends.gptq_int4.quantizing import check_group_size
from qlora_hal_oracle import min_max_grid, round_to_grid
from qlora_hal_oracle.random_models import SHAPES, TinyModel, draw_tensors, linear_shapes, write_model

pytestmark = pytest.mark.slow

STORAGE = Quantization(WeightFormat.INT4_GPTQ, GROUP)
ROWS: list[list[int]] = np.random.default_rng(4).integers(3, 300, (24, 48)).tolist()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("plain")
    model = write_model(folder / "model", SHAPES[0], draw_tensors(SHAPES[0], np.random.default_rng(0)))
    (model.folder / "generation_config.json").write_text("{}")
    return model


@pytest.fixture(scope="module")
def quantized(plain: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """The real GPTQModel, on the CPU, in its child process, with the variable unset that it dies without."""
    calibration = checked_calibration(ROWS, context=512, where="a test")
    out = tmp_path_factory.mktemp("quantized") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GPTQMODEL_CPU_WORKERS", raising=False)
        return quantize_into(
            out, ModelSource.in_folder(plain.folder), SPEC, Recipe(STORAGE), calibration, {}, TOLD.append
        )


TOLD: list[str] = []


def test_the_result_is_a_whole_model_folder(plain: TinyModel, quantized: ModelSource) -> None:
    assert sorted(path.name for path in quantized.path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        MANIFEST_FILE,
        "quantize_config.json",
    ]
    facts = source_of(quantized.path).facts
    assert facts.linear_modules == ModelSource.in_folder(plain.folder).facts.linear_modules
    assert facts.prequantized is not None
    assert facts.prequantized.block_size == GROUP
    assert facts.prequantized.settings["checkpoint_format"] == "gptq"
    assert quantized.origin.path == plain.folder
    assert [entry for entry in quantized.path.parent.iterdir() if entry.name.startswith(".")] == []


def test_progress_is_told(quantized: ModelSource) -> None:
    assert any("24 rows (1152 tokens)" in line for line in TOLD)
    assert any("2 of 2" in line for line in TOLD)


def test_no_calibration_row_and_no_path_of_this_machine_is_in_the_result(quantized: ModelSource) -> None:
    for path in quantized.path.glob("*.json"):
        text = path.read_text()
        assert str(quantized.path.parent) not in text
        assert "/tmp" not in text
        assert str(ROWS[0][:4])[1:-1] not in text
    told = json.loads((quantized.path / "config.json").read_text())["quantization_config"]
    assert "dataset" not in told
    assert told["meta"] == {"quantizer": [f"gptqmodel:{_version('gptqmodel')}"]}
    manifest = json.loads((quantized.path / MANIFEST_FILE).read_text())["made_from"]
    assert manifest["calibration_tokens"] == 24 * 48
    assert len(manifest["calibration_sha256"]) == 64


def test_calibrated_codes_serve_the_layers_input_better_than_rounded_ones(
    plain: TinyModel, quantized: ModelSource
) -> None:
    """What GPTQ minimises: the error of each layer's *product* on the calibration rows, not of its weights. Judged on
    the first layer's queries, keys and values, whose input no quantization has touched."""
    tensors = plain.tensors
    inputs = tensors["model.embed_tokens.weight"][np.asarray(ROWS)].reshape(-1, SHAPES[0].hidden_size)
    scale = np.sqrt((inputs.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + SHAPES[0].rms_norm_eps)
    seen = inputs / scale * tensors["model.layers.0.input_layernorm.weight"]
    with opened(quantized.path) as trainer:
        for name in ("q_proj", "k_proj", "v_proj"):
            module = f"model.layers.0.self_attn.{name}"
            weight = tensors[f"{module}.weight"]
            groups = (np.arange(weight.shape[1]) // GROUP).astype(np.int32)
            grid = min_max_grid(weight, groups, bits=4, symmetric=True)
            codes = round_to_grid(weight, grid, groups, bits=4)
            rounded = ((codes - grid.zeros[groups]) * grid.steps.astype(np.float16)[groups].astype(np.float64)).T
            chosen = trainer.dequantized_weight(module).astype(np.float64)
            assert _product_error(seen, weight, chosen) < _product_error(seen, weight, rounded)


def _product_error(seen: Any, weight: Any, stored: Any) -> float:
    return float(((seen @ (stored - weight).T) ** 2).sum())


def _version(name: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(name)


# the cache ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_HAL_CACHE", str(tmp_path / "cache"))
    StandIn.asked, StandIn.version = 0, "1"
    return tmp_path / "cache" / "quantized"


STAND_IN = replace(SPEC, quantizer="gptq_int4.stand_in:StandIn")


def found(
    plain: TinyModel,
    rows: list[list[int]] = ROWS,
    spec: BackendSpec = STAND_IN,
    tell: Callable[[str], None] = lambda text: None,
    **recipe: Any,
) -> ModelSource:
    calibration = checked_calibration(rows, context=512, where="a test")
    return cached(ModelSource.in_folder(plain.folder), spec, Recipe(STORAGE, **recipe), calibration, {}, tell)


def test_a_result_is_found_again_until_something_that_matters_changes(plain: TinyModel, cache: Path) -> None:
    first = found(plain)
    assert found(plain).path == first.path
    assert StandIn.asked == 1
    others = [found(plain, ROWS[:-1]), found(plain, symmetric=False), found(plain, act_order=True)]
    StandIn.version = "2"
    others.append(found(plain))
    assert StandIn.asked == 5
    assert len({first.path, *(other.path for other in others)}) == 5


@pytest.mark.parametrize("damaged", ["model.safetensors", MANIFEST_FILE])
def test_a_damaged_result_is_set_aside_and_made_again(plain: TinyModel, cache: Path, damaged: str) -> None:
    first = found(plain)
    before = (first.path / "model.safetensors").read_bytes()
    short = (first.path / damaged).read_bytes()[:-64]
    (first.path / damaged).write_bytes(short)
    told: list[str] = []
    again = found(plain, tell=told.append)
    assert (again.path, StandIn.asked) == (first.path, 2)
    assert (again.path / "model.safetensors").read_bytes() == before
    (aside,) = (path for path in cache.iterdir() if path != again.path)
    assert (aside / damaged).read_bytes() == short
    assert f"{again.path} is damaged: kept as {aside.name}" in told[0]
    assert found(plain).path == again.path
    assert StandIn.asked == 2


def flipped(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights": lambda folder: flipped(folder / "model.safetensors", -9),
    "config.json": lambda folder: flipped(
        folder / "config.json", (folder / "config.json").read_bytes().index(b"vocab") + 14
    ),
    "another layout of config.json": lambda folder: (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()))
    ),
    "a file that is gone": lambda folder: (folder / "quantize_config.json").unlink(),
    "a file that was added": lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
    "a link": lambda folder: (
        (folder / "config.json").rename(folder.parent / "c")
        and (folder / "config.json").symlink_to(folder.parent / "c")
    ),
    "the manifest's list": lambda folder: (folder / MANIFEST_FILE).write_text(
        (folder / MANIFEST_FILE).read_text().replace('"files"', '"filed"')
    ),
}


@pytest.mark.fault("C03")
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_byte_of_a_result_is_verified_when_it_is_found_again(plain: TinyModel, cache: Path, damage: str) -> None:
    first = found(plain)
    DAMAGES[damage](first.path)
    told: list[str] = []
    again = found(plain, tell=told.append)
    assert StandIn.asked == 2
    assert f"{again.path} is damaged: kept as " in told[0]
    assert found(plain).path == again.path
    assert StandIn.asked == 2


@pytest.mark.fault("X06")
def test_a_link_in_place_of_a_result_is_not_followed(plain: TinyModel, cache: Path, tmp_path: Path) -> None:
    first = found(plain)
    elsewhere = first.path.rename(tmp_path / "elsewhere")
    before = sorted(elsewhere.iterdir())
    first.path.symlink_to(elsewhere)
    assert not found(plain).path.is_symlink()
    assert StandIn.asked == 2
    assert sorted(elsewhere.iterdir()) == before


def test_a_result_of_an_earlier_release_is_used_and_what_cannot_be_verified_is_said(
    plain: TinyModel, cache: Path
) -> None:
    first = found(plain)
    manifest = json.loads((first.path / MANIFEST_FILE).read_text())
    del manifest["files"], manifest["content_sha256"]
    (first.path / MANIFEST_FILE).write_text(json.dumps(manifest))
    told: list[str] = []
    found(plain, tell=told.append)
    assert StandIn.asked == 1
    assert "without hashes: only samples of its weights were compared" in told[1]


def test_what_an_engine_leaves_beside_the_model_is_dropped(plain: TinyModel, cache: Path) -> None:
    made = found(plain)
    assert not (made.path / "quant_log.csv").exists()
    assert not (made.path / "modeling.py").exists()
    assert "private" not in "".join(path.read_text() for path in made.path.glob("*.json"))
    assert str(cache) not in (made.path / "config.json").read_text()


def test_a_failed_attempt_leaves_nothing(plain: TinyModel, cache: Path) -> None:
    with pytest.raises(BackendError, match="in the middle"):
        found(plain, spec=replace(SPEC, quantizer="gptq_int4.stand_in:Failing"))
    assert list(cache.iterdir()) == []


# the child ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def broken_model(tmp_path: Path) -> TinyModel:
    """config.json names an architecture that nobody has: the engine fails in the child."""
    model = write_model(tmp_path / "model", SHAPES[0], draw_tensors(SHAPES[0], np.random.default_rng(0)))
    path = model.folder / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"no_such_model"'))
    return model


def test_a_child_that_fails_is_reported_with_its_log_and_leaves_nothing(
    broken_model: TinyModel, tmp_path: Path
) -> None:
    calibration = checked_calibration(ROWS, context=512, where="a test")
    with pytest.raises(BackendError) as raised:
        quantize_into(
            tmp_path / "out",
            ModelSource.in_folder(broken_model.folder),
            SPEC,
            Recipe(STORAGE),
            calibration,
            {},
            lambda text: None,
        )
    error = raised.value
    assert (error.code, error.exit_status) == ("QH-E62", 3)
    assert "no_such_model" in str(error)
    assert error.context["log"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_output_that_holds_something_is_left_alone(plain: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    calibration = checked_calibration(ROWS, context=512, where="a test")
    with pytest.raises(QloraHalError, match="is not empty") as raised:
        quantize_into(
            tmp_path, ModelSource.in_folder(plain.folder), STAND_IN, Recipe(STORAGE), calibration, {}, lambda text: None
        )
    assert raised.value.code == "QH-S14"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# what is refused ------------------------------------------------------------------------------------------------------
@pytest.mark.fault("S14")
@pytest.mark.parametrize(("kind", "words"), [("file", "is a file"), ("link", "is a link"), ("dead link", "is a link")])
def test_a_place_that_no_folder_can_take_is_refused_before_the_work(
    plain: TinyModel, tmp_path: Path, kind: str, words: str
) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "there")
    if kind == "link":
        (tmp_path / "there").mkdir()
    before, asked = sorted(tmp_path.iterdir()), StandIn.asked
    calibration = checked_calibration(ROWS[:2], context=512, where="a test")
    with pytest.raises(QloraHalError, match=words) as raised:
        quantize_into(
            out, ModelSource.in_folder(plain.folder), STAND_IN, Recipe(STORAGE), calibration, {}, lambda text: None
        )
    assert (raised.value.code, raised.value.exit_status) == ("QH-S14", 8)
    assert (sorted(tmp_path.iterdir()), StandIn.asked) == (before, asked)


def test_calibration_without_a_token_is_refused() -> None:
    with pytest.raises(DataError, match="no row with a token") as raised:
        checked_calibration([[], []], context=512, where="calib.jsonl")
    assert (raised.value.code, raised.value.exit_status) == ("QH-D62", 4)


def test_a_row_longer_than_the_models_context_is_refused() -> None:
    with pytest.raises(DataError, match="513 tokens; this model has positions up to 512") as raised:
        checked_calibration([[5] * 513], context=512, where="calib.jsonl")
    assert (raised.value.code, raised.value.exit_status) == ("QH-D63", 4)


def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do(plain: TinyModel, tmp_path: Path) -> None:
    job = CalibrationJob(plain.folder, tmp_path, ROWS, Quantization(WeightFormat.INT4_GPTQ, 512))
    with pytest.raises(ModelError, match="has 256 inputs") as raised:
        check_group_size(job)
    assert raised.value.code == "QH-C75"
    assert raised.value.fix.endswith("16, 32, 64, 128.")


@pytest.mark.parametrize(
    ("flags", "code", "status"),
    [
        (["--bits", "3"], "QH-B01", 2),
        (["--format", "nf4"], "QH-U16", 2),
        (["--group-size", "0"], "QH-U16", 2),
        (["--group-size", "48"], "QH-B01", 2),
        (["--max-seq-length", "4096"], "QH-D54", 2),
        (["--engine", "auto_gptq"], "QH-E60", 2),
    ],
)
def test_the_command_refuses_what_it_does_not_make(
    flags: list[str], code: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert ran(str(model_path()), str(out), "--data", str(data_path("test")), *flags) == status
    assert code in capsys.readouterr().err
    assert not out.exists()


def test_the_command_refuses_a_model_that_is_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", Kind())
    assert ran(str(tmp_path / "model"), str(tmp_path / "out"), "--data", str(data_path("test"))) == 5
    assert "QH-C76" in capsys.readouterr().err


def test_the_command_refuses_an_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "calib.jsonl").write_text("")
    assert ran(str(model_path()), str(tmp_path / "out"), "--data", str(tmp_path / "calib.jsonl")) == 4
    assert "QH-D" in capsys.readouterr().err


def ran(*arguments: str) -> int:
    return main(["quantize", *arguments])


# in train() -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A 16-bit model meets weight_format int4_gptq; killed after step 2, so that it can be resumed."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_HAL_CACHE", str(folder / "cache"))
        patch.delenv("GPTQMODEL_CPU_WORKERS", raising=False)
        train(config(folder, {"training.max_steps": 2}))
        yield folder


def config(folder: Path, changes: dict[str, object]) -> dict[str, Any]:
    from small_runs import SMALL

    base: dict[str, object] = {
        "output_dir": str(folder / "run"),
        "quantization.weight_format": "int4_gptq",
        "quantization.block_size": 64,
        "quantization.calibration_rows": 12,
        "quantization.calibration_path": str(data_path("validation")),
        "backend": {"name": "auto", "allow_cpu": True},
        "checkpoint.save_steps": 1,
    }
    return merged(SMALL, {**base, **changes})


@pytest.mark.long
def test_a_run_quantizes_its_base_first_and_names_both(run_dir: Path) -> None:
    record = json.loads((run_dir / "run" / "run.json").read_text())
    assert record["resolved"]["backend"] == "gptq_int4"
    assert record["resolved"]["weight_format"] == "int4_gptq"
    assert record["resolved"]["block_size"] == 64
    assert record["resolved"]["kernel_path"].startswith("gptqmodel")
    made = record["model"]["quantized"]
    assert made["fingerprint"] != record["model"]["fingerprint"]
    adapter = json.loads((run_dir / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(model_path())


def test_the_next_run_finds_the_quantized_base_again(run_dir: Path) -> None:
    kept = sorted((run_dir / "cache" / "quantized").iterdir())
    before = kept[0].stat().st_mtime_ns
    result = train(config(run_dir, {"output_dir": str(run_dir / "second"), "training.max_steps": 1}))
    assert result.backend == "gptq_int4"
    assert sorted((run_dir / "cache" / "quantized").iterdir()) == kept
    assert kept[0].stat().st_mtime_ns == before


def test_an_answer_comes_from_the_base_that_was_trained_on(run_dir: Path) -> None:
    pair = open_generation(run_dir=run_dir / "run")
    try:
        base, tuned = pair.answer([{"role": "user", "content": "What does tail do?"}], max_new_tokens=4)
    finally:
        pair.close()
    assert isinstance(base, str)
    assert isinstance(tuned, str)


@pytest.mark.fault("E63")
def test_a_quantized_base_that_is_gone_or_damaged_is_named(run_dir: Path) -> None:
    folder = quantized_of(run_dir)
    away = run_dir / "away"
    folder.rename(away)
    with pytest.raises(ModelError, match="is gone") as raised:
        open_generation(run_dir=run_dir / "run")
    assert raised.value.code == "QH-E63"
    away.rename(folder)
    whole = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(whole.replace(b'"rms_norm_eps": 1', b'"rms_norm_eps": 2'))
    assert (folder / "config.json").read_bytes() != whole
    with pytest.raises(ModelError, match="for this run is damaged") as raised:
        open_generation(run_dir=run_dir / "run")
    assert raised.value.code == "QH-E63"
    (folder / "config.json").write_bytes(whole)


def quantized_of(run_dir: Path) -> Path:
    return Path(json.loads((run_dir / "run" / "run.json").read_text())["model"]["quantized"]["folder"]).expanduser()


def test_a_run_goes_on_with_the_same_base(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "run" / "adapter")  # with it, nothing would be left to do
    result = resume(run_dir / "run")
    assert result.steps == 2
    assert (result.adapter_dir / "adapter_model.safetensors").is_file()


def test_a_calibration_that_nothing_uses_is_refused(tmp_path: Path) -> None:
    asked = config(tmp_path, {"quantization.weight_format": "nf4", "backend": {"name": "cpu_torch"}})
    with pytest.raises(ConfigError, match="nf4 needs no calibration") as raised:
        train(asked)
    assert (raised.value.code, raised.value.exit_status) == ("QH-U15", 2)


def test_a_calibration_file_that_is_missing_is_blamed_on_its_own_setting(tmp_path: Path) -> None:
    asked = config(tmp_path, {"quantization.calibration_path": str(tmp_path / "nowhere.jsonl")})
    with pytest.raises(DataError, match="QH-D50") as raised:
        train(asked)
    assert raised.value.where == "quantization.calibration_path"
    assert "quantization.calibration_path" in raised.value.fix


@pytest.mark.fault("N15")
def test_a_kernel_without_gradients_is_refused_before_the_model_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_HAL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="kernel marlin of gptqmodel cannot train"):
        train(config(tmp_path, {"backend": {"name": "gptq_int4", "options": {"kernel": "marlin"}}}))
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_does_not_quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_HAL_CACHE", str(tmp_path / "cache"))
    train(config(tmp_path, {}), dry_run=True)
    assert not (tmp_path / "cache").exists()


def test_the_light_modules_import_no_engine() -> None:
    script = "import sys, qlora_hal_backends.gptq_int4.quantizing, qlora_hal_backends.gptq_int4 as g; g.SPEC.probe(); "
    script += "print([m for m in ('torch', 'gptqmodel', 'auto_gptq', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == "[]\n"


def test_settings_of_calibration_are_settings() -> None:
    parsed = RunConfig.model_validate({"quantization": {"calibration_rows": 8, "calibration_path": "rows.jsonl"}})
    assert parsed.quantization.calibration_rows == 8
    assert set(linear_shapes(SHAPES[0]))
