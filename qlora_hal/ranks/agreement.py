"""What the ranks of one run decide together. All of it is sums of a few numbers over the ranks, so every rank comes to
the same answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qlora_hal.contract.values import Float64, LossSum
from qlora_hal.contract.world import World
from qlora_hal.errors import ConfigError

HASH_PARTS, HASH_PART_BYTES = 3, 6
"""A hash crosses as three integers of 48 bits, which float64 holds exactly."""
TEXT_BYTES = 64


class SumsOverRanks(Protocol):
    """What of a trainer is needed here."""

    def sum_over_ranks(self, values: Float64) -> Float64: ...


@dataclass(frozen=True, slots=True)
class Agreement:
    """The ranks of a run, seen from one of them. Every method is called by all ranks in the same order."""

    world: World
    trainer: SumsOverRanks

    @property
    def is_alone(self) -> bool:
        return self.world.size == 1

    def how_many(self, *flags: bool) -> tuple[int, ...]:
        """For each flag, on how many ranks it is set."""
        if self.is_alone:
            return tuple(map(int, flags))
        return tuple(int(count) for count in self.trainer.sum_over_ranks(np.array(flags, np.float64)))

    def of_each(self, values: Sequence[float]) -> Float64:
        """The numbers of every rank `[size, n]`."""
        table = np.zeros((self.world.size, len(values)))
        table[self.world.rank] = values
        return table if self.is_alone else self.trainer.sum_over_ranks(table.reshape(-1)).reshape(table.shape)

    def texts(self, own: str) -> list[str]:
        """A short text of every rank, cut after 64 bytes."""
        coded = own.encode("utf-8", "replace")[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
        found = self.of_each([float(byte) for byte in coded])
        return [bytes(map(int, row)).rstrip(b"\0").decode("utf-8", "replace") for row in found]

    def evaluation(self, own: LossSum) -> LossSum:
        """The sums of all ranks' evaluations."""
        if self.is_alone:
            return own
        weighted = own.loss_sum if own.weighted_loss_sum is None else own.weighted_loss_sum
        has_weights = float(own.weighted_loss_sum is not None)
        loss, tokens, weighted_loss, weights = self.trainer.sum_over_ranks(
            np.array([own.loss_sum, own.token_count, weighted, has_weights])
        )
        return LossSum(float(loss), int(tokens), float(weighted_loss) if weights else None)

    def require_alike(self, facts: Mapping[str, str]) -> None:
        """Raises ConfigError QH-R03 where ranks differ in any of these, naming all that differs and who."""
        if self.is_alone:
            return
        found = self.of_each([part for text in facts.values() for part in _parts_of_hash(text)])
        by_fact = found.reshape(self.world.size, len(facts), HASH_PARTS)
        differing = {
            name: [rank for rank in range(self.world.size) if (by_fact[rank, place] != by_fact[0, place]).any()]
            for place, name in enumerate(facts)
        }
        told = [
            f"{name} (rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))})"
            for name, ranks in differing.items()
            if ranks
        ]
        if told:
            raise ConfigError(
                "QH-R03",
                f"The ranks are not the same run. They differ from rank 0 in: {'; '.join(told)}.",
                cause="Every rank has to train the same model on the same rows with the same settings and software.",
                fix="Give all machines the same files, settings and package versions.",
                context={"differing": {name: ranks for name, ranks in differing.items() if ranks}},
            )


def _parts_of_hash(text: str) -> list[float]:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return [
        float(int.from_bytes(digest[at * HASH_PART_BYTES : (at + 1) * HASH_PART_BYTES], "big"))
        for at in range(HASH_PARTS)
    ]
