"""What tells one torch platform from another, as data. An `if platform.backend == ...` elsewhere is a review error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

from qlora_hal.contract.capabilities import Capabilities, Feature, WeightFormat
from qlora_hal.contract.memory_constants import OFFLOADED_LAYERS, ON_DISK, MemoryConstants, MemoryQuery
from qlora_hal.formats.microscaling import MXFP4
from qlora_hal.model.expert_stacks import INTERLEAVED

TorchDevice = Literal["cuda", "rocm", "mps", "cpu"]

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes 0.50 quantizes 4-bit weights with on every device; 64 is its default everywhere."""

TORCH_OPTIONS: Mapping[str, tuple[object, ...]] = {
    "attention": ("auto", "sdpa", "eager"),
    "layers": ("auto", "plain"),
}
"""`backend.options` of this family. Eager attention is the cure where a device's fused attention gives NaN; `layers`
plain keeps transformers' own layers where the fused ones would serve."""

STREAMING_OPTIONS: Mapping[str, tuple[object, ...]] = {**TORCH_OPTIONS, OFFLOADED_LAYERS: ("auto", "host", ON_DISK)}
"""Those of backends that can take a base's layers from the device: where these rest. `auto`: on the disk where the
host's memory does not have them left."""


OUTLINE = "qlora_hal_backends.torch_family.outline:outline"
"""`BackendSpec.outline` of every backend of this family."""

LAUNCHER = "qlora_hal_backends.torch_family.launching"
"""`BackendSpec.launcher` of those that have collectives."""

LOSS_CHUNK_ROWS = 2048
"""Rows of hidden states whose logits are made at a time."""
LOSS_CHUNK_LOGITS = 2**27
"""The most logits that are made at a time: half a gigabyte in float32. gpt-oss has 201,088 to a row."""

TILE_ROWS = 4096
"""Rows of a tile of the fused feed-forward where it is computed again. A product of so many rows keeps a large GPU busy
for a millisecond and more."""

MIXTURE_TILE_ROWS = 8192
"""The same of a mixture, whose products want many rows for each expert: the weights of all of them are read once a
tile."""

LONG_SAMPLE = 8192
"""Tokens of a sample from which what attention gave waits on the host beside a layer's input. From some 9,700 tokens on
it takes less long to get there (55 GB/s) than to compute it again (533 TFLOP/s, both measured on an NVIDIA H200), and
it crosses beside what is computed."""

DECODED_AT_ONCE = 2**28
"""Numbers of a stack of experts that stand decoded at a time for transformers' layers, half a gigabyte in bfloat16.
Stacks of gpt-oss-20b and Qwen3-30B-A3B fit as a whole; those of gpt-oss-120b are four times as large."""

MEMORY = MemoryConstants(
    cross_entropy_rows=LOSS_CHUNK_ROWS,
    cross_entropy_logits=LOSS_CHUNK_LOGITS,
    dequantized_of_a_stack=DECODED_AT_ONCE,
)
"""Of transformers' layers. The head's loss is computed in chunks, so the logits of a batch never stand whole."""

HOST_RUNTIME_BYTES = 555_000_000
"""Resident pages of Python, torch, transformers and bitsandbytes before a model is loaded; on Linux with the packages
of `constraints.txt` (`benchmarks/planner_errors.py` measures what is foreseen with it)."""
HOST_HEAP_HOLES = 0.35
"""Of what a step takes and gives back, glibc's heap kept 0.2 to 0.4 beside it at tensors of some megabytes
(docs/runs/planner_errors_cpu.json)."""

HOST_LOADING_HOLES = 6.0
"""A weight passes through the heap in float32 while it is packed; at its peak loading held that and half as much."""


SCORES_CAPPED = frozenset({"gemma2"})
"""`model_type` of those whose attention scores have a soft cap, which eager attention alone computes."""

ATTENTION_WITH_SINKS = frozenset({"gpt_oss", "granite_swa", "granitemoe_swa", "flint"})
"""Those whose attention has a score of each head that is no token's, which `attention.sinks` computes."""

BRANCHES_NORMED = frozenset({"gemma2", "gemma3_text"})
"""Those with a norm after each branch beside the one before it."""


def plain_memory(memory: MemoryConstants, query: MemoryQuery) -> MemoryConstants:
    """What transformers' layers of some architectures and options keep beyond those of a Llama.

    Eager attention keeps its softmax, in float32, and what it becomes; a cap its tanh and more, of scores and of
    logits. Counted from what a Gemma 2, a Gemma 3, and a Llama with eager attention or with dropout took beyond the
    estimate of a Llama at 4 x 256 and 1 x 1024 tokens (docs/runs/planner_errors_cpu.json). gpt-oss's gates keep their
    halves in turns, cut off, and each of their factors; of its logits a chunk stands in both dtypes and nothing else.
    Of an adapter there is a copy in 16 bits, which is much where experts have one each.
    """
    in_half = query.compute_dtype != "float32"
    memory = replace(memory, master_bytes=6 if in_half else memory.master_bytes)
    if query.architecture in INTERLEAVED:
        memory = replace(memory, feed_forward_copies=6.0, working_layers=0.3, logit_bytes=6 if in_half else 4)
    if query.dropout:
        memory = replace(memory, hidden_copies=memory.hidden_copies + 3.5)
    if query.architecture in BRANCHES_NORMED:
        memory = replace(memory, hidden_copies=memory.hidden_copies + (10.0 if in_half else 6.0))
    if query.architecture in SCORES_CAPPED:
        return replace(memory, attention_scores_kept=5.0 if in_half else 3.6, logit_bytes=18)
    if query.options.get("attention") == "eager":
        return replace(memory, attention_scores_kept=3.0 if in_half else 1.8)
    return memory


def host_memory(query: MemoryQuery) -> MemoryConstants:
    """Of transformers' layers on the host, whose memory is counted in resident pages. In float32 the inputs of norms
    are kept as they are, without a copy in float32."""
    on_host = replace(MEMORY, hidden_copies=6.0 if query.compute_dtype == "float32" else MEMORY.hidden_copies)
    return replace(
        plain_memory(on_host, query),
        runtime_bytes=HOST_RUNTIME_BYTES,
        workspace_bytes=24_000_000,
        heap_holes=HOST_HEAP_HOLES if sys.platform == "linux" else 0.0,
        loading_holes=HOST_LOADING_HOLES if sys.platform == "linux" else 0.0,
    )


FUSED_MIXTURES = frozenset({"glm4_moe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})
FUSED_ARCHITECTURES = FUSED_MIXTURES | {
    "llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "seed_oss", "cwm", "granite", "phi3", "gemma",
    "gemma3_text",
}  # fmt: skip
"""`model_type` of the layers that `fused.families` has and `fused.supported` takes."""

HEADS_NORMED = frozenset({"qwen3", "qwen3_moe", "olmoe", "glm4_moe", "gemma3_text"})
"""Of these, those whose queries and keys are normed before their rotation, and kept for that norm's backward; of
`glm4_moe` not all are."""

WIDE_BESIDE_EXPERTS = frozenset({"glm4_moe", "qwen2_moe"})
"""Those with wide feed-forwards that every token goes to, of shared experts or of dense layers."""


def fused_memory(memory: MemoryConstants, architecture: str = "llama") -> MemoryConstants:
    """What the fused layers change: they keep their matrix products and nothing elementwise (`fused.decoder_layer`).
    Gate, up and their product, whose gradients take their places, are alive in one layer's backward. A whole layer
    stands decoded (3.7 times the largest weight of a Llama 3, 4.5 of a Llama 1), the adapter has a copy in 16 bits, and
    the gradient of the logits takes their place. Where branches are normed before they are added, both are kept."""
    return replace(
        memory,
        hidden_copies=6.0 if architecture in BRANCHES_NORMED else 4.0,
        feed_forward_copies=2.0,
        working_layers=1.2,
        dequantized_copies=4.0,
        master_bytes=6,
        logit_bytes=2,
        cross_entropy_logits=None,
        dequantized_of_a_stack=None,
    )


def fused_mixture_memory(fused: MemoryConstants, architecture: str) -> MemoryConstants:
    """What differs where the feed-forward is of experts (`fused.mixture`): they keep gate and up of their rows alone.
    In backward the gradients of their outputs, of the product, and of gate and up are alive beside these. All experts
    of a layer stand decoded, three stacks, with the little that attention is beside them, and with what every token
    goes to, of a dense layer too: a quarter of a stack more."""
    return replace(
        fused,
        routed_hidden_copies=0.0,
        working_routed_copies=3.0,
        working_routed_hidden_copies=1.0,
        dequantized_copies=3.45 if architecture in WIDE_BESIDE_EXPERTS else 3.2,
    )


def recomputed_memory(memory: MemoryConstants, recompute: str, *, fused: bool) -> MemoryConstants:
    """The same with a choice of recomputation. The fused feed-forward is made again in tiles: gate, up and their
    product, whose gradients take their places, three of its widths a row. Beside them stand a recomputed layer's
    attention and the streams above and below it, some ten hidden widths and a half: from 16,384 to 65,536 tokens of
    an 8B shape a peak grew by 14.1 widths a token, of which three are layers' inputs and a half keys and values. Where
    inputs wait on the host, so does what attention gave over long rows: two more widths (0.27 GB of 16,384 tokens)."""
    if recompute == "none":
        return memory
    inputs = 3 if recompute == "offload" else None  # one that computes, one that comes, one that stayed
    if not fused:
        copies = memory.feed_forward_copies
        selective = replace(
            memory, feed_forward_copies=0.0, working_feed_forward_copies=copies, working_routed_copies=copies
        )
        return selective if recompute == "selective" else replace(memory, recomputed_inputs=inputs)
    tiled = replace(
        memory,
        feed_forward_copies=0.0,
        working_feed_forward_copies=3.0,
        feed_forward_tile=TILE_ROWS,
        dequantized_copies=3.0,  # gate and up, or the attention's, and down
    )
    if memory.working_routed_copies:
        tiled = replace(
            tiled,
            working_routed_copies=memory.working_routed_copies + memory.feed_forward_copies,
            feed_forward_tile=MIXTURE_TILE_ROWS,
            dequantized_copies=memory.dequantized_copies,
        )
    if recompute == "selective":
        return tiled
    whole = replace(tiled, hidden_copies=10.6, working_layers=0.0, recomputed_inputs=inputs)
    return replace(whole, attended_copies=2.0, attended_from=LONG_SAMPLE) if recompute == "offload" else whole


def memory_of(plain: MemoryConstants, *, fused: bool) -> Callable[[MemoryQuery], MemoryConstants]:
    """`plain` everywhere, but where the fused layers serve: on NVIDIA GPUs, with Triton.

    float16 stands for devices that are too old for the kernels: `auto` takes bfloat16 elsewhere.
    """

    def faster(architecture: str) -> MemoryConstants:
        fused = fused_memory(plain, architecture)
        fused = replace(fused, rotated_copies=1.0 if architecture in HEADS_NORMED else 0.0)
        return fused_mixture_memory(fused, architecture) if architecture in FUSED_MIXTURES else fused

    def answer(query: MemoryQuery) -> MemoryConstants:
        serves = (
            fused
            and find_spec("triton") is not None
            and query.device_kind in ("", "cuda")
            and query.architecture in FUSED_ARCHITECTURES
            and query.compute_dtype == "bfloat16"
            and query.options.get("layers") != "plain"
            and query.options.get("attention") != "eager"
        )
        layers = faster(query.architecture) if serves else plain_memory(plain, query)
        return recomputed_memory(layers, query.recompute, fused=serves)

    return answer


FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite"})
"""What the suite's oracle computes. transformers' code runs here, so what it has beyond them trains as well
(`docs/models.md`)."""


@dataclass(frozen=True, slots=True)
class TorchPlatform:
    """One row of the family.

    `device` is what the probe looks for; `torch_device` is torch's word for it (ROCm answers to "cuda").
    `preferred_dtypes` is the order in which `auto` tries compute dtypes; each is proved by computing before it is used.
    `optimizer_notes` says what an optimizer becomes where the device has no use for paging. `grouped_products`: torch
    has a kernel there for the products of many experts at once.
    """

    backend: str
    title: str
    device: str
    torch_device: str
    priority: int
    preferred_dtypes: tuple[str, ...]
    features: frozenset[Feature]
    optimizer_notes: Mapping[str, str]
    uses_accelerator: bool = True
    grouped_products: bool = False

    def capabilities(self) -> Capabilities:
        four_bit = (WeightFormat.NF4, WeightFormat.FP4)
        return Capabilities(
            weight_formats=frozenset({WeightFormat.NONE, WeightFormat.INT8, WeightFormat.MXFP4, *four_bit}),
            compute_dtypes=frozenset(self.preferred_dtypes),
            features=self.features,
            block_sizes={**dict.fromkeys(four_bit, BLOCK_SIZES), WeightFormat.MXFP4: MXFP4.block_sizes},
            levels={"none": WeightFormat.NONE, "8bit": WeightFormat.INT8, "4bit": WeightFormat.NF4},
            families=FAMILIES,
        )


EVERYWHERE = frozenset(
    {
        Feature.DOUBLE_QUANT,
        Feature.QUANTIZE_ON_LOAD,
        Feature.LOAD_PREQUANTIZED,
        Feature.GRADIENT_CHECKPOINTING,
        Feature.LORA_DROPOUT,
        Feature.PACKING,
        Feature.GENERATE,
        Feature.TOKEN_WEIGHTS,
        Feature.RECOMPUTATION_CHOICE,
        Feature.BASE_OFFLOAD,
        Feature.EXPERTS,
    }
)
_PARALLEL = frozenset({Feature.DATA_PARALLEL, Feature.SHARDED_BASE})
"""Where torch.distributed has collectives for the device, and several can be in one machine or many."""
_EIGHT_BIT = frozenset({Feature.ADAMW_8BIT, Feature.PAGED_ADAMW, Feature.PAGED_ADAMW_8BIT})
_ACCELERATOR_DTYPES = ("bfloat16", "float16", "float32")

CUDA = TorchPlatform(
    backend="cuda_bnb",
    title="bitsandbytes on NVIDIA CUDA",
    device="cuda",
    torch_device="cuda",
    priority=100,
    preferred_dtypes=_ACCELERATOR_DTYPES,
    features=EVERYWHERE | _EIGHT_BIT | _PARALLEL | {Feature.PEAK_MEMORY, Feature.FP8_PRODUCTS},
    optimizer_notes={},
    grouped_products=True,
)
ROCM = TorchPlatform(
    backend="rocm_bnb",
    title="bitsandbytes on AMD ROCm",
    device="rocm",
    torch_device="cuda",
    priority=100,
    preferred_dtypes=_ACCELERATOR_DTYPES,
    features=EVERYWHERE | _EIGHT_BIT | _PARALLEL | {Feature.PEAK_MEMORY},
    optimizer_notes={},
)
MPS = TorchPlatform(
    backend="mps_bnb",
    title="bitsandbytes on Apple MPS",
    device="mps",
    torch_device="mps",
    priority=50,
    preferred_dtypes=_ACCELERATOR_DTYPES,
    # bitsandbytes 0.50 has no 8-bit optimizers on MPS (its README: planned), and nothing to page to.
    features=EVERYWHERE | {Feature.PEAK_MEMORY},
    optimizer_notes={},
)
CPU = TorchPlatform(
    backend="cpu_torch",
    title="bitsandbytes on a plain CPU",
    device="cpu",
    torch_device="cpu",
    priority=0,
    preferred_dtypes=("float32", "bfloat16"),
    features=EVERYWHERE | _EIGHT_BIT | _PARALLEL | {Feature.BITWISE_DETERMINISM, Feature.PEAK_MEMORY},
    optimizer_notes={
        "paged_adamw": "paged_adamw is adamw here: a CPU has nothing to page to",
        "paged_adamw_8bit": "paged_adamw_8bit is adamw_8bit here: a CPU has nothing to page to",
    },
    uses_accelerator=False,
)
