"""Pickled weights become safetensors with the same bits in a child process; whatever else a pickle holds is not run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter.test_peft_files import an_adapter
from adapter.test_peft_files import write as write_peft
from gptq_int4.gptq_checkpoints import Kind, opened, write_checkpoint
from safetensors.torch import load_file
from trainers import open_cpu_trainer, random_batch

from qlora_hal.adapter import read_adapter
from qlora_hal.cli.__main__ import main
from qlora_hal.demo import model_path
from qlora_hal.errors import QloraHalError, UnsafeInputError
from qlora_hal.model.pickled_weights import Unpickled, find_pickled, unpickle
from qlora_hal.model.source import resolve_model

pytestmark = pytest.mark.slow

WriteModel = Callable[..., Path]


OPENS_PICKLES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


@pytest.fixture(autouse=True)
def torch_that_opens_pickles(request: pytest.FixtureRequest) -> None:
    """An older one is refused, which the test of E64 shows."""
    shown = request.node.get_closest_marker("fault")
    if not OPENS_PICKLES and (shown is None or "E64" not in shown.args):
        pytest.skip("pickles are opened with torch 2.10 or newer (QH-E64)")


class Payload:
    """Runs a program where an unrestricted unpickler meets it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def converted(folder: Path, out: Path) -> Unpickled:
    return unpickle(folder, out, lambda text: None)


def refused(folder: Path, out: Path, code: str, status: int) -> QloraHalError:
    """Convert what cannot be converted; nothing may be left, and the pickles are as they were."""
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    beside = set(out.parent.iterdir())
    with pytest.raises(QloraHalError) as raised:
        converted(folder, out)
    assert (raised.value.code, raised.value.exit_status) == (code, status), str(raised.value)
    assert set(out.parent.iterdir()) == beside
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    return raised.value


def pickled_instead(folder: Path, name: str = "pytorch_model.bin", **saving: Any) -> dict[str, torch.Tensor]:
    """Replace a folder's only safetensors file by a pickle of the same tensors."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    path.unlink()
    torch.save(tensors, folder / name, **saving)
    return tensors


def pickled_in_shards(folder: Path, shards: int = 3, *, index: bool = True) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for number in range(1, shards + 1):
        file = f"pytorch_model-{number:05}-of-{shards:05}.bin"
        part = {name: tensors[name] for name in sorted(tensors)[number - 1 :: shards]}
        torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    if index:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tensors


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        (a.dtype, a.shape) == (second[name].dtype, second[name].shape) and bits(a) == bits(second[name])
        for name, a in first.items()
    )


# what becomes of it ---------------------------------------------------------------------------------------------------
@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The demo model as it would have been published years ago, and a little more of what lies beside such weights."""
    folder = tmp_path / "demo"
    shutil.copytree(model_path(), folder)
    pickled_in_shards(folder)
    (folder / "training_args.bin").write_bytes(b"not opened")
    (folder / "tf_model.h5").write_bytes(b"not copied")
    return folder


def test_a_sharded_model_computes_the_same_logits_and_trains_the_same_step(demo: Path, tmp_path: Path) -> None:
    done = converted(demo, tmp_path / "out")
    batch = random_batch(3, vocabulary=4096)
    seen = []
    for folder in (model_path(), tmp_path / "out"):
        opened_here = open_cpu_trainer(folder, weight_format="nf4")
        with opened_here.trainer as trainer:
            first = opened_here.step([batch]).loss
            seen.append((first, trainer.logits(batch).tobytes()))
    assert seen[0] == seen[1]
    assert done.tensor_count == 56


def test_no_pickle_and_nothing_but_known_files_is_in_the_result(demo: Path, tmp_path: Path) -> None:
    done = converted(demo, tmp_path / "out")
    beside = {path.name for path in model_path().iterdir() if path.is_file()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == beside
    for name in beside - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (demo / name).read_bytes()
    assert done.notes == ("not copied: tf_model.h5, training_args.bin",)
    assert resolve_model(str(tmp_path / "out"), revision=None, trust_remote_code=False).facts.linear_modules


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_with_an_index_and_by_numbers(write_model: WriteModel, tmp_path: Path, index: bool) -> None:
    folder = write_model()
    tensors = pickled_in_shards(folder, index=index)
    done = converted(folder, tmp_path / "out")
    assert list(done.files) == ["model.safetensors"]
    assert same_bits(load_file(tmp_path / "out" / "model.safetensors"), tensors)


def test_large_models_get_several_files_and_a_new_index(
    write_model: WriteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, for the child has no setting for the size of a file."""
    from qlora_hal.model.shards import write_shards
    from qlora_hal_backends import unpickling_child

    folder = write_model()
    tensors = pickled_in_shards(folder)
    monkeypatch.setattr(unpickling_child, "write_shards", partial(write_shards, shard_bytes=20_000))
    (tmp_path / "out").mkdir()
    found = find_pickled(folder)
    job = {"folder": str(folder), "out": str(tmp_path / "out"), "files": found.files, "places": found.places}
    told: list[str] = []
    done = unpickling_child.convert({**job, "single_file": found.single_file, "is_tied": False}, told.append)
    shutil.copy(folder / "config.json", tmp_path / "out")
    assert len(done["files"]) > 1  # type: ignore[arg-type]
    facts = resolve_model(str(tmp_path / "out"), revision=None, trust_remote_code=False).facts
    assert facts.tensors.keys() == tensors.keys()
    assert len([line for line in told if line.startswith("looking into")]) == 3


def test_every_kind_of_number_keeps_its_bits(write_model: WriteModel, tmp_path: Path) -> None:
    """Not a number and negative zero included; a transposed tensor, one without elements, one that is a single number,
    a parameter, and a file of torch before 1.6."""
    folder = write_model()
    (folder / "model.safetensors").unlink()
    plain = torch.tensor([[1.0, -0.0, float("nan")], [2.0, float("inf"), -3.5]])
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    tensors = {f"x.{dtype}": plain.to(dtype) for dtype in dtypes}
    whole = torch.arange(6).reshape(2, 3)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint32, torch.bool):
        tensors[f"x.{dtype}"] = whole.to(dtype)
    tensors |= {"transposed": plain.T, "none": torch.empty(0, 3), "single": torch.tensor(7), "part": plain[1]}
    held = OrderedDict(tensors, parameter=torch.nn.Parameter(plain))
    for number, legacy in enumerate((False, True)):
        if legacy:  # which had no such numbers
            held = OrderedDict((n, t) for n, t in held.items() if "float8" not in n and "uint32" not in n)
        torch.save(held, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        converted(folder, tmp_path / f"out-{number}")
        found = load_file(tmp_path / f"out-{number}" / "model.safetensors")
        assert same_bits(found, {name: tensor.detach().contiguous() for name, tensor in held.items()})


def test_a_tied_head_is_written_once_and_other_shared_tensors_under_each_name(
    write_model: WriteModel, tmp_path: Path
) -> None:
    folder = write_model()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    norm = "model.layers.{}.input_layernorm.weight"
    tensors[norm.format(1)] = tensors[norm.format(0)]
    torch.save(tensors, folder / "pytorch_model.bin")
    untied = converted(folder, tmp_path / "untied")
    assert "lm_head.weight" in load_file(tmp_path / "untied" / "model.safetensors")
    assert len(untied.notes) == 2
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tied = converted(folder, tmp_path / "tied")
    found = load_file(tmp_path / "tied" / "model.safetensors")
    assert found.keys() == tensors.keys() - {"lm_head.weight"}
    assert "written once, as model.embed_tokens.weight" in tied.notes[0]
    assert "2 names" in tied.notes[1]


@pytest.mark.needs_gptqmodel
def test_a_gptq_checkpoint_keeps_its_file_name_and_decodes_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "gptq"
    name = "gptq_model-4bit-64g.safetensors"
    decoded = write_checkpoint(folder, Kind(), weights_file=name, config_file="quantize_config.json")
    tensors = pickled_instead(folder, "gptq_model-4bit-64g.bin")
    done = converted(folder, tmp_path / "out")
    assert list(done.files) == [name]
    assert same_bits(load_file(tmp_path / "out" / name), tensors)
    assert (tmp_path / "out" / "quantize_config.json").is_file()
    with opened(tmp_path / "out") as trainer:
        for module, weight in decoded.items():
            assert np.array_equal(trainer.dequantized_weight(module), weight.astype(np.float32))


def test_an_adapter_of_peft_is_converted_too(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "adapter", an_adapter())
    expected = read_adapter(folder)
    pickled_instead(folder, "adapter_model.bin")
    with pytest.raises(UnsafeInputError) as raised:
        read_adapter(folder)
    assert f"qlora-hal unpickle {folder} {folder}-safetensors" in raised.value.fix
    converted(folder, tmp_path / "out")
    found = read_adapter(tmp_path / "out")
    assert found.config == expected.config
    assert {n: t.tobytes() for n, t in found.tensors.items()} == {n: t.tobytes() for n, t in expected.tensors.items()}


# what is refused ------------------------------------------------------------------------------------------------------
@pytest.mark.fault("C77", "X01")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["an entry", "the whole", "beside tensors"])
def test_a_pickle_with_a_program_is_refused_and_the_program_never_runs(
    write_model: WriteModel, tmp_path: Path, place: str, legacy: bool
) -> None:
    folder, canary = write_model(), tmp_path / "canary"
    tensors = pickled_instead(folder)
    held = {
        "an entry": {"x": Payload(canary)},
        "the whole": Payload(canary),
        "beside tensors": {**tensors, "y": [Payload(canary)]},
    }[place]
    torch.save(held, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    error = refused(folder, tmp_path / "out", "QH-C77", 10)
    assert "system" in error.message
    assert not canary.exists()
    # The same file in an unrestricted unpickler: the test would see the program run.
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert canary.exists()


@pytest.mark.fault("C77")
@pytest.mark.parametrize("held", [[1, 2], {"state_dict": {"x": torch.ones(2)}}, {"x": 1.0}, {3: torch.ones(2)}])
def test_what_is_no_table_of_tensors_is_refused(write_model: WriteModel, tmp_path: Path, held: object) -> None:
    folder = write_model()
    pickled_instead(folder)
    torch.save(held, folder / "pytorch_model.bin")
    assert "is expected" in refused(folder, tmp_path / "out", "QH-C77", 10).message


@pytest.mark.fault("C78")
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(2, 2).to_sparse(), "sparse"),
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.ones(1).expand(10**6, 10**6), "larger than what the file stores"),
    ],
)
def test_a_tensor_without_a_place_in_safetensors_is_refused(
    write_model: WriteModel, tmp_path: Path, tensor: torch.Tensor, words: str
) -> None:
    folder = write_model()
    pickled_instead(folder)
    torch.save({"x": tensor}, folder / "pytorch_model.bin")
    assert words in refused(folder, tmp_path / "out", "QH-C78", 5).message


@pytest.mark.fault("C01")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_pickle_that_is_cut_short_is_refused(
    write_model: WriteModel, tmp_path: Path, kept: float, legacy: bool
) -> None:
    folder = write_model()
    pickled_instead(folder, _use_new_zipfile_serialization=not legacy)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert "get the file again" in refused(folder, tmp_path / "out", "QH-C01", 5).fix


@pytest.mark.fault("C01")
def test_what_is_no_pickle_at_all_is_refused(write_model: WriteModel, tmp_path: Path) -> None:
    folder = write_model()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, tmp_path / "out", "QH-C01", 5)


@pytest.mark.fault("C04")
def test_shards_that_do_not_fit_their_index_are_refused(write_model: WriteModel, tmp_path: Path) -> None:
    folder = write_model()
    pickled_in_shards(folder)
    second, third = (folder / f"pytorch_model-0000{number}-of-00003.bin" for number in (2, 3))
    shutil.copy(second, third)
    refused(folder, tmp_path / "out", "QH-C71", 5)  # the same tensors twice
    torch.save({"other": torch.ones(2)}, third)
    refused(folder, tmp_path / "out", "QH-C79", 5)
    third.unlink()
    assert third.name in refused(folder, tmp_path / "out", "QH-C79", 5).message
    (folder / "pytorch_model.bin.index.json").unlink()
    refused(folder, tmp_path / "out", "QH-C71", 5)


@pytest.mark.fault("C15")
def test_an_index_that_leads_out_of_the_folder_is_refused(write_model: WriteModel, tmp_path: Path) -> None:
    folder = write_model()
    pickled_in_shards(folder)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace('"pytorch_model-00003', '"../pytorch_model-00003'))
    refused(folder, tmp_path / "out", "QH-C15", 10)


def test_a_taken_place_and_a_folder_without_pickles_are_refused(write_model: WriteModel, tmp_path: Path) -> None:
    folder = write_model()
    refused(folder, tmp_path / "out", "QH-U17", 2)
    pickled_instead(folder)
    (tmp_path / "taken").mkdir()
    refused(folder, tmp_path / "taken", "QH-S14", 8)
    (folder / "pytorch_model.bin").unlink()
    refused(folder, tmp_path / "out", "QH-C71", 5)
    refused(folder, folder / "out", "QH-C71", 5)


def test_a_comparison_that_fails_keeps_nothing(write_model: WriteModel, tmp_path: Path) -> None:
    """In this process: bits that change between writing and reading back are found."""
    from qlora_hal_backends import unpickling_child as child

    folder, out = write_model(), tmp_path / "out"
    pickled_instead(folder)
    out.mkdir()
    job = {"folder": str(folder), "files": ["pytorch_model.bin"], "places": {}, "is_tied": False}
    pickles = child.Pickles(folder, lambda text: None, "reading")
    planned, _ = child.plan(pickles, job)
    files = child.write(pickles, planned, out, "model.safetensors")
    child.compare(pickles, planned, out, files)
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(QloraHalError) as raised:
        child.compare(pickles, planned, out, files)
    assert (raised.value.code, raised.value.exit_status) == ("QH-S56", 8)


@pytest.mark.fault("E64")
def test_a_torch_whose_restricted_unpickler_has_holes_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    from qlora_hal_backends.unpickling_child import convert

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.1")
    with pytest.raises(QloraHalError, match=r"2\.9\.1 is installed") as raised:
        convert({}, lambda text: None)
    assert (raised.value.code, raised.value.exit_status) == ("QH-E64", 3)


# the command ----------------------------------------------------------------------------------------------------------
def test_the_command_prints_what_it_wrote(
    write_model: WriteModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model()
    pickled_instead(folder)
    with pytest.raises(UnsafeInputError) as raised:
        resolve_model(str(folder), revision=None, trust_remote_code=False)
    command = raised.value.fix.partition("convert them once: qlora-hal ")[2].split()
    assert command == ["unpickle", str(folder), f"{folder}-safetensors"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tensors"] == 21
    assert len(told["files"]["model.safetensors"]) == 64
    resolve_model(told["out"], revision=None, trust_remote_code=False)
    assert main(command) == 8
    assert "QH-S14" in capsys.readouterr().err


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # Python ignores SIGXFSZ, so writes fail with EFBIG
from qlora_hal.cli.__main__ import main
sys.exit(main(["unpickle", *sys.argv[1:]]))
"""


@pytest.mark.fault("S09")
def test_a_disk_that_fills_up_leaves_nothing(write_model: WriteModel, tmp_path: Path) -> None:
    folder = write_model()
    pickled_instead(folder)
    before = sorted(path.name for path in tmp_path.iterdir())
    command = [sys.executable, "-c", LIMITED, str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 8
    assert "QH-S09" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_child_sees_no_access_token_and_no_module_of_the_working_folder(
    write_model: WriteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_hal.model.pickled_weights import _environment

    folder = write_model()
    pickled_instead(folder)
    (folder / "torch.py").write_text("raise SystemExit(99)")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef0123")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    kept = _environment("scratch")
    assert kept["HF_HUB_OFFLINE"] == "1"
    assert not {"HF_TOKEN", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"} & kept.keys()
    assert converted(folder, tmp_path / "out").tensor_count == 21


def test_a_child_that_dies_is_named(write_model: WriteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_hal.model import pickled_weights

    folder = write_model()
    pickled_instead(folder)
    monkeypatch.setattr(pickled_weights, "CHILD", "gptq_int4")  # a module that nobody can run
    error = refused(folder, tmp_path / "out", "QH-E65", 3)
    assert error.context["log"]
