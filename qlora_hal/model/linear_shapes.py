"""Which modules of a checkpoint are linear layers that can carry LoRA, told from names and shapes alone.

Every two-dimensional `<module>.weight` is one, unless its name says embedding, head, router, or part of a tower that
sees no text. Fused projections (Phi-3's `qkv_proj`, `gate_up_proj`) are ordinary linear layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_hal.model.facts import ModelFacts

Shape = tuple[int, int]
"""(in, out) of a linear layer; its weight is stored as [out, in]."""

CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Hugging Face model types whose projections are `Conv1D`: weights stored as [in, out], no linear layer."""

_CONV1D_NAMES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
_EMBEDDING_NAMES = frozenset(
    {
        "embed_tokens", "embed_tokens_per_layer", "embed_positions", "embed_in", "wte", "wpe", "word_embeddings",
        "position_embeddings", "token_type_embeddings", "tok_embeddings", "embeddings", "relative_attention_bias",
    }
)  # fmt: skip
_HEAD_NAMES = frozenset({"lm_head", "embed_out", "score", "classifier"})
_TOP_LEVEL_HEAD_NAMES = frozenset({"output", "head"})
_ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})
_OTHER_TOWERS = frozenset(
    {"vision_tower", "vision_model", "visual", "multi_modal_projector", "audio_tower", "embed_vision", "embed_audio"}
)

_NOTES: Mapping[str, str] = {
    "conv1d": "{count} Conv1D projections ({names}) carry no LoRA here: they are no linear layers and 4-bit "
    "quantization leaves them as they are",
    "expert": "{count} projections of mixture-of-experts blocks carry no LoRA here: the model libraries store all "
    "experts of a block in one three-dimensional weight",
    "router": "{count} routers ({names}) carry no LoRA",
    "tower": "{count} linear layers of towers that see no text ({names}) carry no LoRA",
}


def linear_modules(shapes: Mapping[str, Shape], model_type: str, vocabulary_size: int) -> dict[str, Shape]:
    """The modules among `shapes` (module path -> (in, out)) that can carry LoRA, in natural order of their paths."""
    chosen = {
        module: shape
        for module, shape in shapes.items()
        if not _reason_left_out(module, model_type) and not _touches_vocabulary(module, shape, vocabulary_size)
    }
    return dict(sorted(chosen.items(), key=lambda item: natural_order(item[0])))


def left_out_notes(facts: ModelFacts) -> tuple[str, ...]:
    """Sentences about two-dimensional weights that look trainable but carry no LoRA; embeddings and head need none."""
    by_reason: dict[str, list[str]] = {}
    for name, tensor in facts.tensors.items():
        module = name.removesuffix(".qweight").removesuffix(".weight")
        if module == name or module in facts.linear_modules or len(tensor.shape) != 2:
            continue
        by_reason.setdefault(_reason_left_out(module, facts.model_type), []).append(module)
    return tuple(
        note.format(count=len(by_reason[reason]), names=_leaf_names(by_reason[reason])) + "."
        for reason, note in _NOTES.items()
        if reason in by_reason
    )


def natural_order(module: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which layer 10 comes after layer 9."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in module.split("."))


def _reason_left_out(module: str, model_type: str) -> str:
    parts = module.split(".")
    leaf = parts[-1]
    if leaf in _EMBEDDING_NAMES:
        return "embedding"
    if leaf in _HEAD_NAMES or (len(parts) == 1 and leaf in _TOP_LEVEL_HEAD_NAMES):
        return "head"
    if model_type in CONV1D_MODEL_TYPES and leaf in _CONV1D_NAMES:
        return "conv1d"
    if not _OTHER_TOWERS.isdisjoint(parts):
        return "tower"
    if "experts" in parts:
        return "expert"
    if leaf in _ROUTER_NAMES:
        return "router"
    return ""


def _touches_vocabulary(module: str, shape: Shape, vocabulary_size: int) -> bool:
    """An embedding or head under a name not listed: outside every numbered block, one side the vocabulary."""
    in_block = any(part.isdigit() for part in module.split("."))
    return not in_block and vocabulary_size > 0 and vocabulary_size in shape


def _leaf_names(modules: Iterable[str]) -> str:
    names = sorted({module.rsplit(".", 1)[-1] for module in modules})
    return ", ".join(names[:6]) + (" and others" if len(names) > 6 else "")
