"""What run.json keeps and people read of a run that went on with another backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far the model that goes on is from the one that was saved, over the same tokens.

    `kl_mean` and `kl_max` (of rows) are nats per token: the likeliest tokens one by one, all others as one, hence at
    most the whole Kullback-Leibler divergence. `top1` is the share of places where both name the same next token.
    """

    rows: int
    tokens: int
    kl_mean: float
    kl_max: float
    top1: float

    def as_text(self) -> str:
        return (
            f"measured on {self.rows} rows ({self.tokens} tokens): KL {self.kl_mean:.2g} nats per token "
            f"(worst row {self.kl_max:.2g}), same next token in {self.top1:.1%}"
        )


@dataclass(frozen=True, slots=True)
class Transfer:
    """A run that goes on elsewhere than where it was saved."""

    step: int
    from_backend: str
    to_backend: str
    exact: tuple[str, ...]
    inexact: tuple[str, ...]
    gap: Divergence | None = None

    def lines(self) -> list[str]:
        """For people, before the first step."""
        there = f"{self.from_backend} to {self.to_backend}" if self.from_backend != self.to_backend else self.to_backend
        told = [f"transferred at step {self.step}: {there}", f"exact: {', '.join(self.exact)}"]
        told.append(f"not exact: {', '.join(self.inexact) or 'nothing but the rounding of each backend'}")
        return told if self.gap is None else [*told, self.gap.as_text()]

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def transfer_from(record: Mapping[str, Any]) -> Transfer:
    """The inverse of `as_json`."""
    gap = record.get("gap")
    lists = {name: tuple(record[name]) for name in ("exact", "inexact")}
    return Transfer(**{**record, **lists, "gap": None if gap is None else Divergence(**gap)})
