"""Folders and files that people name where a model is expected, each told by what it is: an adapter, a run, a GGUF
file, a clone whose large files are still pointers."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from qlora_hal.errors import ModelError
from qlora_hal.files import strict_json
from qlora_hal.files.signatures import is_lfs_pointer, lfs_fix
from qlora_hal.model.safety import conversion_command

_MODEL_FILES = (".json", ".safetensors", ".model", ".jinja", ".txt")
_POINTER_BYTES = 1024
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
_GGUF = "train the model that it was made from, in its folder with config.json and safetensors"


def refuse_pointers(folder: Path) -> None:
    """Raise ModelError (QH-C70) where files of a model are still pointers of Git LFS."""
    small = [path for path in folder.iterdir() if path.suffix in _MODEL_FILES and path.is_file()]
    pointers = sorted(path.name for path in small if path.stat().st_size < _POINTER_BYTES and is_lfs_pointer(path))
    if pointers:
        raise ModelError(
            "QH-C70",
            f"{len(pointers)} files of the model are Git LFS pointers, not the files themselves: "
            f"{', '.join(pointers[:5])}.",
            where=str(folder),
            cause="The folder was cloned without Git LFS.",
            fix=lfs_fix(folder),
            context={"files": pointers},
        )


def refuse_adapter(folder: Path) -> None:
    """Raise ModelError (QH-C71) for a folder of an adapter, or of a run, which is no model by itself."""
    held = next((name for name in _ADAPTER_FILES if (folder / name).is_file()), None)
    if held is not None:
        raise an_adapter(folder, held)
    if (folder / "run.json").is_file():
        out = shlex.quote(f"{folder.name or 'run'}-merged")
        raise ModelError(
            "QH-C71",
            f"{folder.name} is the folder of a run; a base model was expected.",
            where=str(folder),
            fix=f"Name its base model{_named(_base_of_run(folder))}, or make a model of the run: "
            f"qlora-hal merge {shlex.quote(str(folder))} {out}",
        )


def an_adapter(folder: Path, held: str) -> ModelError:
    """The error for an adapter where a base model is expected (QH-C71)."""
    config = _object(folder / "adapter_config.json")
    base = _text(config.get("base_model_name_or_path")) or _text(config.get("model"))
    out = shlex.quote(f"{folder.name or 'adapter'}-merged")
    return ModelError(
        "QH-C71",
        f"{folder.name} is an adapter{f' of {base}' if base else ''}; a base model was expected.",
        where=str(folder),
        cause=f"It holds {held} and no weights of a model.",
        fix=f"Name the base model instead{_named(base)}, or make a model of both first: "
        f"qlora-hal merge {shlex.quote(str(folder))} {out}",
        context={"base_model": base},
    )


def is_a_file(path: Path) -> ModelError:
    """The error for a file where the folder of a model is expected (QH-E71)."""
    kinds = {
        ".gguf": f"A GGUF file is made for llama.cpp; {_GGUF}.",
        ".ggml": f"A GGML file is made for llama.cpp; {_GGUF}.",
        ".safetensors": f"Name its folder instead: {path.parent}.",
        **dict.fromkeys(
            (".bin", ".pt", ".pth", ".ckpt"),
            f"Pickled weights are not opened here. Name the folder, {path.parent}; where it holds no safetensors, "
            f"convert it once: {conversion_command(str(path.parent))}",
        ),
        **dict.fromkeys((".zip", ".gz", ".tar", ".tgz", ".7z"), "Unpack it, and name the folder that comes out."),
        ".json": f"Name its folder instead: {path.parent}.",
    }
    return ModelError(
        "QH-E71",
        f"{path.name} is a file; the folder of a model is expected.",
        where=str(path),
        fix=kinds.get(path.suffix.lower(), "Name the folder that holds config.json and the weights."),
    )


def gguf_only(folder: Path, present: Iterable[str]) -> ModelError | None:
    """The error for a folder whose weights are GGUF files (QH-C71); None where none is `present`."""
    names = sorted(name for name in present if name.endswith(".gguf"))
    if not names:
        return None
    return ModelError(
        "QH-C71",
        f"{folder.name} holds its weights as GGUF alone: {', '.join(names[:5])}.",
        where=str(folder),
        cause="GGUF files are made for llama.cpp, in formats that are not trained on here.",
        fix=f"{_GGUF[:1].upper()}{_GGUF[1:]}.",
    )


def _base_of_run(folder: Path) -> str:
    model = _object(folder / "run.json").get("model")
    return _text(model.get("name")) if isinstance(model, dict) else ""


def _named(base: str) -> str:
    return f" ({base})" if base else ""


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _object(path: Path) -> dict[str, object]:
    """What a small file says, where it can be read: the folder is refused in any case."""
    try:
        return strict_json.read_foreign_object(path)
    except (OSError, strict_json.JsonProblem):
        return {}
