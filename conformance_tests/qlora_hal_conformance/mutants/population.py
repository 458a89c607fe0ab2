"""All mutants, in the order of the sections that catch them."""

from __future__ import annotations

from collections.abc import Mapping

from . import cheats, formats, forward, loss, memory, plugins, sizes, state, training
from .registry import Mutant

MUTANTS: tuple[Mutant, ...] = tuple(
    sorted(
        (m for room in (plugins, formats, forward, loss, training, state, sizes, memory, cheats) for m in room.MUTANTS),
        key=lambda mutant: mutant.caught_by[0],
    )
)

BY_NAME: Mapping[str, Mutant] = {mutant.name: mutant for mutant in MUTANTS}
assert len(BY_NAME) == len(MUTANTS), "two mutants have one name"
