"""Which run a checkpoint or an adapter belongs to: an id drawn when the run began, and what it trains with.

Where model and data lie may change while a run lives (`resume --model`, `--data`), and its backend may; what they are
is compared by fingerprints, the rest by these two.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal import __version__
from qlora_hal.adapter.peft_experts import LAYOUT, layout_of
from qlora_hal.contract.dropout import MASKS
from qlora_hal.errors import CheckpointError
from qlora_hal.files import strict_json
from qlora_hal.model.verifying import base_config_hash

if TYPE_CHECKING:
    from qlora_hal.checkpoint import TrainingState
    from qlora_hal.model.facts import ModelFacts
    from qlora_hal.run.prepare import PreparedRun

PLACES = frozenset({"output_dir", "model.name_or_path", "data.path", "data.validation_path"})
"""Settings that say where something lies, not what it is."""
_SOURCE_PLACE = re.compile(r"data\.sources\.\d+\.path")

_SHOWN_SETTINGS = 8


def is_place(setting: str) -> bool:
    """Whether a setting, by its dotted key, says where something lies that a run reads or writes."""
    return setting in PLACES or _SOURCE_PLACE.fullmatch(setting) is not None


def new_run_id() -> str:
    """32 hexadecimal digits that no other run has."""
    return uuid.uuid4().hex


def identity_of(content: Mapping[str, object]) -> dict[str, object]:
    """What a run stamps on its checkpoints and adapters; `content` is that of run.json. One that an earlier release
    began has no id, and gets none: its older checkpoints carry none."""
    config, run_id = content.get("config"), content.get("run_id")
    stamped: dict[str, object] = {"settings_hash": settings_hash(config if isinstance(config, dict) else {})}
    return {**stamped, "run_id": run_id} if run_id is not None else stamped


def settings_hash(config: Mapping[str, object]) -> str:
    """SHA-256 of a configuration without its places."""
    trained = {key: value for key, value in flat_settings(config) if not is_place(key)}
    return hashlib.sha256(strict_json.encode(trained)).hexdigest()


def flat_settings(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every setting of a nested configuration; groups in a list are counted from 0."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat_settings(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(group, dict) for group in value):
            yield from flat_settings({str(number): group for number, group in enumerate(value)}, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differing_settings(
    there: Mapping[str, object], here: Mapping[str, object], *, apart_from: Callable[[str], bool] = is_place
) -> dict[str, tuple[object, object]]:
    """Dotted key -> (value there, value here) of what two configurations set otherwise."""
    # Through JSON, so that a tuple equals the list that was read back.
    now = dict(flat_settings(strict_json.decode_object(strict_json.encode(dict(here)))))
    then = dict(flat_settings(there))
    keys = (key for key in sorted({*now, *then}) if not apart_from(key))
    return {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}


def require_own(
    content: Mapping[str, object], state: TrainingState, saved_with: Mapping[str, object], folder: Path
) -> list[str]:
    """A checkpoint goes on with the run that saved it. `content` is that of run.json, `saved_with` the copy of it that
    the checkpoint keeps (empty before there were copies).

    Returns notes on what cannot be verified. Raises CheckpointError QH-C20, naming the settings that differ.
    """
    stamped, ours = state.provenance, identity_of(content)
    configs = [tree if isinstance(tree, dict) else {} for tree in (saved_with.get("config"), content.get("config"))]
    differing = differing_settings(*configs) if saved_with else {}
    seeds = {"training.seed": (stamped.get("seed"), _seed_of(content))}
    differing |= {key: pair for key, pair in seeds.items() if None not in pair and pair[0] != pair[1]}
    if stamped.get("run_id") != ours.get("run_id"):
        raise _foreign(
            state.step,
            folder,
            "belongs to another run",
            differing,
            "one that began at another time, with these settings",
        )
    if differing or stamped.get("settings_hash", ours["settings_hash"]) != ours["settings_hash"]:
        raise _foreign(
            state.step, folder, "was saved with settings other than those in run.json", differing, "unknown ones"
        )
    if "run_id" in stamped:
        return []
    same = "settings_hash" in stamped or stamped.get("config_hash") == content.get("config_hash")
    compared = "settings, seed" if same else "seed"
    return [
        f"step {state.step} belongs to a run that an earlier release began, without an id: that it is this run "
        f"{'' if same else 'and has its settings '}cannot be verified; its {compared}, base, tokenizer and data are "
        "compared"
    ]


def _seed_of(content: Mapping[str, object]) -> object:
    resolved = content.get("resolved")
    return resolved.get("seed") if isinstance(resolved, Mapping) else None


def _foreign(
    step: int, folder: Path, what: str, differing: Mapping[str, tuple[object, object]], otherwise: str
) -> CheckpointError:
    return CheckpointError(
        "QH-C20",
        f"The checkpoint of step {step} {what}: {shown_differences(differing) or otherwise}.",
        where=str(folder),
        cause="Continuing from it would be a run that nobody can reproduce.",
        fix=f"Move {folder.name} out of {folder.parent}, and resume again from this run's own. If it is run.json that "
        "came from elsewhere, remove that: resume writes it again.",
        context={"differing": {key: list(pair) for key, pair in differing.items()}},
    )


def shown_differences(differing: Mapping[str, tuple[object, object]]) -> str:
    """`lora.r (there 8, here 16), ...` for a message."""
    pairs = list(differing.items())
    shown = [f"{key} (there {shown_value(then)}, here {shown_value(now)})" for key, (then, now) in pairs]
    more = f" and {len(pairs) - _SHOWN_SETTINGS} more" if len(pairs) > _SHOWN_SETTINGS else ""
    return ", ".join(shown[:_SHOWN_SETTINGS]) + more


def shown_value(value: object) -> str:
    return "not set" if value is None else ascii(value)[:120]


PLACE_KEYS = frozenset({"output_dir"})
"""Keys that say where a run lies, not what it is."""


def config_hash(config: Mapping[str, object]) -> str:
    """SHA-256 of a configuration, equal for equal training: the place of the output does not count."""
    trained = {key: value for key, value in config.items() if key not in PLACE_KEYS}
    return hashlib.sha256(strict_json.encode(trained)).hexdigest()


def software_of_rank(prepared: PreparedRun) -> dict[str, str]:
    """What must be the same before anything else is compared: another release has other settings."""
    report = prepared.resolved_backend.report
    backend = prepared.resolved_backend.choice.spec.name
    return {"the backend": backend, "the software": f"{__version__} {sorted(report.versions.items())}"}


def facts_of_rank(prepared: PreparedRun, state: TrainingState | None) -> dict[str, str]:
    """What must be the same on every rank, in words that a user can look up. Every rank of one release has the same
    ones."""
    base = prepared.resolved_backend.source.origin
    settings = flat_settings(prepared.config.model_dump(mode="json"))
    return {
        **{name: str(value) for name, value in settings if not is_place(name)},
        "the seed": str(prepared.seed),
        "the base model": f"{base.facts.fingerprint} {base_config_hash(base.facts.config)}",
        "the tokenizer": prepared.tokenizer.hash,
        "the rows": str(sorted(prepared.data.hashes.items())),
        "the checkpoint": "none" if state is None else f"{state.step} {state.provenance.get('run_id')}",
    }


def _layout_of_experts(facts: ModelFacts) -> dict[str, object]:
    """Of a mixture, how an adapter's files name experts; nothing of other models."""
    if not facts.has_routed_experts:
        return {}
    return {LAYOUT: layout_of(facts.model_type)}


def provenance_of(prepared: PreparedRun, resolved: Mapping[str, object]) -> dict[str, object]:
    """What an adapter or a checkpoint must match to be continued or judged."""
    base = prepared.resolved_backend.source
    source = base.origin
    kept = ("backend", "device", "weight_format", "block_size", "double_quant", "compute_dtype", "seed", "versions")
    return {
        "base_name": source.name,
        "base_revision": source.revision,
        "base_fingerprint": source.facts.fingerprint,
        "base_config_hash": base_config_hash(source.facts.config),
        "config_hash": config_hash(prepared.config.model_dump(mode="json")),
        "tokenizer_hash": prepared.tokenizer.hash,
        "data_fingerprint": prepared.data.fingerprint,
        "token_hashes": dict(prepared.data.hashes),
        "backend_options": dict(prepared.config.backend.options),
        **({"dropout_masks": MASKS} if prepared.config.lora.dropout else {}),
        **({"fp8_products": True} if resolved["fp8_products"] else {}),
        **_layout_of_experts(base.facts),
        **({"quantized_fingerprint": base.facts.fingerprint} if base.made_from else {}),
        "sequences_per_step": prepared.sequences_per_step,
        **{name: resolved[name] for name in kept},
    }
