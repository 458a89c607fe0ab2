"""What the memory estimate must know of a backend's code, as data; imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

OFFLOADED_LAYERS, ON_DISK = "offloaded_layers", "disk"
"""The option of backends that can have the layers of a base rest in a file, and its choice that says so."""
HEAP_BLOCK_BYTES = 32 * 2**20
"""glibc gives larger blocks pages of their own, and these back when they are freed (mallopt(3),
DEFAULT_MMAP_THRESHOLD_MAX)."""


@dataclass(frozen=True, slots=True)
class MemoryConstants:
    """What depends on the backend's code and not on the model.

    `hidden_copies` and `feed_forward_copies` count the tensors of those widths that one decoder layer keeps for its
    backward pass, per token, in the compute dtype. The defaults are those of unfused modules: two norm inputs kept in
    float32 (4), two norm outputs, the query and the attention output (4); gate, its SiLU, up and their product (4).
    Two of the hidden copies, the query and the attention output, are of all heads' width where that is another.
    `rotated_copies` are queries and keys kept beside what they were before their rotation.
    Of a mixture each of a token's experts has `feed_forward_copies` of its own width, and `routed_hidden_copies` of the
    hidden one: its rows before and after.
    `working_layers` is what is alive beyond that while one layer is differentiated, in units of what a layer keeps.
    `working_feed_forward_copies` are of that width and alive in the layer that is differentiated alone, for no more
    than `feed_forward_tile` rows at a time where that is a number; `working_routed_copies` and
    `working_routed_hidden_copies` are the same of each of a token's experts. `recomputed_inputs` is how many layers'
    inputs are on the device at a time where whole layers are recomputed; None: all. `attended_copies`, of all heads'
    width, are there beside them where what attention gave is kept of rows of `attended_from` tokens and more.
    `logit_bytes` are those of a logit from its product to its gradient; None: in the compute dtype, in float32 and as a
    float32 gradient. `dequantized_copies` counts weights of the largest linear layer's size that stand decoded at once.
    `dequantized_of_a_stack` are the most weights of a stack of experts that stand decoded at once; None: all of them.
    `attention_scores_kept` counts what a layer keeps of the size of its attention scores, rows x heads x length^2,
    in the compute dtype: 0 where attention never makes them whole.
    `master_bytes` are those of an adapter weight with its copy in the compute dtype.
    `cross_entropy_rows` is the chunk of a chunked cross-entropy, None when all logits exist at once, and
    `cross_entropy_logits` how many logits it has at most, None where any number of them. `heap_holes` is
    what the host's allocator keeps between blocks, as a share of the logits and of a few layers' activations, where the
    largest tensor is smaller than `HEAP_BLOCK_BYTES`. `loading_holes` is what it keeps of loading, in bytes for each
    weight of the linear layers, where their weights are that small; a step uses it again.
    """

    runtime_bytes: int = 600_000_000
    workspace_bytes: int = 128 * 2**20
    hidden_copies: float = 8.0
    feed_forward_copies: float = 4.0
    rotated_copies: float = 0.0
    routed_hidden_copies: float = 2.0
    working_layers: float = 0.0
    working_feed_forward_copies: float = 0.0
    working_routed_copies: float = 0.0
    working_routed_hidden_copies: float = 0.0
    feed_forward_tile: int | None = None
    recomputed_inputs: int | None = None
    attended_copies: float = 0.0
    attended_from: int = 0
    dequantized_copies: float = 1.0
    dequantized_of_a_stack: int | None = None
    cross_entropy_rows: int | None = None
    cross_entropy_logits: int | None = None
    logit_bytes: int | None = None
    attention_scores_kept: float = 0.0
    master_bytes: int = 4
    gradient_bytes: int = 4
    relative_error: float = 0.15
    heap_holes: float = 0.0
    loading_holes: float = 0.0


@dataclass(frozen=True, slots=True)
class MemoryQuery:
    """Which code will run: for models of this architecture (`model_type`) in this compute dtype, with this LoRA dropout
    and these `backend.options`, on this kind of device. `device_kind` "" is not known: the hardware that the backend is
    made for. `recompute` is what backward computes again (`Compute.recompute`), `none` where nothing."""

    architecture: str
    compute_dtype: str
    dropout: float = 0.0
    options: Mapping[str, object] = field(default_factory=dict)
    device_kind: str = ""
    recompute: str = "none"


def unfused(query: MemoryQuery) -> MemoryConstants:
    """Of plain modules, whatever is asked."""
    return MemoryConstants()
