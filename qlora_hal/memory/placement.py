"""What is recomputed and what waits in the host's memory: as asked for, or the fastest that fits the device.

The order of `auto` is that of the time it takes. Keeping all activations is fastest. Computing the feed-forward's
widest products again costs less than whole layers; their inputs on the host cost no more as long as the copies hide
behind the computation. Of the base, the token embeddings cost a copy of a row a token; layers and head cross whole in
each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_hal.contract.capabilities import Feature
from qlora_hal.errors.figures import size
from qlora_hal.memory.estimate import DTYPE_BYTES, _tied_head_weights
from qlora_hal.model.shape import decoder_shape

if TYPE_CHECKING:
    from collections.abc import Collection

    from qlora_hal.config.schema import TrainingConfig
    from qlora_hal.contract.backend import OffloadedPart
    from qlora_hal.contract.values import MemoryEstimate
    from qlora_hal.model.facts import ModelFacts

AUTO, NONE, SELECTIVE, FULL, OFFLOAD = "auto", "none", "selective", "full", "offload"
EMBEDDINGS, LAYERS, HEAD = "embeddings", "layers", "head"
SLOTS = 2
"""Layers, or pieces of the head, that are on the device while the rest is on the host."""
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

    def words(self) -> str:
        base = f", {' and '.join(self.base_offload)} of the base in the host's memory" if self.base_offload else ""
        return f"recompute {self.recompute}{base}"


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
    layers_stay: bool = False,
) -> Placement:
    """What was asked for, and where that is `auto` the fastest whose `peak_of` is within `memory_there`. Where nothing
    is, the one with the lowest peak; where the memory is not known, the fastest. `layers_stay`: on the device, as those
    that are spread over several do, and those with routed experts."""
    candidates = list(_candidates(training, features, layers_stay))
    if AUTO not in (asked_recompute(training), training.base_offload):
        return candidates[0]
    if memory_there is None:
        return replace(candidates[0], why="the device does not tell how much memory it has")
    peaks = {candidate: peak_of(candidate) for candidate in candidates}
    fitting = next((candidate for candidate in candidates if peaks[candidate] <= memory_there), None)
    chosen = fitting or min(candidates, key=peaks.__getitem__)
    relation = "within" if fitting else "the least there is, but above"
    return replace(chosen, why=f"an estimated peak of {size(peaks[chosen])}, {relation} {size(memory_there)}")


def _candidates(training: TrainingConfig, features: Collection[Feature], layers_stay: bool) -> Iterator[Placement]:
    """All that is asked for or may be chosen, the fastest first."""
    recompute, offload = asked_recompute(training), training.base_offload
    recomputations = [recompute]
    if recompute == AUTO:
        recomputations = [NONE]
        if Feature.RECOMPUTATION_CHOICE in features:
            recomputations += [SELECTIVE, FULL, OFFLOAD]
        elif Feature.GRADIENT_CHECKPOINTING in features:
            recomputations += [FULL]
    offloads: list[tuple[OffloadedPart, ...]] = [()] if offload == "auto" else [offload]
    if offload == "auto" and Feature.BASE_OFFLOAD in features:
        more: list[tuple[OffloadedPart, ...]] = [("embeddings", "layers"), ("embeddings", "layers", "head")]
        offloads += [("embeddings",), *([("embeddings", "head")] if layers_stay else more)]
    for parts in offloads:
        for kind in recomputations:
            yield Placement(kind, parts)


def _has_head(facts: ModelFacts) -> bool:
    """Whether a head is stored: families tie it by a default of theirs, without a word in config.json."""
    return any(name.rpartition(".")[0].rpartition(".")[2] in _HEADS for name in facts.tensors)


_HEADS = frozenset({"lm_head", "embed_out", "output"})


def with_base_offloaded(
    memory: MemoryEstimate, facts: ModelFacts, compute_dtype: str, parts: Collection[str]
) -> MemoryEstimate:
    """The estimate of a device without these parts of the base, but for what of them is on it at a time."""
    width, hidden = DTYPE_BYTES[compute_dtype], decoder_shape(facts).hidden
    table = facts.vocabulary_size * hidden * width
    tied = facts.config.get("tie_word_embeddings") is True or not _has_head(facts)
    linear_weights = sum(linear.parameters for linear in facts.linear_modules.values())
    rest = (facts.parameter_count - linear_weights - _tied_head_weights(facts)) * width
    in_layers = max(memory.weights - rest, 0)
    saved = 0
    if LAYERS in parts:
        saved += in_layers - SLOTS * in_layers // max(decoder_shape(facts).layers, SLOTS)
    if HEAD in parts:
        saved += max(table - SLOTS * HEAD_PIECE_BYTES, 0)
    if EMBEDDINGS in parts and not tied:
        saved += table
    return replace(memory, weights=max(memory.weights - saved, 0))
