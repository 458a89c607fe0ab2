"""What is recomputed and what waits in the host's memory: as asked for, or the fastest that fits the device.

The order of `auto` is that of the time it takes. Keeping all activations is fastest. Computing the feed-forward's
widest products again costs less than whole layers; their inputs on the host cost no more as long as the copies hide
behind the computation. Of the base, the token embeddings cost a copy of a row a token; head and layers cross whole in
each pass, at a rate that the machine's link decides, so they come after all recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from qlora_hal.contract.capabilities import Feature
from qlora_hal.errors.figures import size
from qlora_hal.memory.estimate import DTYPE_BYTES, LayerBytes
from qlora_hal.model.shape import decoder_shape

if TYPE_CHECKING:
    from collections.abc import Collection

    from qlora_hal.config.schema import TrainingConfig
    from qlora_hal.contract.backend import OffloadedPart
    from qlora_hal.contract.values import ComputeDtype, MemoryEstimate
    from qlora_hal.model.facts import ModelFacts

AUTO, NONE, SELECTIVE, FULL, OFFLOAD = "auto", "none", "selective", "full", "offload"
EMBEDDINGS: Final = "embeddings"
LAYERS: Final = "layers"
HEAD: Final = "head"
IN_HOST_MEMORY = frozenset({"cpu", "mps"})
"""Kinds of devices whose memory is the host's: what waits there saves nothing."""
PIECES = 2
"""Of the head that are on the device while the rest is on the host."""
HEAD_PIECE_BYTES = 2**26
"""As backends cut it."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`recompute` is `none`, `selective`, `full` or `offload`; `base_offload` the parts of the base on the host; `why`
    a sentence where it was chosen."""

    recompute: str = NONE
    base_offload: tuple[OffloadedPart, ...] = ()
    why: str = ""

    @property
    def recomputes_layers(self) -> bool:
        """Whole ones, from their inputs."""
        return self.recompute in (FULL, OFFLOAD)

    def in_one_memory(self) -> Placement:
        """What it takes where the device's memory is the host's."""
        return replace(self, recompute=FULL if self.recompute == OFFLOAD else self.recompute, base_offload=())

    def words(self) -> str:
        base = f", {' and '.join(self.base_offload)} of the base in the host's memory" if self.base_offload else ""
        return f"recompute {self.recompute}{base}"


@dataclass(frozen=True, slots=True)
class Moves:
    """Whether anything can go `to_host` (a device may have no memory of its own) and whether `layers` of the base can:
    those that are spread over devices are on them."""

    to_host: bool = True
    layers: bool = True


def recomputations(features: Collection[Feature], moves: Moves) -> list[str]:
    """What may be recomputed, by the time that it takes."""
    if Feature.RECOMPUTATION_CHOICE in features:
        return [NONE, SELECTIVE, FULL, *([OFFLOAD] if moves.to_host else [])]
    return [NONE, *([FULL] if Feature.GRADIENT_CHECKPOINTING in features else [])]


def base_offloads(features: Collection[Feature], moves: Moves) -> list[tuple[OffloadedPart, ...]]:
    """Parts of the base that may be on the host together, by what crosses in a pass: of the embeddings a row a token,
    of the head all, of the layers all."""
    nothing: tuple[OffloadedPart, ...] = ()
    if Feature.BASE_OFFLOAD not in features or not moves.to_host:
        return [nothing]
    whole: list[tuple[OffloadedPart, ...]] = [nothing, (EMBEDDINGS,), (EMBEDDINGS, HEAD)]
    return [*whole, (EMBEDDINGS, LAYERS), (EMBEDDINGS, LAYERS, HEAD)] if moves.layers else whole


def asked_recompute(training: TrainingConfig) -> str:
    """`training.recompute`, or what the older switch says."""
    if training.recompute is not None:
        return training.recompute
    return FULL if training.gradient_checkpointing else NONE


def chosen_placement(
    training: TrainingConfig,
    features: Collection[Feature],
    peak_of: Callable[[Placement], int],
    memory_there: int | None,
    *,
    moves: Moves | None = None,
) -> Placement:
    """What was asked for, and where that is `auto` the fastest whose `peak_of` is within `memory_there`. Where nothing
    is, the one with the lowest peak; where the memory is not known, the fastest."""
    candidates = list(_candidates(training, features, moves or Moves()))
    if AUTO not in (asked_recompute(training), training.base_offload):
        return candidates[0]
    if memory_there is None:
        return replace(candidates[0], why="the device does not tell how much memory it has")
    peaks = {candidate: peak_of(candidate) for candidate in candidates}
    fitting = next((candidate for candidate in candidates if peaks[candidate] <= memory_there), None)
    chosen = fitting or min(candidates, key=peaks.__getitem__)
    relation = "within" if fitting else "the least there is, but above"
    return replace(chosen, why=f"an estimated peak of {size(peaks[chosen])}, {relation} {size(memory_there)}")


def _candidates(training: TrainingConfig, features: Collection[Feature], moves: Moves) -> Iterator[Placement]:
    """All that is asked for or may be chosen, the fastest first."""
    recompute, offload = asked_recompute(training), training.base_offload
    again = recomputations(features, moves) if recompute == AUTO else [recompute]
    parts_of_base = base_offloads(features, moves) if offload == "auto" else [offload]
    for parts in parts_of_base:
        for kind in again:
            yield Placement(kind, parts)


def _has_head(facts: ModelFacts) -> bool:
    """Whether a head is stored: families tie it by a default of theirs, without a word in config.json."""
    return any(name.rpartition(".")[0].rpartition(".")[2] in _HEADS for name in facts.tensors)


_HEADS = frozenset({"lm_head", "embed_out", "output"})


def with_base_offloaded(
    memory: MemoryEstimate, facts: ModelFacts, compute_dtype: ComputeDtype, parts: Collection[str]
) -> MemoryEstimate:
    """The estimate of a device without these parts of the base, but for what of them is on it at a time."""
    width, hidden = DTYPE_BYTES[compute_dtype], decoder_shape(facts).hidden
    table = facts.vocabulary_size * hidden * width
    tied = facts.config.get("tie_word_embeddings") is True or not _has_head(facts)
    saved = 0
    if LAYERS in parts:
        layers = LayerBytes.of(memory, facts, compute_dtype)
        saved += layers.all - layers.in_slots
    if HEAD in parts:
        saved += max(table - PIECES * HEAD_PIECE_BYTES, 0)
    if EMBEDDINGS in parts and not tied:
        saved += table
    return replace(memory, weights=max(memory.weights - saved, 0))
