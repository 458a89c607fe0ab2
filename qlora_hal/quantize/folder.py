"""The folder of a model that was quantized here: whole or absent, with a manifest of what it was made from and of the
SHA-256 of each file, verified whenever a run finds it again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal.errors import ModelError, QloraHalError, StorageError
from qlora_hal.files import durable, opening, sealed_json, strict_json
from qlora_hal.files.refused_paths import expanded
from qlora_hal.model.facts import read_facts
from qlora_hal.model.weight_files import read_json
from qlora_hal.report.run_file import RUN_FILE

if TYPE_CHECKING:
    from qlora_hal.model.source import ModelSource

MANIFEST_FILE = "qlora_hal_quantization.json"
MANIFEST_FORMAT = 1

COPIED = (
    "tokenizer*", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.*",
    "additional_chat_templates", "generation_config.json", "spiece.model", "*.tiktoken",
)  # fmt: skip
"""What of the 16-bit model belongs to the quantized one as it is."""

WRITTEN = ("*.safetensors", "model.safetensors.index.json", "config.json", "quantize_config.json")
"""What of an engine's output is kept."""

DESCRIBED = (
    "quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "pack_dtype", "lm_head",
    "true_sequential", "static_groups", "damp_percent", "meta",
)  # fmt: skip
"""What config.json may say of the quantization. Libraries also write calibration texts and folders of this machine."""

_META_KEPT = ("quantizer",)


@contextmanager
def staged(folder: Path, source: ModelSource, identity: Mapping[str, object]) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when the block ends well, and goes away when it does not.

    Raises StorageError QH-S14 when `folder` is there already and is no empty folder, and for failing writes.
    """
    folder = folder.absolute()
    staging = folder.with_name(f".quantizing-{folder.name[:60]}-{durable.unique_name()}")
    try:
        _require_free(folder)
        staging.mkdir(parents=True)
        yield staging
        _complete(staging, source, identity)
        with suppress(OSError):
            folder.rmdir()  # an empty folder may be replaced
        _rename(staging, folder)
    except OSError as problem:
        raise durable.storage_error(problem, folder, what="the quantized model") from problem
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_quantized(
    folder: Path, source: ModelSource, identity: Mapping[str, object], *, verify: bool = True
) -> ModelSource | None:
    """The model in a folder if it is the one that `identity` describes and still whole, else None. `verify` False is
    for one that was written a moment ago."""
    try:
        opening.refuse_link(folder)
        manifest = read_json(folder / MANIFEST_FILE)
        facts = read_facts(folder)
        if manifest.get("format") != MANIFEST_FORMAT or manifest.get("made_from") != dict(identity):
            return None
        if manifest.get("fingerprint") != facts.fingerprint or (verify and not _is_whole(folder, manifest)):
            return None
    except (OSError, QloraHalError):
        return None
    return replace(source, path=folder, facts=facts, made_from=source)


def unverified_note(folder: Path) -> str:
    """What to say of a folder that an earlier release wrote, without hashes; nothing of any other."""
    if "files" in read_json(folder / MANIFEST_FILE):
        return ""
    return f"{folder} was written by an earlier release, without hashes: only samples of its weights were compared"


def _is_whole(folder: Path, manifest: Mapping[str, object]) -> bool:
    """Whether every file is there as it was written, and none besides. Raises OSError."""
    listed = manifest.get("files")
    if listed is None and not sealed_json.is_sealed(manifest):
        return True  # of an earlier release, which is said
    if not isinstance(listed, dict) or not sealed_json.is_as_sealed(manifest):
        return False
    if {name for name in _files_in(folder) if not name.startswith(".")} != {*listed, MANIFEST_FILE}:
        return False
    return all(_entry(folder / name) == listed[name] for name in listed)


def _files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _entry(path: Path) -> dict[str, object]:
    written = durable.hashed(path)
    return {"size": written.size, "sha256": written.sha256}


def set_aside(folder: Path) -> Path | None:
    """Rename a folder that holds something, so that its name is free; its new name. Nothing of it is deleted.

    Raises StorageError QH-S11 or QH-S12.
    """
    try:
        if not folder.is_dir() or not any(folder.iterdir()):
            return None
        aside = durable.set_aside(folder)
    except OSError as problem:
        raise durable.storage_error(problem, folder, what="the damaged folder's new name") from problem
    return aside


def quantized_for(source: ModelSource, run_dir: Path | None) -> ModelSource:
    """The folder that a run's record names, if it still holds what the run was trained on. Raises ModelError QH-E63."""
    recorded = _recorded(run_dir) if run_dir is not None else {}
    folder = expanded(str(recorded.get("folder") or ""))
    problem = "is gone"
    with suppress(OSError, QloraHalError):
        facts = read_facts(folder)
        is_same = bool(recorded) and facts.fingerprint == recorded.get("fingerprint")
        problem = "is damaged" if recorded else problem
        if is_same and _is_whole(folder, read_json(folder / MANIFEST_FILE)):
            return replace(source, path=folder, facts=facts, made_from=source)
    raise ModelError(
        "QH-E63",
        f"The model that {source.name} was quantized into for this run {problem}."
        if recorded
        else f"{source.name} is not quantized, and no run records which quantized model belongs to this adapter.",
        where=str(folder) if recorded else source.name,
        cause="It was kept in a cache folder, which may be emptied at any time." if recorded else "",
        fix="Run qlora-hal resume on the run folder, which makes it again; or qlora-hal quantize, and name its folder "
        "as the model.",
    )


def _recorded(run_dir: Path) -> Mapping[str, object]:
    model = read_json(run_dir / RUN_FILE).get("model")
    kept = model.get("quantized") if isinstance(model, dict) else None
    return kept if isinstance(kept, dict) else {}


def _require_free(folder: Path) -> None:
    """Only an empty folder can be replaced by a rename."""
    if folder.is_symlink():
        kind = "a link"
    elif folder.is_dir():
        kind = "not empty" if any(folder.iterdir()) else ""
    else:
        kind = "a file" if folder.exists() else ""
    if kind:
        raise StorageError(
            "QH-S14", f"{folder} is {kind}.", where=str(folder), fix="Name a folder that does not exist yet."
        )


def _complete(staging: Path, source: ModelSource, identity: Mapping[str, object]) -> None:
    """What the engine does not write, and what it should not have written; the manifest last."""
    _describe(staging, source.path)
    for entry in sorted(source.path.iterdir()):
        if any(fnmatch(entry.name, pattern) for pattern in COPIED):
            _copy(entry, staging / entry.name)
    for path in list(staging.iterdir()):
        if not any(fnmatch(path.name, pattern) for pattern in (*COPIED, *WRITTEN)):
            durable.remove_tree(path)  # logs of the engine, Python files
    facts = read_facts(staging)
    if facts.prequantized is None or facts.linear_modules.keys() != source.facts.linear_modules.keys():
        raise ModelError(
            "QH-C73",
            f"The engine wrote {len(facts.linear_modules)} linear layers of {len(source.facts.linear_modules)}, "
            f"{'not quantized' if facts.prequantized is None else 'quantized'}.",
            where=source.name,
            fix="Report it with the model's name; quantize another model in the meantime.",
        )
    manifest = {"format": MANIFEST_FORMAT, "made_from": dict(identity), "fingerprint": facts.fingerprint}
    manifest["files"] = {name: _entry(staging / name) for name in _files_in(staging)}
    durable.write_new(staging / MANIFEST_FILE, [strict_json.encode(sealed_json.sealed(manifest))])
    durable.flush_tree(staging)


def _describe(staging: Path, model: Path) -> None:
    """config.json: the model's own, and of the engine's only what tells how the weights are packed."""
    written = read_json(staging / "config.json").get("quantization_config")
    if not isinstance(written, dict):
        written = read_json(staging / "quantize_config.json")
    told = {key: written[key] for key in DESCRIBED if key in written}
    if isinstance(meta := told.get("meta"), dict):
        told["meta"] = {key: meta[key] for key in _META_KEPT if key in meta}
    told["quant_method"] = "gptq"
    config = {**read_json(model / "config.json"), "quantization_config": told}
    for name, content in (("config.json", config), ("quantize_config.json", told)):
        (staging / name).unlink(missing_ok=True)
        durable.write_new(staging / name, [strict_json.encode(content)])


def _copy(entry: Path, target: Path) -> None:
    if entry.is_dir():
        shutil.copytree(entry, target, ignore=_no_files, dirs_exist_ok=True)
    elif entry.is_file():
        shutil.copyfile(entry, target)  # through links: a hub snapshot is made of them


def _no_files(folder: str, names: Sequence[str]) -> set[str]:
    """Links to devices and the like, which have no end."""
    return {name for name in names if not os.path.isfile(os.path.join(folder, name))}


def _rename(staging: Path, folder: Path) -> None:
    """Another process may have made the same folder meanwhile; then its result stands."""
    if (folder / MANIFEST_FILE).exists():
        return
    staging.rename(folder)
    durable.flush_folder(folder.parent)
