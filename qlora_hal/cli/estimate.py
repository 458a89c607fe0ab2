"""`qlora-hal estimate`: the memory of a run by arithmetic over config.json or headers; no weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qlora_hal.cli.arguments import DevicesOption, Switch, as_devices
from qlora_hal.cli.estimate_text import PARTS, estimate_as_text, memory_lines
from qlora_hal.cli.flags import with_settings
from qlora_hal.cli.settings import resolved
from qlora_hal.errors import ConfigError
from qlora_hal.errors.terminal_text import show, show_json

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.values import MemoryEstimate
    from qlora_hal.memory.fitting import Fit, Remedy, Room, Verdict
    from qlora_hal.memory.gpus import KnownGpu
    from qlora_hal.memory.inference import InferenceMemory
    from qlora_hal.ranks.planning import DevicePlan
    from qlora_hal.run.card_table import CardRow
    from qlora_hal.run.memory_probe import Calibration
    from qlora_hal.run.planned_memory import PlannedModel

__all__ = ["Estimated", "estimate", "estimate_as_json", "estimate_as_text", "estimate_run", "memory_lines"]

PROBES = 3
"""So many batches are trained with at most before one is told that fits."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for beside the estimate itself."""

    gpu: str | None = None
    fit: bool = False
    cards: bool = False
    inference: bool = False
    probe: bool = False
    given: frozenset[str] = frozenset()
    """Settings that the user made, by dotted path: `fit` leaves them as they are."""


@dataclass(frozen=True, slots=True)
class Estimated:
    """An estimate and what it was made for.

    `memory` is of each of `plan`'s devices. `cards` are those that it is held against: the one that was named, or all
    known ones of the backend. A backend that computes on the CPU here has none, but this machine's memory in bytes;
    `gpu_bytes` are those of the card that is here, where none is named.
    `memory_limit` is the cap of the settings; `on_cards` are the estimates of cards, by name, that compute in another
    dtype. The last five are there where they were asked for.
    """

    planned: PlannedModel
    memory: MemoryEstimate
    cards: tuple[KnownGpu, ...]
    machine_bytes: int | None
    plan: DevicePlan
    gpu_bytes: int | None = None
    memory_limit: int | None = None
    on_cards: Mapping[str, MemoryEstimate] = field(default_factory=dict)
    remedy: Remedy | None = None
    fits_of: tuple[Fit, ...] | None = None
    table: tuple[CardRow, ...] | None = None
    inference: InferenceMemory | None = None
    probe: Calibration | None = None

    @property
    def backend(self) -> str:
        return self.planned.spec.name

    @property
    def not_ready(self) -> str:
        """Why the backend cannot run here, empty where it can."""
        return "" if self.planned.here.ready else self.planned.here.reason

    @property
    def total(self) -> int:
        """What was calibrated where there is a probe, else by arithmetic."""
        return self.probe.total if self.probe is not None else self.memory.total

    @property
    def high(self) -> int:
        return self.probe.high if self.probe is not None else self.memory.high

    def high_of(self, other: MemoryEstimate) -> int:
        """The peak of other settings with its margin, by what the probe took with these where there is one."""
        from qlora_hal.run.memory_probe import corrected

        return other.high if self.probe is None else corrected(other, self.memory, self.probe)

    def verdict(self, memory_bytes: int, devices: int = 1) -> Verdict:
        """Whether the peak of so many devices that share a memory fits."""
        from qlora_hal.memory.fitting import verdict

        return verdict(self.total * devices, self.high * devices, memory_bytes, self.planned.lacking_dtype)

    def lacking_on(self, card: KnownGpu) -> str:
        """Why a card does not compute in the dtype that is asked for, or ""."""
        from qlora_hal.detect.gpu_dtypes import lacking_dtype_of

        return lacking_dtype_of(self.planned.config.quantization.compute_dtype, card)

    def verdict_on(self, card: KnownGpu) -> Verdict:
        """Whether it fits a card, in the dtype that the card computes in."""
        from qlora_hal.memory.fitting import verdict

        there = self.on_cards.get(card.name)
        total, high = (self.total, self.high) if there is None else (there.total, there.high)
        return verdict(total, high, card.memory_bytes, self.lacking_on(card))

    @property
    def fits_here(self) -> bool:
        """Whether the memory of this machine is enough: the ranks of a CPU share it."""
        return self.machine_bytes is not None and self.high * self.plan.per_host <= self.machine_bytes

    @property
    def smallest_memory(self) -> int | None:
        """What each device's part of the run has to fit into: the cap, the named card, the one that is here, or its
        share of this machine's memory, whichever is the least."""
        named = [card.memory_bytes for card in self.cards] if len(self.cards) == 1 else []
        of_machine = self.machine_bytes // self.plan.per_host if self.machine_bytes is not None else None
        known = [*named, *filter(None, (self.memory_limit, of_machine, self.gpu_bytes))]
        return min(known, default=None)

    @property
    def room(self) -> Room | None:
        """The same with what the host of this machine has left."""
        from qlora_hal.memory.fitting import Room

        device = self.smallest_memory
        return None if device is None else Room(device, self.planned.host_room)


@with_settings()
def estimate(
    config: Annotated[Path | None, Parameter(help="Settings file: YAML, TOML or JSON.")] = None,
    /,
    *,
    demo: Annotated[bool, Switch, Parameter(help="Estimate for the small model that comes with the package.")] = False,
    devices: DevicesOption = None,
    nnodes: Annotated[int, Parameter(help="Hosts that the devices are on, as many on each.")] = 1,
    gpu: Annotated[str | None, Parameter(help="Estimate for a card that is not here: RTX 4090, A100 80GB.")] = None,
    fit: Annotated[
        bool, Switch, Parameter(help="Find the largest batch and the longest row that fit, and their settings.")
    ] = False,
    cards: Annotated[
        bool,
        Switch,
        Parameter(help="Table of all known cards: full tuning, LoRA, 8-bit, 4-bit, and what makes it fit."),
    ] = False,
    inference: Annotated[
        bool, Switch, Parameter(help="Memory of answering too: weights, and keys and values of the batch.")
    ] = False,
    probe: Annotated[
        bool, Switch, Parameter(help="Train a few layers of the model here, for seconds, and calibrate the estimate.")
    ] = False,
    json: Annotated[bool, Switch, Parameter(help="Print as JSON.")] = False,
    flags: Mapping[str, object],
) -> int:
    """Estimate the memory of a run: qlora-hal estimate --model M --gpu 'RTX 4090' --fit. config.json is enough."""
    from qlora_hal.config.resolve import require_settings

    settings = resolved(config, flags, demo=demo)
    require_settings(settings.config, "model.name_or_path")
    wanted = Wanted(gpu, fit, cards, inference, probe, settings.given)
    estimated = estimate_run(settings.config, as_devices(devices), wanted, hosts=nnodes)
    if json:
        show_json(estimate_as_json(estimated))
    else:
        show(estimate_as_text(estimated, settings.config))
    return 0


def estimate_run(
    config: RunConfig, devices: int | str | None = None, wanted: Wanted | None = None, *, hosts: int = 1
) -> Estimated:
    """The peak on the backend that is named, else on the one that would be chosen on its own hardware, or on the card
    that is named; where a backend is ready here, on this machine's. `devices` are those of all `hosts`, and may be more
    than there are here: it is arithmetic, but for `wanted.probe`.

    Raises ConfigError QH-R01 for devices that cannot be dealt out to the hosts, QH-U80 for an unknown card, QH-U82
    where none of the memories is known that `wanted.fit` needs, ModelError QH-M60 and BackendError QH-M61 of the probe,
    and as `PlannedModel.of`.
    """
    from qlora_hal.detect.device_memory import device_memory
    from qlora_hal.detect.hardware import memory_here
    from qlora_hal.detect.selection import has_accelerator
    from qlora_hal.memory.gpus import KNOWN_GPUS, known_gpu
    from qlora_hal.ranks.launching import AUTO, number_of
    from qlora_hal.ranks.planning import SHARD, on_each_of, plan_for
    from qlora_hal.ranks.starting import require_number
    from qlora_hal.run.planned_memory import PlannedModel

    require_number(devices)
    wanted = wanted or Wanted()
    card = known_gpu(wanted.gpu) if wanted.gpu is not None else None
    planned = PlannedModel.of(config, card)
    spec = planned.spec
    is_here = card is None and planned.here.ready
    accelerated = card is not None or has_accelerator(spec, (planned.here,))
    machine = None if accelerated else memory_here()
    number = hosts * number_of(AUTO, spec, planned.here) if devices == AUTO else int(devices or 1)
    planned = replace(planned, devices=number, per_host=on_each_of(hosts, number))
    if is_here:
        planned = planned.on_this_machine()
    sharing = replace(planned, share=number)
    plan = plan_for(
        config,
        number,
        planned.per_host,
        spec,
        planned.estimate(),
        sharing.estimate,
        planned.memory_bytes,
        planned.placement().base_offload,
    )
    if plan.mode == SHARD:
        planned = sharing
    known = tuple(card for card in KNOWN_GPUS if accelerated and card.vendor in spec.card_vendors)
    estimated = Estimated(
        planned=planned,
        memory=plan.memory,
        plan=plan,
        cards=known if card is None else (card,),
        machine_bytes=machine,
        gpu_bytes=device_memory(spec, planned.here) if is_here and accelerated else None,
        memory_limit=config.training.memory_limit_bytes,
        on_cards=_in_other_dtypes(planned, known) if card is None and plan.devices == 1 else {},
    )
    return _with_wanted(estimated, wanted, config)


def _in_other_dtypes(planned: PlannedModel, cards: Sequence[KnownGpu]) -> dict[str, MemoryEstimate]:
    """The estimates of cards whose 16-bit dtype is not the one that was estimated with, where none was asked for; of
    all cards where something is chosen by their memory."""
    if planned.is_left_to_the_card:
        return {card.name: planned.with_device(card).estimate() for card in cards}
    if planned.config.quantization.compute_dtype != "auto":
        return {}
    of_dtype: dict[str, MemoryEstimate] = {}
    for card in cards:
        if card.compute_dtype != planned.compute_dtype and card.compute_dtype not in of_dtype:
            of_dtype[card.compute_dtype] = planned.with_device(card).estimate()
    return {card.name: of_dtype[card.compute_dtype] for card in cards if card.compute_dtype in of_dtype}


def _with_wanted(estimated: Estimated, wanted: Wanted, config: RunConfig) -> Estimated:
    """The same with what was asked for beside it."""
    from qlora_hal.memory.fitting import Verdict
    from qlora_hal.memory.inference import inference_memory
    from qlora_hal.run.card_table import card_rows, fits_of, remedy_of, remembered

    planned = estimated.planned
    needs = None
    if wanted.probe:
        _refuse_probe_elsewhere(planned, wanted)
        estimated = replace(estimated, probe=_probed(estimated, planned))
        needs = remembered(planned, estimated.high_of)
    room = estimated.room
    if room is not None and (
        estimated.verdict(room.device) is not Verdict.FITS or not room.host_holds(planned.needs())
    ):
        estimated = replace(estimated, remedy=remedy_of(planned, room, needs))
    if wanted.fit:
        if room is None:
            raise ConfigError(
                "QH-U82",
                "--fit needs to know the memory that the run has to fit into.",
                where="command line --fit",
                fix="Name a card or a size: --gpu 'RTX 4090', or --training.memory_limit 24GB",
            )
        fitting = fits_of(planned, room, wanted.given, needs)
        estimated = replace(estimated, fits_of=_first_measured(estimated, fitting, room, wanted) if needs else fitting)
    if wanted.cards:
        estimated = replace(estimated, table=card_rows(planned))
    if wanted.inference:
        batch, length = config.full_batch_rows, config.data.max_seq_length
        answering = inference_memory(
            planned.facts, planned.quantization, planned.compute_dtype, batch, length, estimated.memory.runtime
        )
        estimated = replace(estimated, inference=answering)
    return estimated


def _probed(estimated: Estimated, planned: PlannedModel) -> Calibration:
    """What a few layers take here with the settings of `planned`."""
    from qlora_hal.run.memory_probe import probed

    on_host = estimated.machine_bytes is not None
    return probed(planned.config, planned.facts, planned.estimate_of, model=planned.folder, on_host=on_host)


def _first_measured(estimated: Estimated, found: tuple[Fit, ...], room: Room, wanted: Wanted) -> tuple[Fit, ...]:
    """What fits, the first of it trained with here: where that takes more than was foreseen, what it took is what the
    rest is foreseen by."""
    from qlora_hal.run.card_table import fits_of, remembered

    for _ in range(PROBES):
        if not found:
            break
        first, *others = found
        there = estimated.planned.with_settings(first.settings)
        calibration = _probed(estimated, there)
        if calibration.high <= room.device:
            return replace(first, high=calibration.high, is_measured=True), *others
        corrected = replace(estimated, planned=there, memory=there.estimate(), probe=calibration)
        found = fits_of(estimated.planned, room, wanted.given, remembered(estimated.planned, corrected.high_of))
    return found


def _refuse_probe_elsewhere(planned: PlannedModel, wanted: Wanted) -> None:
    """Raises ConfigError QH-U83 for a probe of a device that is not here."""
    if wanted.gpu is None and planned.here.ready:
        return
    reason = f"--gpu names {wanted.gpu}" if wanted.gpu is not None else planned.here.reason.rstrip(".")
    raise ConfigError(
        "QH-U83",
        f"--probe measures on a device of this machine: {reason}.",
        where="command line --probe",
        fix="Leave --probe out, or run it on the machine that will train, without --gpu.",
    )


def estimate_as_json(estimated: Estimated) -> dict[str, object]:
    """All facts of the text, in bytes."""
    memory, planned = estimated.memory, estimated.planned
    stored, needs = planned.quantization, planned.needs()
    told: dict[str, object] = {
        "backend": estimated.backend,
        "not_ready": estimated.not_ready,
        "read_from": planned.facts.read_from,
        "parameters": planned.facts.parameter_count,
        "weight_format": stored.weight_format.value,
        "block_size": stored.block_size,
        "double_quant": stored.double_quant,
        "compute_dtype": planned.compute_dtype,
        "fp8_products": planned.config.quantization.fp8_products,
        "bytes": {part: getattr(memory, part) for part in PARTS},
        "total": memory.total,
        "high": memory.high,
        "plan": estimated.plan.as_json(),
        "host": {"bytes": needs.host, "left_here": planned.host_room, "disk_bytes": needs.disk},
        "cards": [
            {
                "name": card.name,
                "memory_bytes": card.memory_bytes,
                "fits": estimated.verdict_on(card).value == "fits",
                "class": estimated.verdict_on(card).value,
                "lacks": estimated.lacking_on(card),
                "architecture": card.architecture,
                "source": card.source,
            }
            for card in estimated.cards
        ],
        "machine": None
        if (size := estimated.machine_bytes) is None
        else {"memory_bytes": size, "fits": estimated.fits_here},
        "gpu": None
        if (size := estimated.gpu_bytes) is None
        else {"memory_bytes": size, "class": estimated.verdict(size).value},
        "memory_limit": None
        if (limit := estimated.memory_limit) is None
        else {"memory_bytes": limit, "class": estimated.verdict(limit).value},
        "advice": None
        if (advice := estimated.remedy) is None
        else {
            "settings": advice.settings,
            "high": advice.high,
            "host_bytes": advice.needs.host,
            "disk_bytes": advice.needs.disk,
            "fits": advice.fits,
            "time": round(advice.time, 3),
            "gives_up": list(advice.gives_up),
        },
    }
    if estimated.probe is not None:
        told["probe"] = estimated.probe.as_json()
    if estimated.fits_of is not None:
        told["fit"] = [
            {
                "settings": one.settings,
                "high": one.high,
                "host_bytes": one.host,
                "disk_bytes": one.disk,
                "time": round(one.choice.time, 3),
                "gives_up": list(one.taken.gives_up),
                "measured": one.is_measured,
            }
            for one in estimated.fits_of
        ]
    if (answering := estimated.inference) is not None:
        told["inference"] = {
            "sequences": answering.sequences,
            "length": answering.length,
            "bytes": {"weights": answering.weights, "kv_cache": answering.cache, "runtime": answering.runtime},
            "total": answering.total,
        }
    if estimated.table is not None:
        told["table"] = [row.as_json() for row in estimated.table]
    return told
