"""What the user names becomes a folder that is safe to open, or an error that says what else it may have meant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_hal.errors import ModelError, UnsafeInputError
from qlora_hal.model.safety import conversion_command
from qlora_hal.model.source import ModelSource, resolve_model

WriteModel = Callable[..., Path]


def resolve(name: str | Path, **settings: object) -> ModelSource:
    return resolve_model(str(name), **{"revision": None, "trust_remote_code": False, **settings})  # type: ignore[arg-type]


def test_a_local_folder_is_taken_as_it_is(write_model: WriteModel) -> None:
    folder = write_model()
    source = resolve(folder)
    assert (source.path, source.name, source.revision) == (folder, str(folder), None)
    assert len(source.facts.linear_modules) == 14


def test_a_relative_folder_and_the_home_folder_are_understood(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model("org/model")
    monkeypatch.chdir(folder.parent.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("org/model").path == Path("org/model")
    assert resolve("~/model").path == folder


@pytest.mark.parametrize("slip", ["{parent}/tiny-lama", "./tiny-lama", "../{last}/tiny-lama", "tiny-lama/"])
def test_a_slip_in_a_path_is_not_taken_for_a_hub_id(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch, slip: str
) -> None:
    parent = write_model("tiny-llama").parent
    monkeypatch.chdir(parent)
    with pytest.raises(ModelError, match="There is no folder") as caught:
        resolve(slip.format(parent=parent, last=parent.name))
    assert (caught.value.code, caught.value.exit_status) == ("QH-E70", 5)
    assert "tiny-llama" in caught.value.cause


def test_a_path_that_exists_partly_names_both_readings(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_model("models/tiny-llama").parent.parent)
    with pytest.raises(ModelError) as caught:
        resolve("models/tiny-lama")
    assert "tiny-llama" in caught.value.cause
    assert "https://huggingface.co/models/tiny-lama" in caught.value.fix


@pytest.mark.parametrize(("name", "words"), [("model.gguf", "GGUF"), ("model.safetensors", "Name its folder")])
def test_a_file_is_refused_with_what_to_name_instead(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is a file") as caught:
        resolve(tmp_path / name)
    assert caught.value.code == "QH-E71"
    assert words in caught.value.fix


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "qlora-hal unpickle"),
        ("model.pt", "qlora-hal unpickle"),
        ("config.json", "Name its folder"),
        ("model.tar.gz", "Unpack it"),
        ("model.onnx", "Name the folder that holds config.json"),
    ],
)
def test_other_files_are_refused_with_what_to_do(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=r"QH-E71.*is a file") as caught:
        resolve(tmp_path / name)
    assert words in caught.value.fix


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"


@pytest.mark.parametrize(
    "names", [["model.safetensors"], ["tokenizer.json"], ["config.json"], ["model.safetensors", "tokenizer.json"]]
)
def test_pointers_of_git_lfs_are_told_with_the_command_that_gets_the_files(
    write_model: WriteModel, names: list[str]
) -> None:
    folder = write_model()
    for name in names:
        (folder / name).write_text(POINTER)
    with pytest.raises(ModelError, match="QH-C70") as caught:
        resolve(folder)
    assert caught.value.message == (
        f"{len(names)} files of the model are Git LFS pointers, not the files themselves: {', '.join(names)}."
    )
    assert f"git lfs pull in {folder}" in caught.value.fix


@pytest.mark.parametrize(
    ("held", "config", "base"),
    [
        ("adapter_model.safetensors", {"peft_type": "LORA", "base_model_name_or_path": "org/base"}, "org/base"),
        ("adapter_model.bin", {"peft_type": "LORA", "base_model_name_or_path": "org/base"}, "org/base"),
        ("adapters.safetensors", {"fine_tune_type": "lora", "model": "org/base"}, "org/base"),
        ("adapter_model.safetensors", {"peft_type": "LORA"}, ""),
        ("adapter_model.safetensors", None, ""),
    ],
)
def test_an_adapter_is_told_with_the_base_that_it_belongs_to(
    tmp_path: Path, held: str, config: dict[str, str] | None, base: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / held).write_bytes(b"x")
    if config is not None:
        (tmp_path / "mine" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="QH-C71") as caught:
        resolve(tmp_path / "mine")
    of_base = f" of {base}" if base else ""
    assert caught.value.message == f"mine is an adapter{of_base}; a base model was expected."
    assert f"Name the base model instead{f' ({base})' if base else ''}, or" in caught.value.fix
    assert "qlora-hal merge" in caught.value.fix


def test_an_adapter_with_a_config_of_its_base_is_told_too(write_model: WriteModel) -> None:
    folder = write_model()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ModelError, match=r"QH-C71.*is an adapter of org/base"):
        resolve(folder)


def test_a_run_is_told_with_its_base(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"model": {"name": "org/base"}}')
    with pytest.raises(ModelError, match=r"QH-C71.*run is the folder of a run") as caught:
        resolve(tmp_path / "run")
    assert "base model (org/base)" in caught.value.fix


@pytest.mark.parametrize("with_config", [True, False])
def test_a_folder_of_gguf_files_is_told_as_that(write_model: WriteModel, with_config: bool) -> None:
    folder = write_model()
    (folder / "model.safetensors").rename(folder / "model-q4.gguf")
    if not with_config:
        (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"QH-C71.*GGUF alone: model-q4\.gguf") as caught:
        resolve(folder)
    assert "the model that it was made from" in caught.value.fix


def test_the_working_directory_is_named_where_it_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ModelError, match=r"\] empty is not a model folder"):
        resolve(".")


def test_a_folder_without_config_names_the_model_below_it(write_model: WriteModel) -> None:
    folder = write_model("cache/snapshots/0123abc")
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        resolve(folder.parent.parent)
    assert caught.value.code == "QH-C70"
    assert "snapshots/0123abc" in caught.value.fix


@pytest.mark.fault("C17")
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth"]
)
def test_pickle_only_weights_are_refused_unopened(write_model: WriteModel, tmp_path: Path, name: str) -> None:
    folder = write_model()
    (folder / "model.safetensors").unlink()
    canary = tmp_path / "canary"
    # A pickle that would create the canary if anything unpickled it.
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    with pytest.raises(UnsafeInputError, match="pickle files only") as caught:
        resolve(folder)
    assert (caught.value.code, caught.value.exit_status) == ("QH-C17", 10)
    assert name in caught.value.message
    assert f"qlora-hal unpickle {folder} {folder}-safetensors" in caught.value.fix
    assert not canary.exists()


@pytest.mark.fault("C17")
def test_a_folder_with_an_odd_name_is_quoted_in_the_command() -> None:
    assert (
        conversion_command("x'; rm -rf ~") == """qlora-hal unpickle 'x'"'"'; rm -rf ~' 'x'"'"'; rm -rf ~-safetensors'"""
    )


@pytest.mark.fault("C17")
def test_pickles_beside_safetensors_and_training_leftovers_do_not_count(write_model: WriteModel) -> None:
    folder = write_model()
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert resolve(folder).path == folder
    (folder / "pytorch_model.bin").rename(folder / "training_args.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights"):
        resolve(folder)


REMOTE_CODE: dict[str, tuple[dict[str, object], str]] = {
    "auto_map": ({"auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}},
                 "configuration_x.py, modeling_x.py"),
    "auto_map of another repository": ({"auto_map": {"AutoModel": "org/code--modeling_y.Y"}}, "org/code/modeling_y.py"),
    "auto_map with a pair": ({"auto_map": {"AutoTokenizer": ["tok.Slow", None]}}, "tok.py"),
    "model_file of mlx-lm": ({"model_file": "evil.py"}, "evil.py"),
}  # fmt: skip


@pytest.mark.fault("X03")
@pytest.mark.fault("E14")
@pytest.mark.parametrize("case", REMOTE_CODE)
def test_a_model_with_its_own_code_is_refused_with_files_and_revision(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    entry, files = REMOTE_CODE[case]
    folder = write_model(config={"model_type": "x", "vocab_size": 96, **entry})
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    with pytest.raises(UnsafeInputError, match="its own Python files") as caught:
        resolve(folder)
    assert (caught.value.code, caught.value.exit_status) == ("QH-E14", 10)
    assert files in caught.value.message
    assert "revision of this folder" in caught.value.message
    assert "40-digit commit" in caught.value.fix


@pytest.mark.fault("E14")
def test_allowed_code_and_unneeded_python_files_pass(write_model: WriteModel) -> None:
    named = write_model("named", config={"auto_map": {"AutoModel": "m.M"}})
    assert resolve(named, trust_remote_code=True).trust_remote_code
    unneeded = write_model("unneeded")
    shutil.copy(__file__, unneeded / "convert.py")
    assert not resolve(unneeded).trust_remote_code


def test_config_is_read_before_weights_so_that_safety_comes_first(write_model: WriteModel) -> None:
    folder = write_model()
    (folder / "config.json").write_text(json.dumps({"model_file": "x.py"}))
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UnsafeInputError):
        resolve(folder)
