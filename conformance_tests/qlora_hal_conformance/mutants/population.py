"""All mutants, in the order of the sections that catch them, and what else has a name here."""

from __future__ import annotations

from collections.abc import Mapping

from . import (
    cheats,
    combinations,
    experts,
    families,
    formats,
    forward,
    fp8,
    generation,
    loss,
    masks,
    memory,
    plugins,
    process,
    published,
    ranks,
    refusals,
    settings,
    sizes,
    state,
    streaming,
    training,
    watched,
    weights,
)
from .registry import Mutant
from .unseen import UNSEEN
from .variations import VARIATIONS

_ROOMS = (
    plugins,
    formats,
    forward,
    families,
    experts,
    fp8,
    published,
    loss,
    training,
    state,
    sizes,
    weights,
    refusals,
    settings,
    masks,
    generation,
    process,
    ranks,
    memory,
    watched,
    cheats,
    combinations,
    streaming,
)

MUTANTS: tuple[Mutant, ...] = tuple(
    sorted(
        (mutant for room in _ROOMS for mutant in room.MUTANTS),
        key=lambda mutant: mutant.caught_by[0],
    )
)

BY_NAME: Mapping[str, Mutant] = {mutant.name: mutant for mutant in MUTANTS}
assert len(BY_NAME) == len(MUTANTS), "two mutants have one name"

NAMED: Mapping[str, Mutant] = {**BY_NAME, **{other.name: other for other in (*UNSEEN, *VARIATIONS)}}
"""What `specs` and `trainers` offer: besides the list the unseen mutants, and the honest variations."""
assert len(NAMED) == len(MUTANTS) + len(UNSEEN) + len(VARIATIONS), "two mutants have one name"
