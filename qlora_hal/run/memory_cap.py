"""`training.memory_limit`: what is planned stays below it, or the run is refused before anything loads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_hal.errors import ConfigError, figures
from qlora_hal.memory.fitting import BATCH, RECOMPUTE, Room, flag
from qlora_hal.memory.placement import asked_recompute
from qlora_hal.run.card_table import remedy_of

if TYPE_CHECKING:
    from qlora_hal.run.planned_memory import PlannedModel
    from qlora_hal.run.prepare import PreparedRun


def splits_within(planned: PlannedModel, limit: int) -> int:
    """How often micro-batches have to be halved, as they are when memory runs out: the step stays the same.

    Raises ConfigError QH-U81 where one row is more than the limit, with what it needs and what would fit.
    """
    batch, splits = planned.config.full_batch_rows, 0
    high = planned.estimate().high
    while high > limit and batch > 1:
        batch, splits = (batch + 1) // 2, splits + 1
        high = planned.estimate({BATCH: batch}).high
    if high > limit:
        raise _too_low(planned, limit, high)
    return splits


def within_limit(prepared: PreparedRun, planned: PlannedModel) -> tuple[PreparedRun, str]:
    """The run as `training.memory_limit` lets it be, and the note that says what was changed, or "". Raises ConfigError
    QH-U81."""
    limit = planned.config.training.memory_limit_bytes
    if limit is None or not (splits := splits_within(planned, limit)):
        return prepared, ""
    rows = -(-planned.config.full_batch_rows // 2**splits)
    memory = planned.estimate({BATCH: rows})
    length, by_tokens = planned.config.data.max_seq_length, planned.config.training.tokens_per_batch is not None
    most = f"{rows * length} tokens" if by_tokens else f"{rows} row{'s' if rows > 1 else ''}"
    return replace(prepared, micro_batch_splits=splits, estimate=memory), (
        f"training.memory_limit is {figures.size(limit)}: micro-batches have at most {most}, of up to "
        f"{figures.size(memory.high)}. The step is the same."
    )


def _too_low(planned: PlannedModel, limit: int, needed: int) -> ConfigError:
    least = remedy_of(planned, Room(limit, planned.host_room))
    fix = (
        f"It fits with {least.words}: " + " ".join(flag(path, value) for path, value in _told(planned, least.settings))
        if least.fits
        else f"Give it more: with {least.words} it needs up to {figures.size(least.high)}. A smaller model needs less."
    )
    return ConfigError(
        "QH-U81",
        f"training.memory_limit is {figures.size(limit)}, and one row of up to "
        f"{planned.config.data.max_seq_length} tokens needs up to {figures.size(needed)}.",
        where="training.memory_limit",
        cause="The estimate with its margin is what is held against the limit (qlora-hal estimate shows its parts).",
        fix=fix,
        context={"limit_bytes": limit, "needed_bytes": needed, "least_bytes": least.high, "settings": least.settings},
    )


def _told(planned: PlannedModel, settings: dict[str, object]) -> list[tuple[str, object]]:
    """Those that are not as they are already; a level of quantization without its siblings."""
    now = planned.config.training
    kept = {BATCH: now.per_device_train_batch_size, RECOMPUTE: asked_recompute(now)}
    return [(path, value) for path, value in settings.items() if value is not None and kept.get(path) != value]
