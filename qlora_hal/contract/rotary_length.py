"""Rotary positions that turn by other factors in longer rows: LongRoPE and dynamic NTK.

transformers picks the factors of a whole batch by its longest row, so that a row's loss would depend on the rows beside
it: on the batch size, and on where a window was cut. Rows are therefore refused where they would not all get the
factors that each gets alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_hal.errors import UnsupportedFeatureError

if TYPE_CHECKING:
    from qlora_hal.contract.values import Batch


@dataclass(frozen=True, slots=True)
class RotaryLength:
    """`longrope` takes its short factors up to `tokens`, its long ones beyond; with `dynamic`, every length beyond
    `tokens` has factors of its own."""

    kind: str
    tokens: int

    def check(self, shortest: int, longest: int) -> None:
        """Nothing where samples of these lengths all have the same factors. Raises UnsupportedFeatureError QH-B62."""
        if longest <= self.tokens or (self.kind == "longrope" and shortest > self.tokens):
            return
        if self.kind == "longrope":
            beyond = f"rows of {shortest} and of {longest} tokens lie on both sides of it"
            other = ", or train on the longer and on the shorter rows in runs of their own"
        else:
            beyond, other = f"each length beyond it has others, and there is a row of {longest} tokens", ""
        raise UnsupportedFeatureError(
            "QH-B62",
            f"The rotary positions of this model ({self.kind}) have one set of factors up to {self.tokens} tokens; "
            f"{beyond}.",
            where="data.max_seq_length",
            cause="The factors of a batch are those of its longest row, so that a row's loss would depend on the rows "
            "beside it.",
            fix=f"Set data.max_seq_length to at most {self.tokens}{other}.",
            context={"rope_type": self.kind, "original_length": self.tokens, "longest": longest},
        )

    def check_batch(self, batch: Batch, seen: int) -> None:
        """The same for one batch, whose factors the backend's code takes for rows of `seen` tokens."""
        lengths = [int(count) for row in batch.segment_ids for count in np.bincount(row)[1:] if count]
        if lengths:
            self.check(min(lengths), max(seen, *lengths))


def rotary_length(config: Mapping[str, Any]) -> RotaryLength | None:
    """Of a language model's configuration as transformers reads it; None where no factor depends on a length. Where
    kinds of layers have lengths of their own, the shortest counts."""
    rope = config.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else {}
    found = [*_lengths(rope, config)]
    found += [one for part in rope.values() if isinstance(part, Mapping) for one in _lengths(part, config)]
    return min(found, key=lambda one: (one.kind != "dynamic", one.tokens), default=None)


def _lengths(rope: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[RotaryLength]:
    kind, longest = rope.get("rope_type"), config.get("max_position_embeddings")
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        longest = original or longest
    if kind in ("longrope", "dynamic") and isinstance(longest, int):
        yield RotaryLength(kind, longest)
