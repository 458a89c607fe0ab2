"""A finished run's adapter, or the model merged from it, for the Hugging Face hub: which files, with which card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal.adapter.peft_files import (
    CARD_FILE,
    TENSORS_FILE,
    model_card,
    published_files,
    read_adapter,
    read_provenance,
)
from qlora_hal.data.tokens.tokenizer_files import MORE_TEMPLATES
from qlora_hal.errors import AdapterError
from qlora_hal.errors.redaction import published
from qlora_hal.export import folder as model_folder
from qlora_hal.export.hub_upload import check_repository_name, upload
from qlora_hal.export.proofs import Proof, Suite, proof_beside, proof_of_certificate
from qlora_hal.export.recording import report_rows, shown_name
from qlora_hal.export.run_card import run_sections
from qlora_hal.files import durable, strict_json
from qlora_hal.files.opening import refuse_link
from qlora_hal.files.refused_paths import named_path
from qlora_hal.model.weight_files import INDEX_FILE
from qlora_hal.report.run_file import read_run_file
from qlora_hal.run.listing import summary
from qlora_hal.run.trained_base import finished_adapter

if TYPE_CHECKING:
    from qlora_hal.report.console import RunConsole

_MESSAGE = "Upload with qlora_hal"


@dataclass(frozen=True, slots=True)
class PushRequest:
    """One call of push: the run's folder, the repository as `owner/name`, and the merged folder that goes up in place
    of the adapter. `base_model` names the base on the hub, for a run on a folder of this machine."""

    run: Path
    repository: str
    merged: Path | None = None
    base_model: str | None = None
    certificate: Path | None = None
    private: bool = False
    exist_ok: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class PushResult:
    """What went up, or of a dry run what would: names with their bytes, and the model card. `url` and `commit` are
    those of the commit, empty after a dry run; `private` is what the hub says of the repository."""

    repository: str
    files: Mapping[str, int]
    card: str
    url: str = ""
    commit: str = ""
    created: bool = False
    private: bool | None = None
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__} | {"files": dict(self.files)}


@dataclass(frozen=True, slots=True)
class Subject:
    """A finished run, and what may be said of it."""

    run_dir: Path
    adapter_dir: Path
    run: Mapping[str, object]
    provenance: Mapping[str, object]
    base: str
    sections: Sequence[str]


def publish(request: PushRequest, console: RunConsole, suite: Suite) -> PushResult:
    """Read and check everything, then send it in one commit; a dry run asks nothing of the hub."""
    check_repository_name(request.repository)
    notes: list[str] = []
    subject = _subject(request, suite, notes)
    if request.merged is None:
        files = _adapter_files(request.repository, subject)
    else:
        files = _merged_files(named_path(request.merged), request.repository, subject, notes)
    for text in notes:
        console.note(text)
    card = files[CARD_FILE]
    assert isinstance(card, bytes)
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    if request.dry_run:
        return PushResult(request.repository, sizes, card.decode("utf-8"), notes=tuple(notes))
    sent = upload(
        request.repository,
        files,
        message=_MESSAGE,
        private=request.private,
        exist_ok=request.exist_ok,
        quiet=console.quiet or console.silent,
    )
    return PushResult(
        request.repository,
        sizes,
        card.decode("utf-8"),
        url=sent.url,
        commit=sent.commit,
        created=sent.created,
        private=sent.private,
        notes=tuple(notes),
    )


def _subject(request: PushRequest, suite: Suite, notes: list[str]) -> Subject:
    run_dir = named_path(request.run)
    run = read_run_file(run_dir)
    adapter_dir = finished_adapter(run_dir)
    provenance = read_provenance(adapter_dir)
    base = _base_name(request, provenance, notes)
    proofs = _proofs(request, run_dir, run, provenance, suite, notes)
    return Subject(run_dir, adapter_dir, run, provenance, base, run_sections(run, summary(run_dir), proofs))


def _base_name(request: PushRequest, provenance: Mapping[str, object], notes: list[str]) -> str:
    if request.base_model is not None:
        check_repository_name(request.base_model)
        return request.base_model
    base = shown_name(str(provenance.get("base_name") or ""))
    if "/" not in base:
        notes.append(
            f"the base is a folder of this machine, and the card calls it {base}; --base-model OWNER/NAME "
            "(base_model= in Python) names it where others find it"
        )
    return base


def _proofs(
    request: PushRequest,
    run_dir: Path,
    run: Mapping[str, object],
    provenance: Mapping[str, object],
    suite: Suite,
    notes: list[str],
) -> list[Proof]:
    beside, note = proof_beside(run_dir, run, suite)
    if note:
        notes.append(note)
    proofs = [beside] if beside else []
    if request.certificate is not None:
        backend = str(provenance.get("backend") or "")
        proofs.append(proof_of_certificate(named_path(request.certificate), backend, suite))
    return proofs


def _adapter_files(repository: str, subject: Subject) -> dict[str, bytes | Path]:
    """The tensors as they lie there, the JSON files without places of this machine, a card for the hub."""
    adapter = read_adapter(subject.adapter_dir)
    facts = published(subject.provenance)
    assert isinstance(facts, dict)
    sections = [*_opened_by_mlx(repository, subject.base), *subject.sections, "## Adapter", ""]
    card = model_card(adapter.config, subject.base, facts, name=repository, sections=sections)
    return {
        CARD_FILE: card.encode("utf-8"),
        **published_files(subject.adapter_dir, adapter, subject.base),
        TENSORS_FILE: subject.adapter_dir / TENSORS_FILE,
    }


def _opened_by_mlx(repository: str, base: str) -> list[str]:
    return [
        "With mlx-lm, whose adapters have another layout:",
        "",
        "```",
        f"hf download {repository} --local-dir adapter",
        "qlora-hal adapter convert adapter adapter-mlx --to mlx",
        f'mlx_lm.generate --model {base} --adapter-path adapter-mlx --prompt "..."',
        "```",
        "",
    ]


# a merged model ------------------------------------------------------------------------------------------------------


def _merged_files(folder: Path, repository: str, subject: Subject, notes: list[str]) -> dict[str, bytes | Path]:
    """What `merge` wrote there, its weights compared with the hashes in merge.json."""
    record = _merge_record(folder)
    weights = record["files"]
    assert isinstance(weights, dict)
    _require_own_and_unchanged(folder, record, weights, subject)
    files: dict[str, bytes | Path] = {}
    left = []
    for path in (*sorted(folder.iterdir()), *sorted(folder.glob(f"{MORE_TEMPLATES}/*.jinja"))):
        name = path.relative_to(folder).as_posix()
        if name in weights or _is_beside_weights(name):
            refuse_link(path)
            files[name] = _without_own_place(path)
        elif name not in (CARD_FILE, MORE_TEMPLATES):
            left.append(name)
    if left:
        notes.append(f"not sent, for it is no part of the merged model: {', '.join(left)}")
    sections = [*_opened_merged(repository), *subject.sections, "## Merge", ""]
    card = model_folder.model_card(record, subject.base, report_rows(record), sections)
    return {CARD_FILE: card.encode("utf-8"), **files}


def _is_beside_weights(name: str) -> bool:
    known = (model_folder.RECORD_FILE, INDEX_FILE, "config.json", *model_folder.COPIED, f"{MORE_TEMPLATES}/*.jinja")
    return any(fnmatch(name, pattern) for pattern in known)


def _without_own_place(path: Path) -> bytes | Path:
    """The file, or its content where it says (`_name_or_path`) from which folder somebody once loaded it."""
    if path.name not in ("config.json", "tokenizer_config.json"):
        return path
    content = strict_json.read_foreign_object(path)
    shown = {key: published(value) if key.endswith("name_or_path") else value for key, value in content.items()}
    return path if shown == content else (json.dumps(shown, indent=2, ensure_ascii=False) + "\n").encode()


def _merge_record(folder: Path) -> dict[str, object]:
    try:
        record = strict_json.read_object(folder / model_folder.RECORD_FILE)
        if record.get("files") and isinstance(record["files"], dict) and isinstance(record.get("adapter"), dict):
            report_rows(record)  # needs what a card shows
            return record
        reason = "its merge.json names no weights"
    except (OSError, ValueError, KeyError, AssertionError, TypeError) as problem:
        reason = f"its merge.json is missing or damaged ({type(problem).__name__})"
    raise AdapterError(
        "QH-C81",
        f"{folder} is no merged model: {reason}.",
        where=str(folder),
        fix="Name the folder that qlora-hal merge wrote.",
    )


def _require_own_and_unchanged(
    folder: Path, record: Mapping[str, object], weights: Mapping[str, object], subject: Subject
) -> None:
    adapter = record["adapter"]
    assert isinstance(adapter, Mapping)
    if adapter.get("sha256") != durable.hashed(subject.adapter_dir / TENSORS_FILE).sha256:
        wrong = f"it was merged from another adapter than that of {subject.run_dir}"
    else:
        changed = [name for name, sha256 in weights.items() if _hash_of(folder / name) != sha256]
        wrong = f"{', '.join(changed)} changed after the merge, or is missing" if changed else ""
    if wrong:
        raise AdapterError(
            "QH-C81",
            f"The merged model in {folder} is not this run's: {wrong}.",
            where=str(folder),
            cause="The card tells of this run, its losses and its proofs.",
            fix=f"Merge again: qlora-hal merge {subject.run_dir} OUT",
        )


def _hash_of(path: Path) -> str:
    refuse_link(path)
    try:
        return durable.hashed(path).sha256
    except OSError:
        return ""


def _opened_merged(repository: str) -> list[str]:
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{repository}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repository}")',
        "```",
        "",
        f'With mlx-lm: `mlx_lm.generate --model {repository} --prompt "..."`',
        "",
    ]
