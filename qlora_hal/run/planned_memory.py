"""The memory of a run that is only planned: from its settings and what config.json or headers say of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_hal.adapter.targets import require_rank, resolve_targets
from qlora_hal.config.resolve import resolve_settings
from qlora_hal.contract.backend import Availability, ProbeReport
from qlora_hal.contract.capabilities import unmet_requirements
from qlora_hal.data.prepare import refuse_long_sequences
from qlora_hal.detect.discovery import find, listed, load_spec, reports
from qlora_hal.detect.requirements import quantization_of, requirements_of
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal.memory.estimate import spread_over
from qlora_hal.memory.fitting import BATCH, RECOMPUTE
from qlora_hal.memory.placement import AUTO, Moves, Placement, asked_recompute, chosen_placement
from qlora_hal.model.source import plan_model
from qlora_hal.ranks.planning import SHARD
from qlora_hal.run.prepare import estimated_memory, likely_dtype, moves_of

if TYPE_CHECKING:
    from pathlib import Path

    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.backend import BackendSpec, Quantization
    from qlora_hal.contract.values import ComputeDtype, LinearShape, MemoryEstimate
    from qlora_hal.memory.gpus import KnownGpu
    from qlora_hal.model.facts import ModelFacts


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model, its settings, and the backend that would train it. `here` is what its probe says of this machine;
    `device` tells of the device that is planned for, None where only the hardware is known that the backend is for;
    `memory_bytes` is what it has, as far as a card, the cap, or this machine says. `devices` train together, and
    `share` of them hold the packed layers together."""

    config: RunConfig
    facts: ModelFacts
    folder: Path
    spec: BackendSpec
    here: ProbeReport
    device: ProbeReport | None
    memory_bytes: int | None = None
    devices: int = 1
    share: int = 1

    @classmethod
    def of(cls, config: RunConfig, card: KnownGpu | None = None) -> PlannedModel:
        """On the named backend, else on the one that would be chosen on its own hardware, or on `card`; where a backend
        is ready here and no card is named, on this machine's device.

        Raises as `plan_model`, `refuse_long_sequences` and `backend_for`.
        """
        model = config.model
        source = plan_model(
            model.name_or_path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            tokenizer=False,
            config_is_enough=True,
        )
        refuse_long_sequences(config.data, source.facts.max_position_embeddings)
        spec = backend_for(config, source.facts, card)
        here = next(report for report in reports(listed()) if report.backend == spec.name)
        device = device_of(card, spec) if card is not None else here if here.ready else None
        return cls(config, source.facts, source.path, spec, here, device)

    def on(self, card: KnownGpu) -> PlannedModel:
        """The same model on a card. Raises as `backend_for`."""
        return replace(self, spec=backend_for(self.config, self.facts, card)).with_device(card)

    def with_device(self, card: KnownGpu) -> PlannedModel:
        """The same backend on a card, of which no more than `training.memory_limit` is taken."""
        limit = self.config.training.memory_limit_bytes
        has = card.memory_bytes if limit is None else min(limit, card.memory_bytes)
        return replace(self, device=device_of(card, self.spec), memory_bytes=has)

    def with_settings(self, changes: Mapping[str, object]) -> PlannedModel:
        """The same with some settings otherwise; a number of rows takes the place of `training.tokens_per_batch`, and a
        choice of recomputation that of the older switch. Raises ConfigError."""
        if BATCH in changes:
            changes = {"training.tokens_per_batch": None, **changes}
        if RECOMPUTE in changes:
            changes = {"training.gradient_checkpointing": False, **changes}
        return replace(self, config=resolve_settings(self.config, keywords=changes, environ={}).config)

    @property
    def quantization(self) -> Quantization:
        return quantization_of(self.config, self.facts, self.spec.capabilities)

    @property
    def compute_dtype(self) -> ComputeDtype:
        return likely_dtype(self.config, self.spec, self.device)

    def estimate(self, changes: Mapping[str, object] | None = None) -> MemoryEstimate:
        """The peak by arithmetic, with some settings otherwise."""
        asked = self.with_settings(changes) if changes else self
        return asked.estimate_of(self.facts)

    def estimate_of(self, facts: ModelFacts) -> MemoryEstimate:
        """The same settings with another model's facts."""
        return self._with_placement(facts, self.placement(facts))

    def placement(self, facts: ModelFacts | None = None) -> Placement:
        """What is recomputed and what is on the host: as asked for, and where that is `auto` what fits."""
        model = facts or self.facts
        return chosen_placement(
            self.config.training,
            self.spec.capabilities.features,
            lambda placement: self._with_placement(model, placement).high,
            self.memory_bytes,
            moves=self.moves,
        )

    @property
    def moves(self) -> Moves:
        return moves_of(self.spec, self.device, spread=self.is_sharded)

    @property
    def is_left_to_the_card(self) -> bool:
        """Whether what is kept where follows from the memory of the device."""
        return AUTO in (asked_recompute(self.config.training), self.config.training.base_offload)

    @property
    def rows_of_step(self) -> int | None:
        """What micro-batches of one device have to divide, where the rows of a step over all of them are settled."""
        rows = self.config.training.global_batch_size
        return None if rows is None else rows // self.devices

    @property
    def is_sharded(self) -> bool:
        """The layers cannot be on the host, then."""
        return self.share > 1 or self.config.parallel.mode == SHARD

    def _with_placement(self, facts: ModelFacts, placement: Placement) -> MemoryEstimate:
        targets = self.targets_of(facts)
        whole = estimated_memory(self.config, facts, self.spec, self.quantization, targets, self.device, placement)
        return spread_over(whole, facts, self.compute_dtype, self.share) if self.share > 1 else whole

    def targets_of(self, facts: ModelFacts) -> dict[str, LinearShape]:
        """The modules that carry the adapter."""
        names = resolve_targets(self.config.lora.target_modules, facts.linear_modules, self.config.lora.experts)
        require_rank(self.config.lora.r, [facts.linear_modules[name] for name in names])
        return {name: facts.linear_modules[name] for name in names}


def device_of(card: KnownGpu, spec: BackendSpec) -> ProbeReport:
    """What a probe would tell of a card that is not here. A backend that does not compute in the card's 16-bit dtype
    computes in float32."""
    able = spec.capabilities.compute_dtypes
    dtype: ComputeDtype = card.compute_dtype if card.compute_dtype in able else "float32"
    return ProbeReport(spec.name, Availability.READY, card.name, device_kind=card.device_kind, compute_dtype=dtype)


def backend_for(config: RunConfig, facts: ModelFacts, card: KnownGpu | None = None) -> BackendSpec:
    """The named backend; else the first by priority that can store this model, ready here or not, and runs on the card
    where one is named. Raises BackendNotFoundError, UnsupportedFeatureError QH-B01."""
    entries = listed()
    if config.backend.name != "auto":
        spec = load_spec(find(config.backend.name, entries))
        if lacks := unmet_requirements(requirements_of(config, facts), spec.capabilities):
            raise UnsupportedFeatureError(
                "QH-B01",
                f"Backend {spec.name} does not support what was requested: {'; '.join(lacks)}.",
                where="backend.name",
                fix="Change the setting that is named, or leave --backend out.",
            )
        if card is not None and card.vendor not in spec.card_vendors:
            raise UnsupportedFeatureError(
                "QH-B01",
                f"Backend {spec.name} does not run on an {card.name}.",
                where="--gpu",
                fix="Leave --backend out, or name another card.",
            )
        return spec
    specs = [load_spec(entry) for entry in entries if entry.built_in]
    if card is not None:
        specs = [spec for spec in specs if card.vendor in spec.card_vendors]
    needs = requirements_of(config, facts)
    able = [spec for spec in specs if not unmet_requirements(needs, spec.capabilities)]
    if not able:
        raise UnsupportedFeatureError(
            "QH-B01",
            f"No built-in backend supports these settings{f' on an {card.name}' if card else ''}.",
            cause="; ".join(
                f"{spec.name}: {', '.join(unmet_requirements(needs, spec.capabilities))}" for spec in specs
            ),
            fix="Change the setting that every line names, or name a backend with --backend.",
        )
    return max(able, key=lambda spec: spec.priority)
