"""What is recomputed and what waits on the host: what there is to choose from, and the bytes of either place.

Which of it is taken is `fitting`'s to say, by what it costs.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Final

from qlora_hal.contract.capabilities import Feature
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
HOST_SPARED = 0.2
"""Of the host's available memory, for all else that a run takes: page-locked memory cannot be swapped out."""
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
        base = f", {' and '.join(self.base_offload)} of the base on the host" if self.base_offload else ""
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


def _has_head(facts: ModelFacts) -> bool:
    """Whether a head is stored: families tie it by a default of theirs, without a word in config.json."""
    return any(name.rpartition(".")[0].rpartition(".")[2] in _HEADS for name in facts.tensors)


_HEADS = frozenset({"lm_head", "embed_out", "output"})


def with_base_offloaded(
    memory: MemoryEstimate, facts: ModelFacts, compute_dtype: ComputeDtype, parts: Collection[str]
) -> MemoryEstimate:
    """The estimate of a device without these parts of the base, but for what of them is on it at a time."""
    base = _PartsOfBase.of(memory.weights, facts, compute_dtype)
    saved = 0
    if LAYERS in parts:
        saved += base.layers.all - base.layers.in_slots
    if HEAD in parts:
        saved += max(base.table - PIECES * HEAD_PIECE_BYTES, 0)
    if EMBEDDINGS in parts and not base.is_tied:
        saved += base.table
    return replace(memory, weights=max(memory.weights - saved, 0))


@dataclass(frozen=True, slots=True)
class HostBytes:
    """What waits on the host: in its memory the base's layers, the rest of the base, and the inputs of recomputed
    layers; or the layers on its `disk`."""

    layers: int = 0
    tables: int = 0
    inputs: int = 0
    disk: int = 0

    @property
    def memory(self) -> int:
        return self.layers + self.tables + self.inputs

    def times(self, devices: int) -> HostBytes:
        """The same for so many devices."""
        return HostBytes(*(devices * part for part in astuple(self)))

    def with_layers_on_disk(self) -> HostBytes:
        return replace(self, layers=0, disk=self.layers)


def host_bytes(
    weights: int, facts: ModelFacts, compute_dtype: ComputeDtype, placement: Placement, tokens: int
) -> HostBytes:
    """Of one device that trains `tokens` in a pass. `weights` are the bytes of the whole base. Three layers' inputs are
    on the device and have their place here all the same."""
    base, shape = _PartsOfBase.of(weights, facts, compute_dtype), decoder_shape(facts)
    parts = placement.base_offload
    tables = (HEAD in parts) + (EMBEDDINGS in parts and not base.is_tied)
    inputs = shape.layers * tokens * shape.hidden * DTYPE_BYTES[compute_dtype]
    return HostBytes(
        layers=base.layers.all if LAYERS in parts else 0,
        tables=tables * base.table,
        inputs=inputs if placement.recompute == OFFLOAD else 0,
    )


@dataclass(frozen=True, slots=True)
class _PartsOfBase:
    """Bytes of the decoder layers' packed weights, and of the embeddings, which may be the head too."""

    layers: LayerBytes
    table: int
    is_tied: bool

    @classmethod
    def of(cls, weights: int, facts: ModelFacts, compute_dtype: ComputeDtype) -> _PartsOfBase:
        return cls(
            layers=LayerBytes.of(weights, facts, compute_dtype),
            table=facts.vocabulary_size * decoder_shape(facts).hidden * DTYPE_BYTES[compute_dtype],
            is_tied=facts.config.get("tie_word_embeddings") is True or not _has_head(facts),
        )
