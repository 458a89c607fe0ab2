"""How many micro-batches of a step each rank has, so that a step means the same with whatever number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_hal.contract.world import World
from qlora_hal.errors import ConfigError

if TYPE_CHECKING:
    from qlora_hal.config.schema import TrainingConfig


def accumulation_of(training: TrainingConfig, world: World, sequences_per_step: int | None = None) -> int:
    """Micro-batches of each rank: those of the settings, or as many as a step of so many sequences asks for, which is
    what a run that goes on has, and what `training.global_batch_size` says. Raises ConfigError QH-R05."""
    wanted = sequences_per_step or training.global_batch_size
    if wanted is None:
        return training.gradient_accumulation_steps
    batch = training.per_device_train_batch_size
    accumulation, left = divmod(wanted, batch * world.size)
    if left or not accumulation:
        ranks = "1 device" if world.size == 1 else f"{world.size} devices"
        raise ConfigError(
            "QH-R05",
            f"{wanted} sequences a step cannot be dealt out to {ranks} in micro-batches of {batch}.",
            where="training.global_batch_size" if sequences_per_step is None else "the run's sequences in a step",
            cause=f"{wanted} is no multiple of {batch} x {world.size} = {batch * world.size}.",
            fix=f"Use a number of devices that divides {wanted // batch if wanted % batch == 0 else wanted}"
            + ("." if sequences_per_step is not None else ", or another training.per_device_train_batch_size."),
            context={"sequences_per_step": wanted, "devices": world.size, "per_device_train_batch_size": batch},
        )
    return accumulation


def sequences_of_one_rank(training: TrainingConfig) -> int:
    """Sequences in a step of a run that an earlier release began: it knew one rank alone."""
    return training.per_device_train_batch_size * training.gradient_accumulation_steps
