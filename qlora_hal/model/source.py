"""From what the user named to a local folder that is safe to open."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_hal.errors import HubError, ModelError
from qlora_hal.files.refused_paths import named_path
from qlora_hal.model.described_weights import DESCRIBED_FAMILIES, described_header, why_not_described
from qlora_hal.model.facts import CONFIG_ALONE, CONFIG_AND_SIZES, HEADERS, ModelFacts, read_facts
from qlora_hal.model.hub_model import HubModel, RemoteWeights, fetch_weights, planned
from qlora_hal.model.other_folders import gguf_only, is_a_file, refuse_adapter, refuse_pointers
from qlora_hal.model.safety import is_commit, refuse_pickle_only, refuse_remote_code, unpinned_code
from qlora_hal.model.weight_files import read_json

_HUB_ID = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?(?:/[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?)?"
)
_HUB_ADDRESS = "https://huggingface.co/"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A base model on this disk. `name` is what the user wrote; `revision` the resolved commit of a hub model.

    `made_from` is the model that was quantized into this one, where that was done for the run. `remote` are its weights
    where only their headers were read, on the hub: `path` then has config.json alone, or with the tokenizer, and
    `with_weights` fetches the rest.
    """

    name: str
    path: Path
    facts: ModelFacts
    revision: str | None = None
    trust_remote_code: bool = False
    made_from: ModelSource | None = None
    remote: RemoteWeights | None = None

    @classmethod
    def in_folder(cls, folder: Path) -> ModelSource:
        """A folder as it is, its facts read afresh. Raises what `read_facts` raises."""
        return cls(str(folder), folder, read_facts(folder))

    @property
    def origin(self) -> ModelSource:
        """The model that adapters are named after."""
        return self.made_from or self


def resolve_model(name_or_path: str, *, revision: str | None, trust_remote_code: bool) -> ModelSource:
    """A folder as it is, or the snapshot of a hub model with its weights; checked, with its facts.

    Raises as `plan_model` and `with_weights`.
    """
    return with_weights(plan_model(name_or_path, revision=revision, trust_remote_code=trust_remote_code))


def plan_model(
    name_or_path: str,
    *,
    revision: str | None,
    trust_remote_code: bool,
    tokenizer: bool = True,
    config_is_enough: bool = False,
) -> ModelSource:
    """The same before any weight of a hub model is fetched: its facts come from headers that are read in place, and
    without fingerprint. Without `tokenizer` config.json and the index are all that is fetched. With `config_is_enough`
    a folder needs no weights, and no header is read on the hub, where config.json describes them.

    Raises ModelError (QH-E70 nothing there, QH-E71 a file, QH-C71 an adapter or a run, QH-C70 pointers of Git LFS, and
    what `read_facts` raises), UnsafeInputError (QH-C17 pickle weights only, QH-E14 the model's own Python files) and
    HubError (QH-E11 unreachable, QH-E12 gated or missing, QH-E13 incomplete).
    """
    local = _local_folder(name_or_path)
    hub = (
        None
        if local is not None
        else _from_hub(
            name_or_path, revision, trust_remote_code, tokenizer=tokenizer, config_is_enough=config_is_enough
        )
    )
    folder, commit = (local or Path(), None) if hub is None else (hub.folder, hub.commit)
    refuse_pointers(folder)
    if not (folder / "config.json").is_file():
        refuse_adapter(folder)
        refuse_pickle_only(_file_names(folder), where=str(folder))
        raise gguf_only(folder, _file_names(folder)) or _no_config(folder)
    refuse_remote_code(
        read_json(folder / "config.json"), where=name_or_path, revision=commit, trust_remote_code=trust_remote_code
    )
    refuse_pickle_only(_file_names(folder), where=str(folder))
    if config_is_enough and hub is None and not any(name.endswith(".safetensors") for name in _file_names(folder)):
        return ModelSource(name_or_path, folder, _described_facts(folder), commit, trust_remote_code)
    if hub is not None:
        facts = read_facts(folder, hub.headers, read_from=CONFIG_AND_SIZES if hub.from_config else HEADERS)
    else:
        facts = read_facts(folder)
    remote = hub.weights if hub is not None else None
    return ModelSource(name_or_path, folder, facts, commit, trust_remote_code, remote=remote)


def with_weights(source: ModelSource, *, progress: bool = True) -> ModelSource:
    """The model with its weights on this disk, fetched where they are not yet; `progress` shows a bar in a terminal.

    Raises StorageError QH-E22 when the disk cannot hold them, before anything is fetched, HubError (QH-E11, QH-E13),
    and what `read_facts` raises.
    """
    if source.remote is None:
        return source
    fetch_weights(source.remote, progress=progress)
    return replace(source, facts=read_facts(source.path), remote=None)


def is_on_hub(name_or_path: str) -> bool:
    """Whether the name can only be one of the hub. Raises ModelError (QH-E70, QH-E71) where it is neither."""
    return _local_folder(name_or_path) is None


def _local_folder(name: str) -> Path | None:
    """The folder that `name` means, or None when it can only be a hub id."""
    if name.startswith(_HUB_ADDRESS):
        return None
    path = named_path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise is_a_file(path)
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise _nothing_there(name, path, may_be_hub_id=False)
    # `models/llama` with a folder `models` here is more likely a slip than an account of the hub named `models`.
    if "/" in name and path.parent.is_dir():
        raise _nothing_there(name, path, may_be_hub_id=True)
    return None


def _described_facts(folder: Path) -> ModelFacts:
    """Of a folder without weights. Raises ModelError QH-C71 where config.json does not say what they are."""
    config = read_json(folder / "config.json")
    if reason := why_not_described(config):
        raise ModelError(
            "QH-C71",
            f"{folder.resolve().name} holds no safetensors weights, and config.json alone is not enough: {reason}.",
            where=str(folder / "config.json"),
            cause=f"Families that are: {', '.join(sorted(DESCRIBED_FAMILIES))}; quantized, gpt_oss in MXFP4 alone.",
            fix="Name the model on the hub, whose headers are read in place, or a folder that has its weights.",
        )
    return read_facts(folder, [described_header(config, folder)], read_from=CONFIG_ALONE)


def _from_hub(
    name: str, revision: str | None, trust_remote_code: bool, *, tokenizer: bool, config_is_enough: bool
) -> HubModel:
    repository = name.removeprefix(_HUB_ADDRESS).strip("/")
    if trust_remote_code and not is_commit(revision):
        raise unpinned_code(repository, revision)
    try:
        return planned(
            repository,
            revision=revision,
            trust_remote_code=trust_remote_code,
            tokenizer=tokenizer,
            config_is_enough=config_is_enough,
        )
    except HubError as error:
        if error.code != "QH-E13" and not name.startswith(_HUB_ADDRESS):
            error.message = f"There is no folder {name} here, so it was treated as a hub model. {error.message}"
            error.args = (error.message,)
            error.cause = " ".join(filter(None, [error.cause, _close_names(Path(name))]))
        raise


def _nothing_there(name: str, path: Path, *, may_be_hub_id: bool) -> ModelError:
    close = _close_names(path)
    hub = f", or {_HUB_ADDRESS}{name} for the hub model of that name" if may_be_hub_id else ""
    missing = "" if path.parent.is_dir() else f" Its parent folder {path.parent} does not exist either."
    return ModelError(
        "QH-E70",
        f"There is no folder {name}.{missing}",
        where=name,
        cause=close or "It is written like a path, so it was not looked up on the hub.",
        fix=f"Name a folder that exists{hub}.",
        context={"close": close},
    )


def _no_config(folder: Path) -> ModelError:
    below = sorted(p.parent.name for p in folder.glob("*/config.json"))
    snapshots = sorted(str(p.parent.relative_to(folder)) for p in folder.glob("snapshots/*/config.json"))
    inside = below or snapshots
    return ModelError(
        "QH-C70",
        f"{folder.resolve().name or folder} is not a model folder: it has no config.json.",
        where=str(folder),
        cause=f"Its subfolders hold models: {', '.join(inside[:5])}." if inside else "",
        fix=f"Name {folder / inside[0]}." if inside else "Name the folder that holds config.json and the weights.",
    )


def _close_names(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir() if p.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"Folders with a similar name in {path.parent}: {', '.join(close)}." if close else ""


def _file_names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()]
