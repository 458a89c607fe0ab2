"""What `qlora_hal.json` vouches for in an adapter's folder: the tensors by their hash, what scales them, and itself.

Tensors load without a word after a flipped bit, and another lora_alpha is another adapter. The other fields of
adapter_config.json may be edited: the name of the base, for one, when an adapter is published.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qlora_hal.contract.values import AdapterConfig
from qlora_hal.errors import AdapterError
from qlora_hal.files import sealed_json
from qlora_hal.files.durable import WrittenFile

WRITTEN = "written"
"""The key of `qlora_hal.json` under which the hash and the settings stand."""


def vouched(provenance: Mapping[str, object], tensors: WrittenFile, config: AdapterConfig) -> dict[str, object]:
    """The content of `qlora_hal.json`: how the adapter came to be, and what was written."""
    return sealed_json.sealed({**provenance, WRITTEN: {"sha256": tensors.sha256, **_scaling(config)}})


def provenance_in(document: Mapping[str, object]) -> dict[str, object]:
    """What `qlora_hal.json` says of how the adapter came to be."""
    return {key: value for key, value in sealed_json.unsealed(document).items() if key != WRITTEN}


def require_as_written(folder: Path, document: Mapping[str, object], sha256: str, config: AdapterConfig) -> None:
    """Compare tensors (their `sha256`, as read) and settings with `qlora_hal.json`; that of an earlier release vouches
    for nothing. Raises AdapterError QH-C22."""
    changed = []
    if is_vouched(document):
        written = document.get(WRITTEN)
        if not isinstance(written, Mapping) or not sealed_json.is_as_sealed(document):
            changed.append("qlora_hal.json does not match its own hash")
        else:
            now = {"sha256": sha256, **_scaling(config)}
            changed = [
                _change(name, written.get(name), value) for name, value in now.items() if written.get(name) != value
            ]
    if changed:
        raise AdapterError(
            "QH-C22",
            f"The adapter in {folder} was changed after it was written: {'; '.join(changed)}.",
            where=str(folder),
            cause="The disk, an interrupted copy, or another tool changed it.",
            fix="Restore it from a copy; qlora-hal resume writes that of a run again. If the change was "
            "intended, remove qlora_hal.json.",
            context={"changed": changed},
        )


def is_vouched(document: Mapping[str, object]) -> bool:
    return WRITTEN in document or sealed_json.is_sealed(document)


def _scaling(config: AdapterConfig) -> dict[str, object]:
    return {"r": config.r, "alpha": config.alpha, "dropout": config.dropout, "use_rslora": config.use_rslora}


def _change(name: str, written: object, now: object) -> str:
    if name == "sha256":
        return "its tensors differ"
    return f"{name} is {now!a}, {written!a} was written"
