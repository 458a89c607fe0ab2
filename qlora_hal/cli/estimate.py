"""`qlora-hal estimate`: the memory of a run by arithmetic over the model's headers; no weights are loaded."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qlora_hal.cli.flags import with_settings
from qlora_hal.cli.train import Switch, resolved
from qlora_hal.report import figures

if TYPE_CHECKING:
    from qlora_hal.backend import BackendSpec, Quantization
    from qlora_hal.config import RunConfig
    from qlora_hal.memory_cards import Card
    from qlora_hal.model.facts import ModelFacts
    from qlora_hal.values import MemoryEstimate

_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "workspace", "runtime")


@dataclass(frozen=True, slots=True)
class Estimated:
    """An estimate and what it was made for."""

    memory: MemoryEstimate
    backend: str
    quantization: Quantization
    compute_dtype: str
    cards: tuple[tuple[Card, bool], ...]


@with_settings()
def estimate(
    config: Annotated[Path | None, Parameter(help="Settings file: YAML, TOML or JSON.")] = None,
    /,
    *,
    demo: Annotated[bool, Switch, Parameter(help="Of the small model that comes with the package.")] = False,
    json: Annotated[bool, Switch, Parameter(help="Print as JSON.")] = False,
    flags: Mapping[str, object],
) -> int:
    """Estimate the memory of a run: qlora-hal estimate --model M --training.per_device_train_batch_size 8."""
    from qlora_hal.settings import require_settings

    settings = resolved(config, flags, demo=demo)
    require_settings(settings, "model.name_or_path")
    estimated = estimate_run(settings.config)
    print(json_format.dumps(estimate_as_json(estimated)) if json else estimate_as_text(estimated, settings.config))
    return 0


def estimate_run(config: RunConfig) -> Estimated:
    """The peak on the backend that is named, else on the one that would be chosen on its own hardware."""
    from qlora_hal.adapter.targets import resolve_targets
    from qlora_hal.memory_cards import KNOWN_CARDS
    from qlora_hal.model.source import resolve_model
    from qlora_hal.needs import quantization_of
    from qlora_hal.preparation import estimated_memory, likely_dtype

    model = config.model
    facts = resolve_model(model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code).facts
    spec = _backend(config, facts)
    quantization = quantization_of(config, facts, spec.capabilities)
    dtype = likely_dtype(config, spec)
    targets = resolve_targets(config.lora.target_modules, facts.linear_modules)
    memory = estimated_memory(config, facts, spec, quantization, targets, dtype)
    cards = tuple((card, memory.high <= card.memory_bytes) for card in KNOWN_CARDS)
    return Estimated(memory, spec.name, quantization, dtype, cards)


def estimate_as_text(estimated: Estimated, config: RunConfig) -> str:
    """A table of the parts, the total with its margin, and the cards on both sides of it."""
    memory, stored = estimated.memory, estimated.quantization
    block = f" in blocks of {stored.block_size}" if stored.block_size else ""
    batch, length = config.training.per_device_train_batch_size, config.data.max_seq_length
    lines = [
        f"{config.model.name_or_path} on {estimated.backend}: base {stored.weight_format.value}{block}, computes in "
        f"{estimated.compute_dtype}, {batch} x {length} tokens, rank {config.lora.r}",
        "",
        *memory_lines({**asdict(memory), "total": memory.total, "high": memory.high}),
        "",
    ]
    for title, fits in (("fits", True), ("too small", False)):
        names = [f"{card.name} ({figures.size(card.memory_bytes)})" for card, ok in estimated.cards if ok is fits]
        if names:
            lines.append(f"{title + ':':<10} {', '.join(names)}")
    return "\n".join(lines)


def memory_lines(memory: Mapping[str, int]) -> list[str]:
    """Bytes by cause, and in all with the margin of the arithmetic."""
    return [
        *(f"  {part:<12} {figures.size(memory[part]):>10}" for part in _PARTS),
        f"  {'total':<12} {figures.size(memory['total']):>10}   up to {figures.size(memory['high'])}",
    ]


def estimate_as_json(estimated: Estimated) -> dict[str, object]:
    memory, stored = estimated.memory, estimated.quantization
    return {
        "backend": estimated.backend,
        "weight_format": stored.weight_format.value,
        "block_size": stored.block_size,
        "double_quant": stored.double_quant,
        "compute_dtype": estimated.compute_dtype,
        "bytes": {part: getattr(memory, part) for part in _PARTS},
        "total": memory.total,
        "high": memory.high,
        "cards": [{"name": c.name, "memory_bytes": c.memory_bytes, "fits": fits} for c, fits in estimated.cards],
    }


def _backend(config: RunConfig, facts: ModelFacts) -> BackendSpec:
    """The named backend; else the first by priority that can store this model, ready here or not."""
    from qlora_hal.capabilities import missing
    from qlora_hal.discovery import find, listed, load_spec
    from qlora_hal.errors import UnsupportedFeatureError
    from qlora_hal.needs import needs_of

    entries = listed()
    if config.backend.name != "auto":
        return load_spec(find(config.backend.name, entries))
    specs = [load_spec(entry) for entry in entries if entry.built_in]
    needs = needs_of(config, facts)
    able = [spec for spec in specs if not missing(needs, spec.capabilities)]
    if not able:
        raise UnsupportedFeatureError(
            "QH-B01",
            "No built-in backend can serve these settings.",
            cause="; ".join(f"{spec.name}: {', '.join(missing(needs, spec.capabilities))}" for spec in specs),
            fix="Change the setting that every line names, or name a backend with --backend.",
        )
    return max(able, key=lambda spec: spec.priority)
