"""What the memory estimate must know of a backend's code, as data; imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class MemoryConstants:
    """What depends on the backend's code and not on the model.

    `hidden_copies` and `feed_forward_copies` count the tensors of those widths that one decoder layer keeps for its
    backward pass, per token, in the compute dtype. The defaults are those of unfused modules: two norm inputs kept in
    float32 (4), two norm outputs, the query and the attention output (4); gate, its SiLU, up and their product (4).
    `working_layers` is what is alive beyond that while one layer is differentiated, in units of what a layer keeps.
    `cross_entropy_rows` is the chunk of a chunked cross-entropy, None when all logits exist at once.
    """

    runtime_bytes: int = 600_000_000
    workspace_bytes: int = 128 * 2**20
    hidden_copies: float = 8.0
    feed_forward_copies: float = 4.0
    working_layers: float = 0.0
    dequantized_copies: int = 1
    cross_entropy_rows: int | None = None
    attention_scores_kept: bool = False
    master_bytes: int = 4
    gradient_bytes: int = 4
    relative_error: float = 0.15


@dataclass(frozen=True, slots=True)
class FastPath:
    """Where a backend has faster code that keeps other tensors: on these kinds of device, for these architectures
    (`model_type`) in these compute dtypes, without LoRA dropout, with none of these choices of `backend.options`."""

    memory: MemoryConstants
    architectures: frozenset[str]
    compute_dtypes: frozenset[str]
    unless_options: Mapping[str, object] = field(default_factory=dict)
    device_kinds: frozenset[str] = frozenset({"cuda"})

    def serves(self, architecture: str, compute_dtype: str, *, dropout: float, options: Mapping[str, object]) -> bool:
        refused = any(options.get(name) == choice for name, choice in self.unless_options.items())
        return (
            architecture in self.architectures and compute_dtype in self.compute_dtypes and not dropout and not refused
        )
