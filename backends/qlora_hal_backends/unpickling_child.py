"""The child process that opens pickled weights: `python -m qlora_hal_backends.unpickling_child`, the job as JSON on its
standard input.

torch's restricted unpickler knows tensors and plain containers; every other name in a pickle ends it before anything is
called. What is read is written as safetensors, then both are opened again and compared bit by bit. One pickle is open
at a time, mapped into memory where its format allows.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from qlora_hal.errors import BackendError, ModelError, QloraHalError, StorageError, UnsafeInputError
from qlora_hal.errors.installation import pip
from qlora_hal.files import durable
from qlora_hal.files.safetensors_file import read_header
from qlora_hal.model.shards import Array, PlannedTensor, total_bytes, write_shards
from qlora_hal.model.weight_files import SINGLE_FILE, refuse_absent
from qlora_hal.processes.child_errors import told_of
from qlora_hal.processes.child_process import end_with_parent

OLDEST_TORCH = (2, 10)
"""The restricted unpickler of older ones can be made to run code: CVE-2025-32434 before 2.6, CVE-2026-24747 before
2.10."""
OUTPUT_HEAD = "lm_head.weight"

_FOREIGN_NAME = re.compile(r"GLOBAL ([\w.]+)")
_DTYPES: Mapping[str, str] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip

Tell = Callable[[str], None]
Tensors = Mapping[str, Any]
"""Tensor name -> torch tensor."""


class Pickles:
    """The tensors of some pickles; only the one that was asked for last is held. `doing` is told with each."""

    def __init__(self, folder: Path, tell: Tell, doing: str) -> None:
        self._folder, self._tell, self._doing = folder, tell, doing
        self._open: tuple[str, Tensors] = ("", {})

    def tensors(self, file: str) -> Tensors:
        """Raises as `opened`."""
        if self._open[0] != file:
            self._tell(f"{self._doing} {file}")
            self._open = ("", {})  # first, for a file that cannot be mapped is in memory whole
            self._open = (file, opened(self._folder / file))
        return self._open[1]


def opened(path: Path) -> Tensors:
    """The tensors of a pickle, which must hold nothing else.

    Raises UnsafeInputError QH-C77 when it does, ModelError QH-C01 when it is damaged, QH-C78 for a tensor that
    safetensors have no place for.
    """
    import pickle

    import torch

    try:
        # Only torch's own archives can be mapped; what was saved before 1.6 is a bare pickle.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if foreign := _FOREIGN_NAME.search(str(error)):
            raise _more_than_tensors(path, f"it names {foreign[1]}, which is not a tensor") from error
        raise _damaged(path, error) from error
    except Exception as error:  # torch raises many kinds on bytes that are no pickle of its own
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise
        raise _damaged(path, error) from error
    if not isinstance(loaded, dict):
        raise _more_than_tensors(path, f"it holds a {type(loaded).__name__} where a table of tensors is expected")
    for name, value in loaded.items():
        _check(name, value, path)
    return loaded


def _check(name: object, value: Any, path: Path) -> None:
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter) or not isinstance(name, str):
        kind = type(value).__name__
        raise _more_than_tensors(path, f"its entry {ascii(name)[:80]} is a {kind} where a tensor is expected")
    problem = ""
    if not name.isprintable():
        problem = "has an unprintable name"
    elif value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
        problem = f"is not a plain tensor ({value.layout}, on {value.device.type})"
    elif str(value.dtype).removeprefix("torch.") not in _DTYPES:
        problem = f"has numbers of the kind {value.dtype}"
    elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
        problem = "is larger than what the file stores for it"
    if problem:
        raise ModelError(
            "QH-C78",
            f"The tensor {ascii(name)[1:-1][:120]} of {path.name} {problem}; it cannot be written as safetensors.",
            where=str(path),
            fix="Choose a version of the model with safetensors.",
        )


def plan(pickles: Pickles, job: Mapping[str, Any]) -> tuple[dict[str, list[PlannedTensor]], list[str]]:
    """(file -> its tensors in order, notes). Raises as `opened`; ModelError QH-C79, QH-C71."""
    planned: dict[str, list[PlannedTensor]] = {}
    found: dict[str, str] = {}
    notes: list[str] = []
    for file in job["files"]:
        tensors = pickles.tensors(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise _unusable(job, f"{file} and {found[twice[0]]} both hold {twice[0]}")
        found |= dict.fromkeys(tensors, file)
        left_out = _named_twice(tensors, job["is_tied"], notes)
        planned[file] = [_planned(name, tensor) for name, tensor in tensors.items() if name not in left_out]
    refuse_absent(Path(job["folder"]), job["places"], found)
    if not any(planned.values()):
        raise _unusable(job, "the pickles hold no tensor")
    return planned, notes


def _named_twice(tensors: Tensors, is_tied: bool, notes: list[str]) -> set[str]:
    """Names to leave out: an output head that is the input embedding, where config.json says so. Any other tensor with
    several names is written once for each, for readers expect every name that the model's code has."""
    names: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            names.setdefault(place, []).append(name)
    left_out = set()
    for same in (sorted(same) for same in names.values() if len(same) > 1):
        if is_tied and OUTPUT_HEAD in same:
            left_out.add(OUTPUT_HEAD)
            first = next(name for name in same if name != OUTPUT_HEAD)
            notes.append(f"{OUTPUT_HEAD} is {first} (tie_word_embeddings): written once, as {first}")
            same = [name for name in same if name != OUTPUT_HEAD]
        if len(same) > 1:
            notes.append(f"one tensor with {len(same)} names is written under each: {', '.join(same)}")
    return left_out


def _planned(name: str, tensor: Any) -> PlannedTensor:
    dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
    return PlannedTensor(name, dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size())


def stored_bytes(tensor: Any) -> Array:
    """A tensor's numbers in row order, as bytes."""
    import torch

    flat: Array = tensor.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def write(
    pickles: Pickles, planned: Mapping[str, Sequence[PlannedTensor]], out: Path, single_file: str
) -> dict[str, str]:
    """Write all tensors into `out`; file name -> SHA-256. Raises StorageError, OSError."""
    tensors = [tensor for together in planned.values() for tensor in together]
    home = {tensor.name: file for file, together in planned.items() for tensor in together}
    _require_space(out, total_bytes(tensors))
    written = write_shards(out, tensors, lambda tensor: stored_bytes(pickles.tensors(home[tensor.name])[tensor.name]))
    if list(written) == [SINGLE_FILE] and single_file != SINGLE_FILE:
        (out / SINGLE_FILE).rename(out / single_file)
        written = {single_file: written[SINGLE_FILE]}
    return written


def _require_space(out: Path, needed: int) -> None:
    free = durable.free_bytes(out)
    if free is not None and free < needed:
        raise StorageError(
            "QH-S09",
            f"The converted weights need {needed} bytes; {free} are free at {out.parent}.",
            where=str(out.parent),
            fix="Free space, or choose a folder on another disk.",
            context={"needed_bytes": needed, "free_bytes": free},
        )


def compare(pickles: Pickles, planned: Mapping[str, Iterable[PlannedTensor]], out: Path, files: Iterable[str]) -> None:
    """Raise StorageError QH-S56 unless each tensor in `out` has kind, shape and bits of the pickle's."""
    places = {name: (out / file, entry) for file in files for name, entry in read_header(out / file).tensors.items()}
    for file, together in planned.items():
        for tensor in together:
            path, entry = places[tensor.name]
            read = np.fromfile(path, np.uint8, entry.byte_count, offset=entry.begin)
            alike = (entry.dtype, entry.shape) == (tensor.dtype, tensor.shape)
            if not alike or not np.array_equal(read, stored_bytes(pickles.tensors(file)[tensor.name])):
                raise StorageError(
                    "QH-S56",
                    f"{tensor.name} was written to {path.name}, and something else was read back.",
                    where=str(out.parent),
                    cause="The disk or its driver loses data, or the pickle was changed in the meantime.",
                    fix="Check the disk, then start again; nothing was kept.",
                )


def convert(job: Mapping[str, Any], tell: Tell) -> dict[str, object]:
    """Do the job; what was written."""
    _require_safe_torch()
    folder, out = Path(job["folder"]), Path(job["out"])
    planned, notes = plan(Pickles(folder, tell, "looking into"), job)
    files = write(Pickles(folder, tell, "converting"), planned, out, job["single_file"])
    compare(Pickles(folder, tell, "comparing with what was written:"), planned, out, files)
    tensors = [tensor for together in planned.values() for tensor in together]
    size = sum(tensor.byte_count for tensor in tensors)
    return {"files": files, "tensors": len(tensors), "bytes": size, "notes": notes}


def _require_safe_torch() -> None:
    import importlib.metadata

    lowest = ".".join(map(str, OLDEST_TORCH))
    try:
        found = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        found = ""
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if numbers < OLDEST_TORCH:
        raise BackendError(
            "QH-E64",
            f"Pickles are opened with torch {lowest} or newer; {found or 'none'} is installed.",
            cause="The restricted unpickler of older ones can be made to run code (CVE-2025-32434, CVE-2026-24747).",
            fix=pip(f"install 'torch>={lowest}'") + ", in an environment of its own if necessary.",
        )


def _more_than_tensors(path: Path, what: str) -> UnsafeInputError:
    return UnsafeInputError(
        "QH-C77",
        f"{path.name} holds more than tensors: {what}.",
        where=str(path),
        cause="Only tensors are taken out of a pickle; anything else could be a program, and nothing of it was run.",
        fix="Choose a version of the model with safetensors, or ask its author for one.",
    )


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(
        "QH-C01",
        f"{path.name} cannot be read as pickled weights; it has {path.stat().st_size} bytes.",
        where=str(path),
        cause=" ".join(str(error).split())[:200] or type(error).__name__,
        fix="It is cut short or damaged: get the file again from its source.",
    )


def _unusable(job: Mapping[str, Any], what: str) -> ModelError:
    return ModelError(
        "QH-C71",
        f"The weights do not belong together: {what}.",
        where=str(job["folder"]),
        fix="Get all files again, from one revision of the model.",
    )


def main() -> int:
    """Do the job that stands on the standard input; answers go to the standard output, one JSON object a line."""
    said = _own_output()
    job = json.loads(sys.stdin.readline())
    end_with_parent()

    def say(**content: object) -> None:
        print(json.dumps(content), file=said, flush=True)

    try:
        say(**convert(job, lambda text: say(told=text)))
    except QloraHalError as error:
        say(error=told_of(error))
    except OSError as error:
        say(error=told_of(durable.storage_error(error, Path(job["out"]).parent, what="the converted weights")))
    return 0


def _own_output() -> TextIO:
    """The standard output, kept for this module: what libraries print goes to the standard error."""
    said = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return said


if __name__ == "__main__":
    sys.exit(main())
