"""Merges that are refused: each with its code, its exit status and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_hal import merge
from qlora_hal.adapter import write_adapter
from qlora_hal.contract.values import Adapter
from qlora_hal.errors import AdapterError, ConfigError, NumericsError, StorageError
from qlora_hal.export.placing import staging
from qlora_hal.files import durable
from qlora_hal.files.sealed_json import sealed

MakeTrained = Callable[..., Any]


def rewritten(one: Any, change: Callable[[dict[str, object]], None]) -> None:
    """Edit what the adapter's qlora_hal.json records."""
    path = one.folder / "qlora_hal.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(sealed(facts)))


@pytest.mark.fault("C60")
@pytest.mark.parametrize("kind", ["file", "folder with files", "link"])
def test_place_that_is_taken_is_refused_before_any_work(trained: MakeTrained, tmp_path: Path, kind: str) -> None:
    one, out = trained("nf4"), tmp_path / "merged"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere")
    else:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="already exists") as caught:
        one.merge(out)
    assert (caught.value.code, caught.value.exit_status) == ("QH-C60", 8)
    assert not list(tmp_path.glob(".merging-*"))


def test_empty_folder_is_a_free_place(trained: MakeTrained, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    trained("none").merge(tmp_path / "merged")
    assert (tmp_path / "merged/merge.json").is_file()


@pytest.mark.fault("C62")
def test_every_value_that_cannot_be_served_is_named_at_once(trained: MakeTrained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        trained("nf4").merge(
            tmp_path / "merged", dtype="float8", base="mine", requantize="int3", max_kl=-1, min_top1=2, row_limit=0
        )
    error = caught.value
    assert (error.code, error.exit_status) == ("QH-C62", 2)
    for word in ("dtype is 'float8'", "base is 'mine'", "requantize is 'int3'", "max_kl", "min_top1", "row_limit"):
        assert word in error.message


@pytest.mark.fault("S09")
def test_too_small_a_disk_is_found_before_the_model_loads(
    trained: MakeTrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trained("nf4")
    from qlora_hal.export import carrying

    monkeypatch.setattr(durable, "free_bytes", lambda place: 1_000_000)
    monkeypatch.setattr(carrying, "Merge", None)  # nothing is loaded: not even the work begins
    with pytest.raises(StorageError, match="The merge needs") as caught:
        one.merge(tmp_path / "merged")
    assert (caught.value.code, caught.value.exit_status) == ("QH-S09", 8)
    assert "--base dequantized" in caught.value.fix
    assert caught.value.context["needed_bytes"] > 1_000_000  # type: ignore[operator]


@pytest.mark.fault("S09")
def test_disk_that_fills_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def half_a_merge() -> None:
        with staging(tmp_path / "merged") as folder:
            (folder / "half.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="Disk full") as caught:
        half_a_merge()
    assert caught.value.code == "QH-S09"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("C05")
def test_adapter_of_another_base_is_refused_unless_allowed(trained: MakeTrained, tmp_path: Path) -> None:
    one = trained("nf4", base_fingerprint="0" * 64)
    with pytest.raises(AdapterError, match="another base") as caught:
        one.merge(tmp_path / "merged")
    assert (caught.value.code, caught.value.exit_status) == ("QH-C05", 5)
    result = one.merge(tmp_path / "merged", allow_base_mismatch=True)
    assert any("mismatch allowed" in note for note in result.record["notes"])


@pytest.mark.fault("C08")
def test_adapter_whose_tensors_match_nothing_is_refused(
    trained: MakeTrained, base_model: Callable[..., Path], tmp_path: Path
) -> None:
    one = trained("nf4")
    renamed = {name.replace("model.layers", "transformer.h"): tensor for name, tensor in one.adapter.tensors.items()}
    targets = [name.replace("model.layers", "transformer.h") for name in one.adapter.config.target_modules]
    facts = json.loads((one.folder / "qlora_hal.json").read_text())
    write_adapter(
        tmp_path / "foreign",
        Adapter(renamed, replace(one.adapter.config, target_modules=tuple(targets))),
        base_name=str(one.model),
        base_revision=None,
        provenance=facts,
    )
    with pytest.raises(AdapterError, match=r"0 of \d+ tensors matched") as caught:
        merge(tmp_path / "foreign", tmp_path / "merged", rows=one.rows, backend="cpu_torch")
    assert caught.value.code == "QH-C08"
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merging-*"))


@pytest.mark.fault("C62")
def test_adapter_that_does_not_say_how_its_base_was_stored_is_asked_for(trained: MakeTrained, tmp_path: Path) -> None:
    one = trained("nf4")
    (one.folder / "qlora_hal.json").unlink()  # as PEFT leaves it
    with pytest.raises(ConfigError, match="how its base was stored") as caught:
        one.merge(tmp_path / "merged")
    assert "--weight-format" in caught.value.fix
    result = one.merge(tmp_path / "merged", weight_format="nf4", double_quant=True)
    assert result.base == "dequantized"
    assert result.record["base"]["trained_as"] == {"weight_format": "nf4", "block_size": 64, "double_quant": True}


@pytest.mark.fault("C62")
def test_weight_format_that_contradicts_the_record_is_refused(trained: MakeTrained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stored as nf4"):
        trained("nf4").merge(tmp_path / "merged", weight_format="none")


@pytest.mark.fault("C64")
def test_adapter_without_a_run_needs_rows(trained: MakeTrained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rows") as caught:
        trained("nf4").merge(tmp_path / "merged", rows=None)
    assert (caught.value.code, caught.value.exit_status) == ("QH-C64", 2)
    assert "--rows" in caught.value.fix


@pytest.mark.fault("C50")
def test_folder_that_is_neither_run_nor_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="neither a run nor an adapter") as caught:
        merge(tmp_path, tmp_path / "merged")
    assert caught.value.code == "QH-C50"


@pytest.mark.fault("C63")
def test_weight_beyond_float16_is_refused_by_name(trained: MakeTrained, tmp_path: Path) -> None:
    one = trained("none")
    tensors = dict(one.adapter.tensors)
    name = next(name for name in tensors if "o_proj.lora_B" in name)
    tensors[name] = np.full_like(tensors[name], 1e6)
    facts = json.loads((one.folder / "qlora_hal.json").read_text())
    write_adapter(
        one.folder,
        Adapter(tensors, one.adapter.config),
        base_name=str(one.model),
        base_revision=None,
        provenance=facts,
    )
    with pytest.raises(NumericsError, match="o_proj") as caught:
        one.merge(tmp_path / "merged", dtype="float16")
    assert (caught.value.code, caught.value.exit_status) == ("QH-C63", 6)
    assert "bfloat16" in caught.value.fix
    assert not list(tmp_path.glob("*merg*"))


def test_what_an_interrupted_merge_left_is_told(
    trained: MakeTrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / ".merging-merged-00000000"
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(4096))
    trained("none").merge(tmp_path / "merged")
    assert "an interrupted merge left" in " ".join(capsys.readouterr().err.split())
    assert left.exists()
    shutil.rmtree(left)


@pytest.mark.fault("C62")
def test_adapted_layers_that_are_stored_under_other_names_are_not_left_out(tmp_path: Path) -> None:
    """Gemma 3 with its vision tower is stored as `language_model.model.…` and loaded as `model.language_model.…`."""
    from drawn_models import write_drawn_model
    from trainers import moved_adapter, source_of

    from qlora_hal.contract.values import AdapterConfig
    from qlora_hal.export.weights import BaseFiles, MergedModel
    from qlora_hal.model.weight_files import read_headers
    from qlora_hal_backends.torch_family.outline import outline

    write_drawn_model(tmp_path, "gemma3")
    modules = dict(outline(source_of(tmp_path), {}).linear_modules)
    adapter = moved_adapter(AdapterConfig(2, 4.0, 0.0, False, tuple(sorted(modules))), modules)
    files = BaseFiles(read_headers(tmp_path))
    facts = source_of(tmp_path).facts
    merged = MergedModel(facts, files, adapter, modules, lambda name: files.float32(f"{name}.weight"), "float32")
    with pytest.raises(ConfigError, match="stored under other names than the loaded model has") as caught:
        merged.tensors()
    assert caught.value.code == "QH-C62"


@pytest.mark.fault("C62")
@pytest.mark.parametrize(
    ("stored", "recorded", "given"), [("nf4", True, False), ("nf4", False, True), ("none", None, True)]
)
def test_double_quantization_other_than_the_recorded_is_refused(
    stored: str, recorded: bool | None, given: bool, trained: MakeTrained, tmp_path: Path
) -> None:
    """It was not used: the merge went on with what the adapter records."""
    one = trained(stored, **({} if recorded is None else {"double_quant": recorded}))
    with pytest.raises(ConfigError, match=r"QH-C62.*double_quant is (true|false), but") as caught:
        one.merge(tmp_path / "merged", double_quant=given)
    assert f"{stored} {'with' if recorded else 'without'} double quantization" in caught.value.message


def test_double_quantization_that_is_not_recorded_is_taken_from_the_request(
    trained: MakeTrained, tmp_path: Path
) -> None:
    one = trained("nf4")
    rewritten(one, lambda facts: facts.update(double_quant=None))
    one.merge(tmp_path / "merged", double_quant=False, base="dequantized")
    assert json.loads((tmp_path / "merged/merge.json").read_text())["base"]["trained_as"]["double_quant"] is False


@pytest.mark.fault("C62")
def test_limits_that_are_no_numbers_are_named(trained: MakeTrained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"QH-C62") as caught:
        trained("none").merge(tmp_path / "m", max_kl="small", min_top1=True, row_limit=2.5, double_quant="yes")
    for word in ("max_kl is 'small'", "min_top1 is True", "row_limit is 2.5", "double_quant is 'yes'"):
        assert word in caught.value.message
