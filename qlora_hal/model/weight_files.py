"""Which files of a model folder hold its weights, and their checked headers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from qlora_hal.errors import ModelError
from qlora_hal.files import strict_json
from qlora_hal.model.other_folders import an_adapter, gguf_only
from qlora_hal.model.safetensors_headers import Header, malformed, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_ADAPTER_FILES = frozenset({"adapter_model.safetensors", "adapters.safetensors"})
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
    names = weight_files(folder, [path.name for path in folder.iterdir() if path.is_file()])
    return checked_headers(folder, [read_header(folder / name) for name in names])


def weight_files(folder: Path, present: Collection[str]) -> tuple[str, ...]:
    """Names of the files that hold the weights, in order, of a model whose files are `present`; its index lies in
    `folder`. Others that a repository may have beside them, under other names, hold the same weights again.

    Raises ModelError QH-C71 where there are none, or several that nothing joins, QH-C79 for a shard that is not
    present, and as `read_weight_map`.
    """
    if SINGLE_FILE in present:
        return (SINGLE_FILE,)
    if INDEX_FILE in present:
        return tuple(sorted(set(read_weight_map(folder / INDEX_FILE, present).values())))
    return (_only_file(folder, present),)


def checked_headers(folder: Path, headers: Sequence[Header]) -> tuple[Header, ...]:
    """The headers, held against each other and, where there is one, against the index in `folder`.

    Raises UnsafeInputError QH-C15 for a tensor that two files hold, ModelError QH-C79 for one that the index places
    elsewhere.
    """
    if [header.path.name for header in headers] != [SINGLE_FILE] and (folder / INDEX_FILE).is_file():
        _check_index(folder, read_weight_map(folder / INDEX_FILE, [h.path.name for h in headers]), headers)
    return tuple(headers)


def read_weight_map(index: Path, present: Collection[str] | None = None) -> Mapping[str, str]:
    """Tensor name -> file name of an index whose files are all `present`, or in its folder where that is not given.

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
    missing = [name for name in shards if not ((folder / name).is_file() if present is None else name in present)]
    if missing:
        raise ModelError(
            "QH-C79",
            f"{len(missing)} of {len(shards)} weight files are missing: {', '.join(missing[:5])}.",
            where=str(folder),
            fix="Get the missing files from the model's source.",
            context={"missing": missing},
        )
    return weight_map


def _check_index(folder: Path, weight_map: Mapping[str, str], headers: Sequence[Header]) -> None:
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


def _only_file(folder: Path, present: Collection[str]) -> str:
    """The weights under another name, as auto-gptq writes them."""
    in_folder = sorted(name for name in present if name.endswith(".safetensors") and "/" not in name)
    files = [name for name in in_folder if name not in _ADAPTER_FILES]
    if len(files) == 1:
        return files[0]
    if not files:
        raise _no_weights(folder, present)
    raise ModelError(
        "QH-C71",
        f"{folder.name} holds {len(files)} safetensors files and no {INDEX_FILE}: {_listed(files)}.",
        where=str(folder),
        cause=f"Without {SINGLE_FILE} or an index it is unknown which files belong together.",
        fix=f"Add {INDEX_FILE} from the model's source, or keep one file and name it {SINGLE_FILE}.",
    )


def _no_weights(folder: Path, present: Collection[str]) -> ModelError:
    if "adapter_config.json" in present:
        return an_adapter(folder, "adapter_config.json")
    if gguf := gguf_only(folder, present):
        return gguf
    return ModelError(
        "QH-C71",
        f"{folder.name} holds no safetensors weights; it holds {_listed(sorted(present)) or 'nothing'}.",
        where=str(folder),
        fix="Name a folder with config.json and model.safetensors.",
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
