"""Which files of a model folder hold its weights, and their checked headers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qlora_hal.errors import ModelError
from qlora_hal.files import strict_json
from qlora_hal.model.other_folders import an_adapter, gguf_only
from qlora_hal.model.safetensors_headers import Header, malformed, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LONGEST_NAME = 255
_INDEX_BYTES_LIMIT = 64_000_000


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a model folder. Raises ModelError QH-C70 when it is missing, broken or no object."""
    try:
        return strict_json.read_foreign_object(path, most_bytes=_INDEX_BYTES_LIMIT)
    except (OSError, strict_json.JsonProblem) as error:
        raise ModelError(
            "QH-C70",
            f"{path.name} of the model cannot be read: {error}.",
            where=str(path),
            fix="Get the file again from the model's source.",
        ) from error


def read_headers(folder: Path) -> tuple[Header, ...]:
    """Checked headers of all weight files, in order of file name.

    Raises ModelError QH-C79 for a shard or tensor that the index names and the folder lacks, QH-C71 for a folder
    without weights, and what `read_header` raises.
    """
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return (read_header(folder / SINGLE_FILE),)
    if index.is_file():
        return _sharded(folder, index)
    return (read_header(_only_file(folder)),)


def _sharded(folder: Path, index: Path) -> tuple[Header, ...]:
    weight_map = read_weight_map(index)
    headers = tuple(read_header(folder / name) for name in sorted(set(weight_map.values())))
    _check_index(folder, weight_map, headers)
    return headers


def read_weight_map(index: Path) -> Mapping[str, str]:
    """Tensor name -> file name of an index whose files are all in its folder.

    Raises ModelError QH-C79 for files that are not, QH-C70; UnsafeInputError QH-C15 for a map that is none, or names a
    file elsewhere.
    """
    folder, weight_map = index.parent, read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise malformed(index, "no weight_map from tensor names to file names")
    shards = sorted(set(weight_map.values()))
    for name in shards:
        if Path(name).name != name or name in {"", ".", ".."} or "\\" in name or "\0" in name:
            raise malformed(index, f"a shard name that escapes the folder: {name[:_LONGEST_NAME]!r}")
        if len(name.encode("utf-8", "surrogatepass")) > _LONGEST_NAME:
            raise malformed(
                index, f"a shard name of {len(name)} characters; a file name has up to {_LONGEST_NAME} bytes"
            )
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            "QH-C79",
            f"{len(missing)} of {len(shards)} weight files are missing: {', '.join(missing[:5])}.",
            where=str(folder),
            fix="Get the missing files from the model's source.",
            context={"missing": missing},
        )
    return weight_map


def _check_index(folder: Path, weight_map: Mapping[str, str], headers: tuple[Header, ...]) -> None:
    found: dict[str, str] = {}
    for header in headers:
        for name in header.tensors:
            if name in found:
                raise malformed(header.path, f"the tensor {name!r} that {found[name]} holds too")
            found[name] = header.path.name
    refuse_absent(folder, weight_map, found)


def refuse_absent(folder: Path, weight_map: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise ModelError QH-C79 for tensors that are not in the file that the index names; `found` is where they are."""
    absent = [name for name, shard in weight_map.items() if found.get(name) != shard]
    if absent:
        raise ModelError(
            "QH-C79",
            f"{len(absent)} tensors are not in the file that the index names, first {absent[0]} "
            f"in {weight_map[absent[0]]}.",
            where=str(folder),
            cause="Index and weight files come from different versions of the model.",
            fix="Get index and weight files again, all from one revision.",
            context={"absent": absent[:20]},
        )


def _only_file(folder: Path) -> Path:
    """The weights under another name, as auto-gptq writes them."""
    adapter_names = {"adapter_model.safetensors", "adapters.safetensors"}
    files = sorted(p for p in folder.glob("*.safetensors") if p.name not in adapter_names)
    if len(files) == 1:
        return files[0]
    if not files:
        raise _no_weights(folder)
    raise ModelError(
        "QH-C71",
        f"{folder.name} holds {len(files)} safetensors files and no {INDEX_FILE}: {_names(files)}.",
        where=str(folder),
        cause=f"Without {SINGLE_FILE} or an index it is unknown which files belong together.",
        fix=f"Add {INDEX_FILE} from the model's source, or keep one file and name it {SINGLE_FILE}.",
    )


def _no_weights(folder: Path) -> ModelError:
    if (folder / "adapter_config.json").is_file():
        return an_adapter(folder, "adapter_config.json")
    if gguf := gguf_only(folder):
        return gguf
    return ModelError(
        "QH-C71",
        f"{folder.name} holds no safetensors weights; it holds {_names(sorted(folder.iterdir())) or 'nothing'}.",
        where=str(folder),
        fix="Name a folder with config.json and model.safetensors.",
    )


def _names(paths: list[Path]) -> str:
    shown = ", ".join(p.name for p in paths[:8])
    return shown + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
