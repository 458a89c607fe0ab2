"""The weights that a config.json describes, for families whose names and shapes follow from it: names, shapes and dtype
as the headers of the weight files would have them.

A row of `_FAMILIES` says how a family departs from Llama. The architecture's own code is the judge:
`tests/model/test_described_weights.py` holds each row against transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_hal.files.safetensors_file import DTYPE_BITS, TensorEntry
from qlora_hal.formats.gpt_oss import BLOCKS, GROUP, METHOD, SCALES
from qlora_hal.model.claimed_layers import MAX_LAYERS, MAX_OF_OTHERS
from qlora_hal.model.safetensors_headers import Header

LARGEST = 2**31
"""No width or vocabulary reaches it."""
_DTYPES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_HEADER_BYTES_OF_A_TENSOR, _HEADER_BYTES_OF_A_FILE = 200, 4_096
"""What a header may take at most: an entry has about 110 characters with its name; metadata are short."""
LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*LLAMA_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Family:
    """How a family departs from Llama. `norms` are those of a layer that have the model's width. `bias` of queries,
    keys and values: `flag` is config.json's `attention_bias`, `flag_true` the same where a missing one is true;
    `bias_of_output` has the output share it. `head_norms` are `""`, `head` (one for all heads), `all` (as wide as all
    heads together) or `each` (where `use_qk_norm` is set).
    `head_size` is what a missing `head_dim` means, None a share of the width. `experts` are the names of a block of
    experts, and of the gate, up and down projection in it. `joined_experts`: all of a block in one tensor, with biases,
    and attention with sinks, as gpt-oss has them; in 16 bits or in MXFP4."""

    norms: tuple[str, ...] = LLAMA_NORMS
    bias: str = "flag"
    bias_of_output: bool = True
    bias_of_feed_forward: bool = False
    head_norms: str = ""
    fused_attention: bool = False
    fused_feed_forward: bool = False
    tied: bool = False
    head_size: int | None = None
    experts: tuple[str, tuple[str, str, str]] | None = None
    joined_experts: bool = False


_NO_BIAS = _Family(bias="never", bias_of_output=False)
_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(bias_of_feed_forward=True),
    "mistral": _NO_BIAS,
    "qwen2": _Family(bias="always", bias_of_output=False),
    "qwen3": _Family(head_norms="head", head_size=128),
    "gemma": _Family(tied=True, head_size=256),
    "gemma2": _Family(norms=_FOUR_NORMS, tied=True, head_size=256),
    "gemma3_text": _Family(norms=_FOUR_NORMS, head_norms="head", tied=True, head_size=256),
    "phi3": _Family(bias="never", bias_of_output=False, fused_attention=True, fused_feed_forward=True),
    "granite": _Family(bias_of_feed_forward=True),
    "olmo2": _Family(norms=("post_attention_layernorm", "post_feedforward_layernorm"), head_norms="all"),
    "smollm3": _Family(bias_of_feed_forward=True, tied=True),
    "cohere": _Family(norms=("input_layernorm",), head_norms="each", tied=True),
    "glm4": _Family(
        norms=(*LLAMA_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"),
        bias_of_output=False,
        fused_feed_forward=True,
        head_size=128,
    ),
    "mixtral": _Family(bias="never", bias_of_output=False, experts=("block_sparse_moe", ("w1", "w3", "w2"))),
    "gpt_oss": _Family(
        bias="flag_true", head_size=64, joined_experts=True, experts=("mlp", ("gate_proj", "up_proj", "down_proj"))
    ),
    "qwen3_moe": _Family(head_norms="head", head_size=128, experts=("mlp", ("gate_proj", "up_proj", "down_proj"))),
}
DESCRIBED_FAMILIES = frozenset(_FAMILIES)


def why_not_described(config: Mapping[str, object]) -> str:
    """Why config.json alone does not say what the weights are, as the end of a sentence; empty where it does."""
    if (config.get("quantization_config") or config.get("quantization")) and not _is_published_mxfp4(config):
        return "it is stored quantized, and which layers are packed stands in the weight files alone"
    model_type = str(config.get("model_type", ""))[:40]
    if model_type not in _FAMILIES:
        return f"the tensors of model_type {model_type!r} do not follow from it here"
    if unknown := next((name for name in _needed(config, _FAMILIES[model_type]) if _size(config, name) is None), ""):
        return f"it has no usable {unknown}"
    if str(_dtype_of(config)) not in _DTYPES:
        return f"its dtype is {str(_dtype_of(config))[:40]!r}"
    if _family_of(config).experts and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        return "some of its layers have experts and others have none"
    return ""


def described_shapes(config: Mapping[str, object]) -> Shapes:
    """Name -> shape of every stored tensor, of a config that `why_not_described` has nothing against."""
    family, hidden = _family_of(config), _required(config, "hidden_size")
    vocabulary = _required(config, "vocab_size")
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    one_layer = {**_attention(config, family), **_feed_forward(config, family)}
    one_layer |= {f"{norm}.weight": (hidden,) for norm in family.norms}
    for layer in range(_required(config, "num_hidden_layers")):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in one_layer.items()}
    tied = config.get("tie_word_embeddings")
    if not (family.tied if tied is None else tied is True):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def described_header(config: Mapping[str, object], folder: Path, dtype: str = "") -> Header:
    """One header with all tensors, as if a single file held them; `dtype` is a name of safetensors, by default the one
    that config.json says."""
    dtype = dtype or _DTYPES[str(_dtype_of(config))]
    tensors, end = {}, 0
    for name, shape in described_shapes(config).items():
        own = "U8" if name.endswith((BLOCKS, SCALES)) else dtype
        begin, end = end, end + math.prod(shape) * DTYPE_BITS[own] // 8
        tensors[name] = TensorEntry(own, shape, begin, end)
    return Header(folder / "config.json", b"", {}, tensors, _no_weights)


def agreed_header(
    config: Mapping[str, object], folder: Path, named: Mapping[str, str], sizes: Sequence[int]
) -> Header | None:
    """The header that config.json describes, where the weight files say nothing against it: `named` are the tensors of
    the index, if there is one, `sizes` the bytes of the files. None where they do, or where it describes none."""
    if why_not_described(config):
        return None
    for dtype in ("BF16", "F32") if str(_dtype_of(config)) != "float16" else ("F16", "F32"):
        found = described_header(config, folder, dtype)
        held = sum(tensor.byte_count for tensor in found.tensors.values())
        beside = sum(sizes) - held
        most = _HEADER_BYTES_OF_A_TENSOR * len(found.tensors) + _HEADER_BYTES_OF_A_FILE * len(sizes)
        if 0 <= beside <= most and (not named or named.keys() == found.tensors.keys()):
            return found
    return None


def _attention(config: Mapping[str, object], family: _Family) -> Shapes:
    hidden, heads = _required(config, "hidden_size"), _required(config, "num_attention_heads")
    key_heads = _size(config, "num_key_value_heads") or heads
    head = _size(config, "head_dim") or family.head_size or hidden // heads
    sides = {"q_proj": heads * head, "k_proj": key_heads * head, "v_proj": key_heads * head}
    if family.fused_attention:
        sides = {"qkv_proj": sum(sides.values())}
    shapes: Shapes = {f"{name}.weight": (side, hidden) for name, side in sides.items()}
    shapes["o_proj.weight"] = (hidden, heads * head)
    flag = config.get("attention_bias", family.bias == "flag_true")
    if family.bias == "always" or (family.bias in ("flag", "flag_true") and flag is True):
        shapes |= {f"{name}.bias": (side,) for name, side in sides.items()}
        if family.bias_of_output:
            shapes["o_proj.bias"] = (hidden,)
    if family.joined_experts:
        shapes["sinks"] = (heads,)
    shapes |= _head_norms(family.head_norms, heads, key_heads, head, each=config.get("use_qk_norm") is True)
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _head_norms(kind: str, heads: int, key_heads: int, head: int, *, each: bool) -> Shapes:
    if kind == "head":
        return {"q_norm.weight": (head,), "k_norm.weight": (head,)}
    if kind == "all":
        return {"q_norm.weight": (heads * head,), "k_norm.weight": (key_heads * head,)}
    if kind == "each" and each:
        return {"q_norm.weight": (heads, head), "k_norm.weight": (key_heads, head)}
    return {}


def _feed_forward(config: Mapping[str, object], family: _Family) -> Shapes:
    hidden = _required(config, "hidden_size")
    if family.joined_experts:
        return _joined_experts(config)
    if family.experts:
        block, (gate, up, down) = family.experts
        inner = _size(config, "moe_intermediate_size") or _required(config, "intermediate_size")
        experts = _size(config, "num_experts") or _required(config, "num_local_experts")
        shapes: Shapes = {f"{block}.gate.weight": (experts, hidden)}
        for number in range(experts):
            at = f"{block}.experts.{number}"
            shapes |= {f"{at}.{name}.weight": (inner, hidden) for name in (gate, up)}
            shapes[f"{at}.{down}.weight"] = (hidden, inner)
        return shapes
    inner = _required(config, "intermediate_size")
    sides = {"gate_up_proj": 2 * inner} if family.fused_feed_forward else {"gate_proj": inner, "up_proj": inner}
    shapes = {f"mlp.{name}.weight": (side, hidden) for name, side in sides.items()}
    shapes["mlp.down_proj.weight"] = (hidden, inner)
    if family.bias_of_feed_forward and config.get("mlp_bias") is True:
        shapes |= {f"mlp.{name}.bias": (side,) for name, side in sides.items()} | {"mlp.down_proj.bias": (hidden,)}
    return shapes


def _joined_experts(config: Mapping[str, object]) -> Shapes:
    hidden, inner = _required(config, "hidden_size"), _required(config, "intermediate_size")
    experts = _size(config, "num_experts") or _required(config, "num_local_experts")
    shapes: Shapes = {"mlp.router.weight": (experts, hidden), "mlp.router.bias": (experts,)}
    for name, inputs, outputs in (("gate_up_proj", hidden, 2 * inner), ("down_proj", inner, hidden)):
        path = f"mlp.experts.{name}"
        if _is_published_mxfp4(config):
            shapes[path + BLOCKS] = (experts, outputs, inputs // GROUP, GROUP // 2)
            shapes[path + SCALES] = (experts, outputs, inputs // GROUP)
        else:
            shapes[path] = (experts, inputs, outputs)
        shapes[f"{path}_bias"] = (experts, outputs)
    return shapes


def _is_published_mxfp4(config: Mapping[str, object]) -> bool:
    """Whether it is gpt-oss as it is on the hub: which tensors are packed, and how, follows from config.json."""
    described = config.get("quantization_config")
    is_packed = isinstance(described, dict) and described.get("quant_method") == METHOD
    return is_packed and config.get("model_type") == "gpt_oss"


def _needed(config: Mapping[str, object], family: _Family) -> Iterator[str]:
    yield from ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if not family.experts or family.joined_experts:
        yield "intermediate_size"
    if family.experts and _size(config, "num_experts") is None:
        yield "num_local_experts"


def _family_of(config: Mapping[str, object]) -> _Family:
    return _FAMILIES[str(config["model_type"])]


def _dtype_of(config: Mapping[str, object]) -> object:
    """transformers 5 writes `dtype`, 4 wrote `torch_dtype`; both may be left out of what was float32, and gpt-oss has
    neither."""
    default = "bfloat16" if _is_published_mxfp4(config) else "float32"
    found = config.get("dtype") or config.get("torch_dtype") or default
    return str(found).removeprefix("torch.")


def _size(config: Mapping[str, object], name: str) -> int | None:
    value = config.get(name)
    most = {"num_hidden_layers": MAX_LAYERS, "num_local_experts": MAX_OF_OTHERS, "num_experts": MAX_OF_OTHERS}
    return value if type(value) is int and 0 < value <= most.get(name, LARGEST) else None


def _required(config: Mapping[str, object], name: str) -> int:
    found = _size(config, name)
    assert found is not None, f"{name} is not usable, and why_not_described was not asked"
    return found


def _no_weights(begin: int, end: int) -> bytes:
    raise AssertionError("a described tensor has no bytes")
