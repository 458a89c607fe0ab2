"""Which modules of a checkpoint are linear layers that can carry LoRA, told from names and shapes alone.

Every two-dimensional `<module>.weight` is one, unless its name says embedding, position table, norm, convolution, head,
router, or part of a tower that sees no text. Fused projections (Phi-3's `qkv_proj`, `gate_up_proj`) are ordinary linear
layers; the routed experts of a block are one module for each projection (`expert_stacks`). A backend that can build the
architecture without weights knows better (`BackendSpec.outline`), and asks `reason_left_out` here, so that the same
layers are left out everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from qlora_hal.contract.values import LinearShape
from qlora_hal.model import expert_stacks

if TYPE_CHECKING:
    from qlora_hal.model.facts import ModelFacts

CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Hugging Face model types whose projections are `Conv1D`: weights stored as [in, out], no linear layer."""

_CONV1D_NAMES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
_EMBEDDING_NAMES = frozenset(
    {
        "embed_tokens", "embed_tokens_per_layer", "embed_positions", "embed_in", "wte", "wpe", "word_embeddings",
        "position_embeddings", "token_type_embeddings", "tok_embeddings", "embeddings", "relative_attention_bias",
    }
)  # fmt: skip
_TABLE = re.compile(r".*(embedding|embeddings|_embed|_emb|position_bias|rel_pos|attention_bias)")
"""Tables that are looked up by token, position or distance."""
_NORM = re.compile(r"(.*_)?(layer_?norm|rms_?norm|norm|ln)\d*")
"""Norms have a weight of two dimensions where each head has its own (Cohere's `q_norm`)."""
_CONVOLUTION = re.compile(r".*conv(\dd|olution)?\d*")
_READ_BY_KERNELS = frozenset({"x_proj", "dt_proj", "out_proj"})
"""Of a state-space mixer (Mamba): its scan takes their weights and not their products, on some devices or on all. An
adapter beside them would be passed by (PEFT refuses them too, `_check_lora_target_modules_mamba`)."""
_HEAD_NAMES = frozenset({"lm_head", "embed_out", "score", "classifier"})
_TOP_LEVEL_HEAD_NAMES = frozenset({"output", "head"})
_ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})
_OTHER_TOWERS = frozenset(
    {"vision_tower", "vision_model", "visual", "multi_modal_projector", "audio_tower", "embed_vision", "embed_audio"}
)

_NOTES: Mapping[str, str] = {
    "conv1d": "{count} Conv1D projections ({names}) carry no LoRA here: they are not linear layers and 4-bit "
    "quantization leaves them as they are",
    "expert": "{count} projections of single experts carry no LoRA: all experts of a block are adapted as one stack, "
    "or none",
    "router": "{count} routers ({names}) carry no LoRA",
    "mixer": "{count} projections of state-space mixers ({names}) carry no LoRA: the scan reads their weights itself "
    "and would bypass an adapter",
    "tower": "{count} linear layers of towers that see no text ({names}) carry no LoRA",
}


def linear_modules(
    shapes: Mapping[str, LinearShape], model_type: str, vocabulary_size: int, tensors: Collection[str] = ()
) -> dict[str, LinearShape]:
    """The modules among `shapes` (module path -> (in, out)) that can carry LoRA, in natural order of their paths.
    `tensors` are the names of all tensors of the model: what stands beside a weight tells what kind of block it is."""
    mixers = state_space_mixers(tensors)
    chosen = {
        module: shape
        for module, shape in shapes.items()
        if not _no_linear_layer(module, model_type)
        and not reason_left_out(module, mixers)
        and not _touches_vocabulary(module, shape, vocabulary_size)
    }
    return dict(sorted(chosen.items(), key=lambda item: natural_order(item[0])))


def reason_left_out(module: str, mixers: Collection[str] = ()) -> str:
    """Why a linear layer carries no LoRA, a key of `left_out_notes`' sentences, or "". `mixers` are the paths that
    `state_space_mixers` gives."""
    parent, _, leaf = module.rpartition(".")
    parts = module.split(".")
    if not _OTHER_TOWERS.isdisjoint(parts):
        return "tower"
    if expert_stacks.place_of(module):
        return "expert"
    if leaf in _ROUTER_NAMES or "router" in parts:
        return "router"
    if leaf in _READ_BY_KERNELS and parent in mixers:
        return "mixer"
    return ""


def state_space_mixers(tensors: Iterable[str]) -> frozenset[str]:
    """Paths of Mamba's mixers: modules that hold the decay `A_log` and the skip connection `D` of a state space."""
    names = set(tensors)
    decays = (name.removesuffix(".A_log") for name in names if name.endswith(".A_log"))
    return frozenset(path for path in decays if f"{path}.D" in names)


def left_out_notes(facts: ModelFacts) -> tuple[str, ...]:
    """Sentences about two-dimensional weights that look trainable but carry no LoRA; embeddings and head need none."""
    mixers = state_space_mixers(facts.tensors)
    left_out: dict[str, str] = {}
    for name, tensor in facts.tensors.items():
        module = name.removesuffix(".qweight").removesuffix(".weight")
        place = expert_stacks.place_of(module)
        is_adapted = (place.module if place else module) in facts.linear_modules
        if module == name or is_adapted or len(tensor.shape) != 2:
            continue
        left_out[module] = _no_linear_layer(module, facts.model_type) or reason_left_out(module, mixers)
    return sentences(left_out)


def sentences(left_out: Mapping[str, str]) -> tuple[str, ...]:
    """Notes on modules (path -> reason) that look trainable and carry no LoRA."""
    by_reason: dict[str, list[str]] = {}
    for module, reason in left_out.items():
        by_reason.setdefault(reason, []).append(module)
    return tuple(
        note.format(count=len(by_reason[reason]), names=_leaf_names(by_reason[reason])) + "."
        for reason, note in _NOTES.items()
        if reason in by_reason
    )


def layer_of(module: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj`: up to the first number of the path; empty for what is in no
    layer, as the head is."""
    parts = module.split(".")
    return next((".".join(parts[: place + 1]) for place, part in enumerate(parts) if part.isdecimal()), "")


def natural_order(module: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which layer 10 comes after layer 9."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in module.split("."))


def _no_linear_layer(module: str, model_type: str) -> str:
    """What a two-dimensional weight is instead of a linear layer's, or "" where its name does not say."""
    parts = module.split(".")
    leaf = parts[-1]
    if leaf in _EMBEDDING_NAMES or _TABLE.fullmatch(leaf):
        return "embedding"
    if _NORM.fullmatch(leaf):
        return "norm"
    if _CONVOLUTION.fullmatch(leaf):
        return "convolution"
    if leaf in _HEAD_NAMES or (len(parts) == 1 and leaf in _TOP_LEVEL_HEAD_NAMES):
        return "head"
    if model_type in CONV1D_MODEL_TYPES and leaf in _CONV1D_NAMES:
        return "conv1d"
    return ""


def _touches_vocabulary(module: str, shape: LinearShape, vocabulary_size: int) -> bool:
    """An embedding or head under a name not listed: outside every numbered block, one side the vocabulary."""
    in_block = any(part.isdigit() for part in module.split("."))
    return not in_block and vocabulary_size > 0 and vocabulary_size in (shape.inputs, shape.outputs)


def _leaf_names(modules: Iterable[str]) -> str:
    names = sorted({module.rsplit(".", 1)[-1] for module in modules})
    return ", ".join(names[:6]) + (" and others" if len(names) > 6 else "")
