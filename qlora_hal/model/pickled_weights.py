"""Pickled weights (`pytorch_model.bin`) into a folder with safetensors. This process opens no pickle.

A child process reads them with torch's restricted unpickler, which knows tensors and calls nothing else, writes
safetensors, and compares both bit by bit. What it wrote is checked here once more before it gets its name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qlora_hal.errors import BackendError, ConfigError, ModelError, StorageError
from qlora_hal.errors.redaction import is_secret_variable
from qlora_hal.files import atomic_folder
from qlora_hal.files.output_path import writable_folder
from qlora_hal.files.scratch import scratch_folder
from qlora_hal.model.facts import text_config
from qlora_hal.model.safetensors_headers import read_header
from qlora_hal.model.safety import NO_WEIGHTS, PICKLE_SUFFIXES
from qlora_hal.model.weight_files import SINGLE_FILE, read_json, read_weight_map
from qlora_hal.processes import child_process
from qlora_hal.processes.child_errors import error_from

CHILD = "qlora_hal_backends.unpickling_child"

COPIED = (
    "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.md", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""What is copied as it is. Indexes of weights are not, they name the pickles."""
_INDEXES = "*.index.json"
_PICKLED_INDEXES = "*.bin.index.json"
_SINGLE_PICKLE = "pytorch_model.bin"
_ADAPTER = re.compile(r"adapter_model\.(bin|pt)")
_NUMBERED = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.\w+")

_STAGING = ".unpickling-"
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
}
_TOLD_OF_FAILURE = 20
"""Lines of the child's standard error that an error carries."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PickledWeights:
    """Pickles that belong together, in order; `places` (tensor -> file) where an index tells; `single_file` is the
    name of the safetensors file if there is only one."""

    files: tuple[str, ...]
    places: Mapping[str, str]
    single_file: str


@dataclass(frozen=True, slots=True)
class Unpickled:
    """What was written: file name -> SHA-256 of its bytes, and what the user should know."""

    out: Path
    files: Mapping[str, str]
    tensor_count: int
    byte_count: int
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        return {
            "out": str(self.out),
            "files": dict(self.files),
            "tensors": self.tensor_count,
            "bytes": self.byte_count,
            "notes": list(self.notes),
        }


def unpickle(folder: Path, out: Path, tell: Tell) -> Unpickled:
    """Write the model or adapter in `folder` as the new folder `out`, its weights as safetensors.

    Every tensor in `out` was compared with the pickle's, bit by bit. Nothing is left of an attempt that fails. Raises
    ModelError (QH-C01 a damaged pickle, QH-C79, QH-C71, QH-C78), UnsafeInputError (QH-C77 more than tensors, QH-C15),
    ConfigError QH-U17, BackendError (QH-E64 no torch that is safe enough, QH-E65), StorageError (QH-S09, QH-S11,
    QH-S12, QH-S14, QH-S56).
    """
    if os.path.lexists(out):
        raise StorageError(
            "QH-S14",
            f"{out} already exists; a new folder is expected.",
            where=str(out),
            fix="Name another folder; nothing was written.",
        )
    pickled = find_pickled(folder)
    writable_folder(out.absolute().parent)
    for note in atomic_folder.left_behind(out, prefix=_STAGING, what="an interrupted conversion"):
        tell(note)
    with atomic_folder.staging(out, prefix=_STAGING, what="the converted weights") as staging:
        written = _written_by_child(folder, pickled, staging, tell)
        for name in written["files"]:
            read_header(staging / name)
        left = _copy_the_rest(folder, staging, pickled)
        atomic_folder.put_in_place(staging, out)
    notes = [*written["notes"], *([f"not copied: {', '.join(left)}"] if left else [])]
    return Unpickled(out, written["files"], written["tensors"], written["bytes"], tuple(notes))


def find_pickled(folder: Path) -> PickledWeights:
    """The pickles of a folder that hold its weights.

    Raises ConfigError QH-U17 when it has safetensors, ModelError QH-C71 when it has no pickles, or several of which
    nothing says that they belong together, QH-C79 when some are missing.
    """
    if not folder.is_dir():
        raise ModelError(
            "QH-E70", f"There is no folder {folder}.", where=str(folder), fix="Name the folder that holds the pickles."
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if safe := [name for name in names if name.endswith(".safetensors")]:
        raise ConfigError(
            "QH-U17",
            f"{folder} already has its weights as safetensors: {', '.join(safe[:4])}.",
            where=str(folder),
            fix="Use it unchanged.",
        )
    pickles = [name for name in names if Path(name).suffix in PICKLE_SUFFIXES and name not in NO_WEIGHTS]
    bases = [name for name in pickles if not _ADAPTER.fullmatch(name)]
    if _SINGLE_PICKLE in bases:
        return PickledWeights((_SINGLE_PICKLE,), {}, SINGLE_FILE)
    indexes = [name for name in names if fnmatch(name, _PICKLED_INDEXES)]
    if len(indexes) == 1:
        places = read_weight_map(folder / indexes[0])
        return PickledWeights(tuple(sorted(set(places.values()))), places, SINGLE_FILE)
    together = bases or pickles
    if len(together) == 1 or (len(together) > 1 and _are_numbered(together)):
        name = SINGLE_FILE if len(together) > 1 else f"{Path(together[0]).stem}.safetensors"
        return PickledWeights(tuple(together), {}, name)
    raise ModelError(
        "QH-C71",
        f"{folder} holds no pickled weights."
        if not together
        else f"{folder} holds {len(together)} pickles, and nothing shows which belong together: "
        f"{', '.join(together[:8])}.",
        where=str(folder),
        fix="Name a folder with pytorch_model.bin, or with pytorch_model.bin.index.json and the files that it names.",
    )


def _are_numbered(names: list[str]) -> bool:
    """`x-00001-of-00003.bin` and all its fellows."""
    found = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    is_complete = len(found) == len(names) and all(int(match["count"]) == len(names) for match in found)
    return is_complete and len({match["stem"] for match in found}) == 1


def _copy_the_rest(folder: Path, staging: Path, pickled: PickledWeights) -> list[str]:
    """Configuration, tokenizer, licence and code files; the names of what stays behind."""
    left = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() or entry.name in pickled.files or fnmatch(entry.name, _INDEXES):
            continue
        wanted = any(fnmatch(entry.name, pattern) for pattern in COPIED)
        if wanted and entry.is_file() and entry.suffix not in PICKLE_SUFFIXES:
            shutil.copyfile(entry, staging / entry.name)  # through links: a hub snapshot is made of them
        elif not entry.name.startswith("."):
            left.append(entry.name)
    templates = folder / "additional_chat_templates"
    for template in sorted(path for path in templates.glob("*.jinja") if path.is_file()):
        (staging / templates.name).mkdir(exist_ok=True)
        shutil.copyfile(template, staging / templates.name / template.name)
    return left


# the child ----------------------------------------------------------------------------------------------------------
def _written_by_child(folder: Path, pickled: PickledWeights, staging: Path, tell: Tell) -> Mapping[str, Any]:
    """Have a child write the weights into `staging`; what it says of them."""
    job = {
        "folder": str(folder.absolute()),
        "files": pickled.files,
        "places": dict(pickled.places),
        "single_file": pickled.single_file,
        "is_tied": _is_tied(folder),
        "out": str(staging),
    }
    with scratch_folder("qlora_hal-unpickling-") as scratch:
        errors = scratch / "stderr.txt"
        with (
            errors.open("wb") as stderr,
            child_process.start(
                child_process.module_command(CHILD),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                cwd=scratch,
                env=_environment(str(scratch)),
            ) as child,
        ):
            try:
                done = _followed(child, json.dumps(job), tell)
                status = child.wait()
            finally:
                child_process.ended(child)  # also where this process is being stopped
        if "error" in done:
            raise error_from(done["error"])
        if status or "files" not in done:
            raise _died(status, errors.read_text(encoding="utf-8", errors="replace"))
    return done


def _is_tied(folder: Path) -> bool:
    """Whether config.json says that input embedding and output head are one tensor."""
    path = folder / "config.json"
    return path.is_file() and text_config(read_json(path)).get("tie_word_embeddings") is True


def _environment(scratch: str) -> dict[str, str]:
    """No access tokens: the child opens files of strangers."""
    kept = {name: value for name, value in os.environ.items() if not is_secret_variable(name)}
    kept.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    return {**kept, **_ENVIRONMENT, "TMPDIR": scratch}


def _followed(child: subprocess.Popen[str], job: str, tell: Tell) -> Mapping[str, Any]:
    """Pass on what the child says on its way; its last word."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(f"{job}\n")
        child.stdin.flush()
    except OSError:  # it died at once; its exit status says more
        return {}
    last: Mapping[str, Any] = {}
    for line in child.stdout:
        try:
            said = json.loads(line)
        except ValueError:  # it was ended in the middle of a line
            break
        if "told" in said:
            tell(str(said["told"]))
        else:
            last = said
    return last


def _died(status: int, stderr: str) -> BackendError:
    ending = f"signal {-status}" if status < 0 else f"exit status {status}"
    log = [line for line in stderr.splitlines() if line.strip()][-_TOLD_OF_FAILURE:]
    return BackendError(
        "QH-E65",
        f"The process that opens pickles ended without a result ({ending}).",
        cause="The system ended it, most likely for lack of memory." if status == -9 else "".join(log[-1:]),
        fix="Free memory and try again, or choose a version of the model with safetensors.",
        context={"log": log},
    )
