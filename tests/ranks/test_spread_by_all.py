"""`parallel.mode auto`: the base lies in parts on all devices or on none."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qlora_hal.config.schema import RunConfig
from qlora_hal.contract.values import Float64
from qlora_hal.contract.world import World
from qlora_hal.detect.discovery import find, listed, load_spec
from qlora_hal.memory.placement import Placement
from qlora_hal.ranks.agreement import Agreement
from qlora_hal.run.session import Session

NEEDED = 10_000_000_000


class Others:
    """A trainer on a device of so much memory; `short` other ranks have less than is needed."""

    def __init__(self, memory: int, short: int) -> None:
        self._memory, self._short = memory, short

    def device_facts(self) -> Any:
        return SimpleNamespace(memory_limit_bytes=self._memory)

    def sum_over_ranks(self, values: Float64) -> Float64:
        return np.asarray(values + self._short, np.float64)


@pytest.mark.parametrize(
    ("memory", "short", "spread", "told"),
    [
        (NEEDED + 1, 0, False, []),
        (NEEDED + 1, 2, True, ["parallel.mode is shard: a whole base does not fit on 2 of the devices"]),
        (
            NEEDED - 1,
            0,
            True,
            ["parallel.mode is shard: with a whole base each device would need 9.31 GiB of its 9.31 GiB"],
        ),
    ],
)
def test_where_the_base_does_not_fit_on_one_device_all_hold_parts(
    memory: int, short: int, spread: bool, told: Sequence[str]
) -> None:
    session, notes = session_on(memory, short, mode="data", why="each device holds the whole packed base")
    assert Session._shards_base(session) is spread
    assert notes == told


def test_what_was_planned_is_done_although_the_device_has_more() -> None:
    """A dry run has told it, and the estimate is of a share."""
    session, notes = session_on(2 * NEEDED, 0, mode="shard", why="as the dry run said")
    assert Session._shards_base(session)
    assert notes == ["parallel.mode is shard: as the dry run said"]


def session_on(memory: int, short: int, *, mode: str, why: str) -> tuple[Any, list[str]]:
    """One of three ranks, on a device of so much memory, with what it notes."""
    notes: list[str] = []
    trainer, world = Others(memory, short), World(0, 3)
    prepared = SimpleNamespace(
        world=world,
        estimate=SimpleNamespace(total=NEEDED),
        mode=mode,
        why_mode=why,
        placement=Placement(),
        resolved_backend=SimpleNamespace(choice=SimpleNamespace(spec=load_spec(find("cpu_torch", listed())))),
    )
    session = SimpleNamespace(
        _config=RunConfig(),
        _trainer=trainer,
        _ranks=Agreement(world, trainer),
        _context=SimpleNamespace(console=SimpleNamespace(note=notes.append)),
        _prepared=prepared,
    )
    return session, notes
