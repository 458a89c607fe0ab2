"""The memory of a run that is only planned: from its settings and what config.json or headers say of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_hal.adapter.targets import require_rank, resolve_targets
from qlora_hal.config.resolve import resolve_settings
from qlora_hal.contract.backend import Availability, ProbeReport
from qlora_hal.contract.capabilities import Feature, unmet_requirements
from qlora_hal.contract.memory_constants import OFFLOADED_LAYERS, ON_DISK, MemoryQuery
from qlora_hal.data.prepare import refuse_long_sequences
from qlora_hal.detect.device_memory import cards_of, device_memory, host_memory_left
from qlora_hal.detect.discovery import find, listed, load_spec, reports
from qlora_hal.detect.gpu_dtypes import lacking_dtype_of
from qlora_hal.detect.requirements import quantization_of, requirements_of
from qlora_hal.detect.selection import has_accelerator
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal.formats.catalogue import record_of
from qlora_hal.memory.estimate import estimate, spread_over, weight_bytes
from qlora_hal.memory.fitting import BATCH, RECOMPUTE, Needs, Room, chosen_placement
from qlora_hal.memory.gpus import DEVICE_KINDS
from qlora_hal.memory.placement import (
    AUTO,
    IN_HOST_MEMORY,
    LAYERS,
    OFFLOAD,
    HostBytes,
    Moves,
    Placement,
    asked_recompute,
    host_bytes,
    with_base_offloaded,
)
from qlora_hal.memory.time_prices import PassChoice
from qlora_hal.model.shape import weights_to_each
from qlora_hal.model.source import plan_model
from qlora_hal.ranks.planning import SHARD, mode_of

if TYPE_CHECKING:
    from pathlib import Path

    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.backend import BackendSpec, Quantization
    from qlora_hal.contract.values import ComputeDtype, LinearShape, MemoryEstimate
    from qlora_hal.detect.gpu_dtypes import Architecture
    from qlora_hal.memory.gpus import KnownGpu
    from qlora_hal.model.facts import ModelFacts


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model, its settings, and the backend that would train it. `here` is what its probe says of this machine;
    `device` tells of the device that is planned for, None where only the hardware is known that the backend is for;
    `memory_bytes` is what it has, as far as a card, the cap, or this machine says. `devices` train together, at most
    `per_host` of them on one host, and `share` of them hold the packed layers together. `modules` are the linear layers
    of the architecture's own outline, where that was built. `gpu` tells the generation of the device, and `host_room`
    what may wait on its host where that is this machine."""

    config: RunConfig
    facts: ModelFacts
    folder: Path
    spec: BackendSpec
    here: ProbeReport
    device: ProbeReport | None
    memory_bytes: int | None = None
    devices: int = 1
    per_host: int = 1
    share: int = 1
    modules: Mapping[str, LinearShape] | None = None
    gpu: Architecture | None = None
    host_room: int | None = None

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
        planned = cls(config, source.facts, source.path, spec, here, None, config.training.memory_limit_bytes)
        if card is not None:
            return planned.with_device(card)
        return planned.on_this_machine() if here.ready else planned

    def on_this_machine(self) -> PlannedModel:
        """On the device that is here, of which no more than `training.memory_limit` is taken; devices that are the
        machine's processor share its memory."""
        has = device_memory(self.spec, self.here)
        if has is not None and not has_accelerator(self.spec, (self.here,)):
            has //= self.per_host
        return replace(
            self,
            device=self.here,
            memory_bytes=self._limited(has),
            gpu=next(iter(cards_of(self.spec, self.here)), None),
            host_room=host_memory_left(),
        )

    def on(self, card: KnownGpu) -> PlannedModel:
        """The same model on a card. Raises as `backend_for`."""
        return replace(self, spec=backend_for(self.config, self.facts, card)).with_device(card)

    def with_device(self, card: KnownGpu) -> PlannedModel:
        """The same backend on a card, of which no more than `training.memory_limit` is taken; its host is not known."""
        has = self._limited(card.memory_bytes)
        return replace(self, device=device_of(card, self.spec), memory_bytes=has, gpu=card, host_room=None)

    def _limited(self, memory_bytes: int | None) -> int | None:
        """No more than `training.memory_limit`."""
        return min(filter(None, (memory_bytes, self.config.training.memory_limit_bytes)), default=None)

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

    @property
    def lacking_dtype(self) -> str:
        """Why the device does not compute in the dtype that is asked for, to complete `it is of`, or ""."""
        return lacking_dtype_of(self.config.quantization.compute_dtype, self.gpu)

    def estimate(self, changes: Mapping[str, object] | None = None) -> MemoryEstimate:
        """The peak by arithmetic, with some settings otherwise."""
        asked = self.with_settings(changes) if changes else self
        return asked.estimate_of(self.facts)

    def estimate_of(self, facts: ModelFacts) -> MemoryEstimate:
        """The same settings with another model's facts."""
        return self.memory_with(self.placement(facts), facts)

    def placement(self, facts: ModelFacts | None = None) -> Placement:
        """What is recomputed and what is on the host: as asked for, and where that is `auto` what fits."""
        model = facts or self.facts
        return chosen_placement(
            self.config.training,
            self.spec.capabilities.features,
            lambda placement: self.needs_with(placement, model),
            self.price_with,
            self.room,
            moves=self.moves,
        )

    @property
    def room(self) -> Room | None:
        """What the run may take, None where the memory of the device is not known."""
        return None if self.memory_bytes is None else Room(self.memory_bytes, self.host_room)

    @property
    def fits(self) -> bool:
        """Whether it does with what is chosen; a memory that is not known holds all."""
        return self.room is None or self.room.holds(self.needs())

    def needs(self) -> Needs:
        """Of each device, and of a host for all of its devices."""
        return self.needs_with(self.placement())

    def needs_with(self, placement: Placement, facts: ModelFacts | None = None) -> Needs:
        """The same with this of it recomputed and on the host."""
        waits = self.host_bytes(placement, facts)
        return Needs(self.memory_with(placement, facts).high, waits.memory, waits.disk)

    def host_bytes(self, placement: Placement, facts: ModelFacts | None = None) -> HostBytes:
        """What waits on a host, for all devices that are on it."""
        stays = placement.recompute != OFFLOAD and not placement.base_offload
        if stays or device_kind_of(self.spec, self.device) in IN_HOST_MEMORY:
            return HostBytes()
        model = facts or self.facts
        stored = self.quantization
        weights = weight_bytes(model, stored.weight_format, stored.block_size, stored.double_quant, self.compute_dtype)
        tokens = self.config.full_batch_rows * self.config.data.max_seq_length
        waits = host_bytes(weights, model, self.compute_dtype, placement, tokens).times(self.per_host)
        return waits.with_layers_on_disk() if self._layers_are_on_disk(waits.layers) else waits

    def _layers_are_on_disk(self, layers: int) -> bool:
        """As the backend has it: where it is told to, or, left to itself, where the host's memory is too small for so
        many bytes."""
        if OFFLOADED_LAYERS not in self.spec.option_choices:
            return False
        asked = self.config.backend.options.get(OFFLOADED_LAYERS, AUTO)
        too_large = self.host_room is not None and layers > self.host_room
        return asked == ON_DISK or (asked == AUTO and too_large)

    def price(self) -> PassChoice:
        """What a pass takes."""
        return self.price_with(self.placement())

    def price_with(self, placement: Placement) -> PassChoice:
        tokens = self.config.full_batch_rows * self.config.data.max_seq_length
        bits = record_of(self.quantization.weight_format).bits
        readers = self.per_host if LAYERS in placement.base_offload and self.host_bytes(placement).disk else 0
        to_each = weights_to_each(self.facts)
        return PassChoice(tokens, placement.recompute, placement.base_offload, bits, to_each, readers)

    @property
    def counts_on_host(self) -> bool:
        """Whether a host's memory decides about what is planned: it is the devices', or something can wait there."""
        features = self.spec.capabilities.features
        can_wait = Feature.BASE_OFFLOAD in features or Feature.RECOMPUTATION_CHOICE in features
        return device_kind_of(self.spec, self.device) == "cpu" or (self.moves.to_host and can_wait)

    @property
    def moves(self) -> Moves:
        return moves_of(self.spec, self.device, spread=self.is_sharded)

    def how_spread(self) -> tuple[str, str]:
        """How the devices share the base, and why, where they have not begun to. Raises as `mode_of`."""
        placement = self.placement()
        memory = self.memory_with(placement)
        return mode_of(self.config, self.devices, self.spec, memory, self.memory_bytes, placement.base_offload)

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

    def memory_with(self, placement: Placement, facts: ModelFacts | None = None) -> MemoryEstimate:
        """The peak by arithmetic with this of it recomputed and on the host."""
        model = facts or self.facts
        targets = self.targets_of(model)
        whole = estimated_memory(self.config, model, self.spec, self.quantization, targets, self.device, placement)
        return spread_over(whole, model, self.compute_dtype, self.share) if self.share > 1 else whole

    def targets_of(self, facts: ModelFacts) -> dict[str, LinearShape]:
        """The modules that carry the adapter."""
        modules = self.modules if self.modules is not None and facts is self.facts else facts.linear_modules
        names = resolve_targets(self.config.lora.target_modules, modules, self.config.lora.experts)
        require_rank(self.config.lora.r, [modules[name] for name in names])
        return {name: modules[name] for name in names}


def estimated_memory(
    config: RunConfig,
    facts: ModelFacts,
    spec: BackendSpec,
    quantization: Quantization,
    targets: Mapping[str, LinearShape],
    report: ProbeReport | None,
    placement: Placement,
) -> MemoryEstimate:
    """The peak by arithmetic, for the longest batch this configuration allows, on the device that `report` tells of;
    without one on the hardware that the backend is made for."""
    compute_dtype = likely_dtype(config, spec, report)
    if device_kind_of(spec, report) in IN_HOST_MEMORY:
        placement = placement.in_one_memory()
    memory = estimate(
        facts,
        weight_format=quantization.weight_format,
        block_size=quantization.block_size,
        double_quant=quantization.double_quant,
        compute_dtype=compute_dtype,
        r=config.lora.r,
        targets=targets,
        optimizer=config.training.optim,
        batch_size=config.full_batch_rows,
        sequence_length=config.data.max_seq_length,
        gradient_checkpointing=placement.recomputes_layers,
        constants=spec.memory(
            MemoryQuery(
                facts.model_type,
                compute_dtype,
                config.lora.dropout,
                config.backend.options,
                report.device_kind if report is not None else "",
                placement.recompute,
            )
        ),
    )
    return with_base_offloaded(memory, facts, compute_dtype, placement.base_offload)


def moves_of(spec: BackendSpec, report: ProbeReport | None, *, spread: bool) -> Moves:
    """What can go to the host of the device that `report` tells of, without one of the hardware that the backend is
    made for. `spread` layers are on the devices."""
    return Moves(device_kind_of(spec, report) not in IN_HOST_MEMORY, not spread)


def device_kind_of(spec: BackendSpec, report: ProbeReport | None) -> str:
    """`cuda`, `rocm`, `mps`, `cpu`, or "" where nothing says it."""
    if report is not None and report.device_kind:
        return report.device_kind
    if not spec.uses_accelerator:
        return "cpu"
    kinds = {DEVICE_KINDS.get(vendor, "") for vendor in spec.card_vendors}
    return kinds.pop() if len(kinds) == 1 else ""


def likely_dtype(config: RunConfig, spec: BackendSpec, report: ProbeReport | None = None) -> ComputeDtype:
    """What `auto` will most likely become; only computing on the device settles it."""
    asked = config.quantization.dtype
    if asked != "auto":
        return asked
    if report is not None and report.compute_dtype is not None:
        return report.compute_dtype
    return "bfloat16" if spec.uses_accelerator else "float32"


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
