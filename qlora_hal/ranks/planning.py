"""What a run on several devices will be, told before any is asked: batch, memory of each, and how they share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.world import World
from qlora_hal.errors import ConfigError, UnsupportedFeatureError
from qlora_hal.errors.figures import size
from qlora_hal.memory.placement import LAYERS
from qlora_hal.ranks.window_share import accumulation_of

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.backend import BackendSpec
    from qlora_hal.contract.values import MemoryEstimate

AUTO, DATA, SHARD = "auto", "data", "shard"


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """`per_host` of the `devices` are on one host and share its memory. `mode` is how all share the base and `why` it
    is that one; `memory` is of each device, `sequences_per_step` of all together."""

    devices: int
    per_host: int
    mode: str
    why: str
    sequences_per_step: int
    memory: MemoryEstimate

    def as_json(self) -> dict[str, object]:
        return {
            "devices": self.devices,
            "per_host": self.per_host,
            "mode": self.mode,
            "why": self.why,
            "sequences_per_step": self.sequences_per_step,
        }


def plan_for(
    config: RunConfig,
    devices: int,
    per_host: int,
    spec: BackendSpec,
    memory: MemoryEstimate,
    spread: Callable[[], MemoryEstimate],
    memory_there: int | None,
    base_offload: Collection[str],
) -> DevicePlan:
    """The plan for so many devices, `per_host` of them on one host, each with `memory_there` bytes where that is known;
    `memory` is that of one with the whole base but for `base_offload`, which is on the host, `spread` gives that of
    each with a share of it. Raises ConfigError QH-R05, UnsupportedFeatureError QH-R06."""
    if devices > 1 and Feature.DATA_PARALLEL not in spec.capabilities.features:
        raise not_on_several(spec.name, devices)
    sequences = config.training.per_device_train_batch_size * accumulation_of(config.training, World(0, devices))
    mode, why = mode_of(config, devices, spec, memory, memory_there, base_offload)
    of_each = spread() if mode == SHARD else memory
    return DevicePlan(devices, per_host, mode, why, sequences * devices, of_each)


def mode_of(
    config: RunConfig,
    devices: int,
    spec: BackendSpec,
    memory: MemoryEstimate,
    memory_there: int | None,
    base_offload: Collection[str],
) -> tuple[str, str]:
    """How the devices share the base, of which `base_offload` is on the host, and why. Raises UnsupportedFeatureError
    QH-R06 where the base cannot be spread."""
    if devices == 1:
        return "", "one device"
    spreads = can_spread(spec)
    if config.parallel.mode == SHARD and not spreads:
        raise UnsupportedFeatureError(
            "QH-R06",
            f"The base of backend {spec.name} cannot be spread over devices (parallel.mode shard).",
            where="parallel.mode",
            fix="Set parallel.mode to data, or leave it out.",
        )
    if config.parallel.mode == SHARD:
        return SHARD, "each device holds a share of the packed base, as asked for"
    if LAYERS in base_offload:
        return DATA, "each device reads the layers from its host"
    if config.parallel.mode == AUTO and spreads and memory_there is not None and memory.total > memory_there:
        return SHARD, f"with a whole base each device would need {size(memory.total)} of its {size(memory_there)}"
    return DATA, "each device holds the whole packed base"


def on_each_of(hosts: int, devices: int) -> int:
    """How many of the devices each of so many hosts has, all as many, as torchrun starts them. Raises ConfigError
    QH-R01."""
    if hosts < 1 or devices % hosts:
        raise ConfigError(
            "QH-R01",
            f"{devices} device{'' if devices == 1 else 's'} cannot be dealt out to {hosts} hosts.",
            where="--nnodes",
            cause="--devices counts those of all hosts together, and each host has as many.",
            fix="Give --nnodes a number that divides --devices.",
        )
    return devices // hosts


def can_spread(spec: BackendSpec) -> bool:
    """Whether devices can hold shares of the base."""
    return Feature.SHARDED_BASE in spec.capabilities.features


def not_on_several(backend: str, devices: int) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        "QH-R06",
        f"Backend {backend} cannot train on {devices} devices together.",
        where="--devices",
        fix="Leave --devices out, or choose another backend: qlora-hal backends lists them.",
    )
