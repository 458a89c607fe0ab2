"""transformers' own code of a model, without memory: what `load` fills, and what a dry run looks at.

Everything that config.json and the headers of the weight files decide is decided here: whether transformers has the
architecture, whether it predicts the next token, which stored tensor belongs to which parameter, which linear layers
carry an adapter. No weight is read.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qlora_hal.contract.rotary_length import RotaryLength, rotary_length
from qlora_hal.contract.values import LinearShape
from qlora_hal.errors import ModelError
from qlora_hal.errors.foreign import first_words, missing_package
from qlora_hal.formats.gpt_oss import BLOCKS, SCALES
from qlora_hal.model.expert_stacks import is_joined, place_of
from qlora_hal.model.linear_shapes import natural_order, reason_left_out, state_space_mixers
from qlora_hal.model.source import ModelSource
from qlora_hal.model.stored_dtypes import FLOATING_DTYPES, not_a_weight, packed_elsewhere
from qlora_hal_backends.torch_family.attention import sinks
from qlora_hal_backends.torch_family.experts import ExpertNames, ExpertStack, place_experts
from qlora_hal_backends.torch_family.lora_linear import FrozenLinear
from qlora_hal_backends.torch_family.platform import ATTENTION_WITH_SINKS
from qlora_hal_backends.torch_family.transformers_versions import (
    NameInModel,
    build_causal,
    optional_libraries_unheard,
    read_config,
    stays_float32,
    tensor_renamer,
)

_PACKED = re.compile(r"(?P<module>.+)\.(?P<part>qweight|qzeros|scales|g_idx|SCB|weight_format|weight\..+)")
"""What quantized checkpoints store in place of, or beside, a module's weight."""

_PACKED_EXPERTS = re.compile(rf"(?P<module>.+\.experts\.(gate_up_proj|down_proj))({BLOCKS}|{SCALES})")
"""What gpt-oss stores in place of the weight of all experts of a block."""

_REFUSED = {
    "cpmant": "Its forward pass lets every token of a prompt see the whole prompt.",
    "reformer": "Its reversible layers pass no gradient to an adapter inside them.",
    "laguna": "PEFT 0.21 leaves out the adapters of its shared experts, whose layers transformers renames.",
    "deepseek_v4": "Its compressed attention lets samples of a row change one another, which short rows do not show.",
}
"""Architectures whose configuration gives no sign of it; what else is not causal is found out in `trial`."""

_RECOMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$", r"\.attn(\.attention)?\.bias$")
"""Tables that older checkpoints carry and the architecture computes."""


_LONG = 16_384
"""Positions up to which a mask of positions x positions is below 300 MB."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """`causal` is on the meta device, its linear layers are `linears`.

    `stored` maps names in the model to names in the files, biases of packed layers that have none there included.
    `tied` are groups of parameters that are one by config.json. `adapted` are the linear layers that can carry LoRA,
    `left_out` the others with the reason. `experts` are the stacks of routed experts, by their paths in the core, and
    `expert_names` says which tensors hold them. `unused` are stored tensors that the architecture has no use for, as
    transformers knows.
    """

    causal: Any
    linears: Mapping[str, FrozenLinear]
    stored: Mapping[str, str]
    tied: Sequence[tuple[str, ...]]
    adapted: tuple[str, ...]
    left_out: Mapping[str, str]
    unused: tuple[str, ...]
    experts: Mapping[str, ExpertStack]
    expert_names: ExpertNames

    @property
    def shapes(self) -> dict[str, LinearShape]:
        """Every module that can carry LoRA."""
        shapes = {name: self.linears[name].shape for name in self.adapted}
        shapes |= {name: stack.shape for name, stack in self.experts.items()}
        return dict(sorted(shapes.items(), key=lambda item: natural_order(item[0])))


def build(source: ModelSource, attention: object, dtype: torch.dtype) -> Architecture:
    """The architecture of a folder, with everything in its place but the weights.

    Raises ModelError: QH-M51 for what transformers cannot build or this family does not train, QH-M50 with every tensor
    that is missing, left over, misshapen or no floating-point number, QH-C72 for a quantized head.
    """
    with optional_libraries_unheard():
        causal = _built(source, attention, dtype)
    _refuse_other_kinds(causal, source)
    named = _named_tensors(causal)
    rename = tensor_renamer(causal, named)
    expert_names = ExpertNames(place_experts(causal))
    renamed = _names_in_model(rename, expert_names, source)
    linears, routers = _place_linears(causal, renamed)
    _refuse_packed_elsewhere(renamed, linears, source)
    tied = _tied_groups(causal)
    extra = _biases_of_packed_layers(renamed, linears)
    stored = {
        ours: theirs
        for theirs, ours in renamed.items()
        if ours in extra or _belongs(ours, named) or _is_of_an_expert(theirs, ours)
    }
    unused = tuple(sorted(set(renamed) - set(stored.values()), key=natural_order))
    _check_complete(causal, linears, stored, tied, unused, expert_names, source)
    mixers = state_space_mixers(named)
    reasons = {name: reason_left_out(name, mixers) for name in linears}
    adapted = tuple(sorted((name for name in linears if not reasons[name]), key=natural_order))
    if not adapted:
        raise _untrained(source, f"None of its {len(linears)} linear layers can carry LoRA{_conv1d_words(causal)}.")
    left_out = {name: reason for name, reason in reasons.items() if reason} | dict.fromkeys(routers, "router")
    stacks = expert_names.place_stacks()
    return Architecture(causal, linears, stored, tied, adapted, left_out, unused, stacks, expert_names)


def _built(source: ModelSource, attention: object, dtype: torch.dtype) -> Any:
    from accelerate import init_empty_weights

    try:
        config = read_config(source.path, trust_remote_code=source.trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # packing is done here, not by transformers
        _refuse_huge_tables(config, source, dtype)
        wanted = _attention(config, attention, source)
        # Buffers (rotary frequencies) are computed for real: no checkpoint holds them.
        with init_empty_weights(include_buffers=False):
            return build_causal(config, dtype=dtype, attention=wanted, trust_remote_code=source.trust_remote_code)
    except ModelError:
        raise
    except Exception as error:  # transformers raises what its many model files happen to raise
        raise ModelError(
            "QH-M51",
            f"transformers cannot build {_name(source)} as a causal language model.",
            where=source.name,
            cause=f"{type(error).__name__}: {first_words(str(error))}",
            fix=_way_to_build(source, error),
        ) from error


def _way_to_build(source: ModelSource, error: Exception) -> str:
    if package := missing_package(error):
        return f"Install the package {package}, which it needs."
    if sys.flags.optimize > 1:
        return "Run Python without -OO and PYTHONOPTIMIZE=2: transformers reads docstrings, which they strip."
    if _is_known(source.facts.model_type):
        return (
            f"Correct config.json, or get it again from where the model is from: transformers knows {_name(source)}, "
            "so a value in that file is at fault."
        )
    return "Choose a decoder-only causal language model, or update transformers."


def _is_known(model_type: str) -> bool:
    """Whether this transformers has a causal language model of that name, whatever its values."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _attention(config: Any, asked: object, source: ModelSource) -> str | None:
    """Which attention transformers builds; None lets it choose, and it takes torch's fused one wherever it can.

    That one cannot cap scores (Gemma 2); transformers 5.17 leaves the cap out there without a word, 5.23 does not. Nor
    has it sinks: what has them gets ours, where transformers would take its eager one.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if asked == "sdpa" and capped:
        raise ModelError(
            "QH-M51",
            f"{_name(source)} caps its attention scores, and torch's fused attention (sdpa) cannot.",
            where="backend.options.attention",
            fix="Remove backend.options.attention: the model then gets eager attention, which caps them.",
        )
    if asked == "auto" and config.get_text_config().model_type in ATTENTION_WITH_SINKS:
        return sinks.register()
    if asked == "auto":
        return "eager" if capped else None
    return str(asked)


def _refuse_huge_tables(config: Any, source: ModelSource, dtype: torch.dtype) -> None:
    """Raises ModelError QH-M51 where config.json asks for tables, computed while the architecture is built, that take
    over a gigabyte: some architectures keep a causal mask of positions x positions."""
    words = config.get_text_config()
    lengths = (getattr(words, name, None) for name in ("max_position_embeddings", "n_positions"))
    if max((length for length in lengths if isinstance(length, int)), default=0) <= _LONG:
        return
    with torch.device("meta"):
        try:
            outlined = build_causal(config, dtype=dtype, attention=None, trust_remote_code=source.trust_remote_code)
        except Exception:  # the real attempt tells
            return
    tables = {name: buffer.numel() * buffer.element_size() for name, buffer in outlined.named_buffers()}
    if sum(tables.values()) > 2**30:
        largest = max(tables, key=tables.__getitem__)
        raise ModelError(
            "QH-M51",
            f"{_name(source)} would compute tables of {sum(tables.values()) / 1e9:.1f} GB, the largest {largest}.",
            where=source.name,
            cause="They grow with the number of positions that config.json claims.",
            fix="Check that config.json belongs to these weights.",
        )


def _refuse_other_kinds(causal: Any, source: ModelSource) -> None:
    """Encoders that transformers also offers with a language-modeling head: they see the tokens they should predict."""
    if reason := _REFUSED.get(causal.config.model_type):
        raise _untrained(source, reason)
    declares = "is_decoder" in getattr(type(causal.config), "__dataclass_fields__", {})
    if declares and not causal.config.is_decoder and _asks_for_decoder(type(causal)):
        raise _untrained(
            source,
            "config.json says is_decoder: false: it is an encoder, and each position sees the tokens after it.",
            fix="Choose a decoder-only causal language model; one that was trained as a decoder says is_decoder: true.",
        )


def _asks_for_decoder(kind: type) -> bool:
    """Whether the code of an architecture has two ways; GPT-NeoX declares the setting and never reads it."""
    try:
        return re.search(r"\.is_decoder\b(?! = )", inspect.getsource(inspect.getmodule(kind) or kind)) is not None
    except (OSError, TypeError):
        return True


def _named_tensors(causal: Any) -> dict[str, Any]:
    """Every parameter and buffer that is stored, by its name, tied ones under each of their names. Buffers that the
    architecture computes (`persistent=False`) are left out: transformers does not read them either."""
    return dict(causal.state_dict(keep_vars=True))


def _names_in_model(
    rename: Callable[[str], NameInModel], expert_names: ExpertNames, source: ModelSource
) -> dict[str, str]:
    """Stored name -> name in the model, by transformers' own table; experts' tensors keep their names. Raises
    ModelError QH-M51 where that table does not only rename, but joins or splits other tensors."""
    renamed: dict[str, str] = {}
    converted: list[str] = []
    for stored in sorted(source.facts.tensors, key=natural_order):
        if (joined := _PACKED_EXPERTS.fullmatch(stored)) and expert_names.takes(
            joined["module"], rename(joined["module"]), is_packed=True
        ):
            renamed[stored] = stored
            continue
        packed = _PACKED.fullmatch(stored)
        layer = packed["module"] if packed else stored.removesuffix(".weight")
        name = _renamed(stored, rename)
        if expert_names.takes(layer, rename(f"{layer}.weight") if packed else name):
            renamed[stored] = stored
            continue
        renamed[stored] = name.name
        if name.is_converted or expert_names.holds(name.name):
            converted.append(stored)
    if converted:
        experts = any("experts" in name.split(".") for name in converted)
        what = "the experts of its mixture" if experts else f"{len(converted)} of its tensors"
        raise _untrained(
            source,
            f"transformers joins or splits {what} while loading ({converted[0]} and others); tensors are read here as "
            "they are stored.",
            fix="Choose a model without a mixture of experts." if experts else "Choose another model.",
        )
    _refuse_doubles(renamed, source)
    return renamed


def _renamed(stored: str, rename: Any) -> NameInModel:
    """A packed weight's parts go where its weight goes."""
    packed = _PACKED.fullmatch(stored)
    if packed is None:
        return rename(stored)  # type: ignore[no-any-return]
    weight: NameInModel = rename(f"{packed['module']}.weight")
    return replace(weight, name=f"{weight.name.removesuffix('.weight')}.{packed['part']}")


def _is_of_an_expert(stored: str, name: str) -> bool:
    """Whether a tensor keeps its name because it is one expert's, or holds all of a block (`ExpertNames`)."""
    if stored != name:
        return False
    packed = _PACKED.fullmatch(stored)
    layer = packed["module"] if packed else stored.removesuffix(".weight")
    return bool(_PACKED_EXPERTS.fullmatch(stored)) or is_joined(layer) or place_of(layer) is not None


def _refuse_doubles(renamed: Mapping[str, str], source: ModelSource) -> None:
    first: dict[str, str] = {}
    for stored, name in renamed.items():
        if first.setdefault(name, stored) != stored:
            raise ModelError(
                "QH-M50",
                f"{first[name]} and {stored} are both stored for {name}; one is expected.",
                where=source.name,
                fix="Get the model again from its source, all files from one revision.",
            )


def _place_linears(causal: Any, renamed: Mapping[str, str]) -> tuple[dict[str, FrozenLinear], list[str]]:
    """Put ours in the place of transformers' linear layers, the head and what must stay in float32 left out, and the
    routers, which are given as well: they are not quantized unless the checkpoint has them so."""
    packed = {found["module"] for name in renamed.values() if (found := _PACKED.fullmatch(name))}
    routers: list[str] = []
    head = causal.get_output_embeddings()
    in_float32 = stays_float32(causal)
    kinds = {type(module) for module in causal.modules() if isinstance(module, nn.Linear)}
    products = {kind for kind in kinds if _is_product(kind)}
    linears: dict[str, FrozenLinear] = {}
    for name, module in list(causal.named_modules()):
        if not isinstance(module, nn.Linear) or module is head or in_float32(f"{name}.weight"):
            continue
        if reason_left_out(name) == "router" and name not in packed:
            routers.append(name)
            continue
        if type(module) in products:
            frozen = FrozenLinear(module.in_features, module.out_features, has_bias=module.bias is not None)
            causal.set_submodule(name, frozen)
            linears[name] = frozen
    return linears, routers


def _is_product(kind: Any) -> bool:
    """Whether a class computes what `nn.Linear` does. Falcon's does, in other words; routers and grouped products,
    which inherit from it too, do not."""
    if kind.forward is nn.Linear.forward:
        return True
    try:
        with torch.random.fork_rng(devices=[]):
            trial = kind(4, 3, bias=True, device="cpu", dtype=torch.float32)
            rows = torch.randn(2, 5, 4)
            found = trial(rows)
            return torch.allclose(found, nn.functional.linear(rows, trial.weight, trial.bias), rtol=1e-5, atol=1e-6)
    except Exception:  # another constructor, another kind of result: no plain product
        return False


def _tied_groups(causal: Any) -> list[tuple[str, ...]]:
    """Parameters that config.json declares to be one, whichever of them is stored; that of the embedding first."""
    groups: dict[str, list[str]] = {}
    targets: Mapping[str, str] = getattr(causal, "all_tied_weights_keys", None) or {}
    for target, source in targets.items():
        groups.setdefault(source, [source]).append(target)
    head = causal.get_output_embeddings()
    if not groups and head is not None and getattr(causal.config.get_text_config(), "tie_word_embeddings", False):
        names = {module: name for name, module in causal.named_modules()}
        pair = [f"{names[module]}.weight" for module in (causal.get_input_embeddings(), head) if module in names]
        groups[pair[0]] = pair
    return [tuple(dict.fromkeys(group)) for group in groups.values()]


def _refuse_packed_elsewhere(
    renamed: Mapping[str, str], linears: Mapping[str, FrozenLinear], source: ModelSource
) -> None:
    """Raises ModelError QH-C72 for a packed weight that is not of a linear layer of ours: of the head, most often."""
    if source.facts.prequantized is None:
        return
    for stored, name in renamed.items():
        packed, module = _PACKED.fullmatch(stored), _PACKED.fullmatch(name)
        if _is_of_an_expert(stored, name):
            continue
        # Other parameters may be called scales, too; beside MLX's packed weights nothing is.
        is_mark = packed and (packed["part"] != "scales" or source.facts.prequantized.method == "mlx")
        if packed and module and is_mark and module["module"] not in linears:
            raise packed_elsewhere(packed["module"], source.name)


def _belongs(name: str, named: Mapping[str, Any]) -> bool:
    packed = _PACKED.fullmatch(name)
    return name in named or (packed is not None and f"{packed['module']}.weight" in named)


def _biases_of_packed_layers(renamed: Mapping[str, str], linears: Mapping[str, FrozenLinear]) -> set[str]:
    """Biases that the architecture has not: auto-gptq writes zeros for every layer it packs. `load` looks at them."""
    packed = {found["module"] for name in renamed.values() if (found := _PACKED.fullmatch(name))}
    without = {name for name in packed & linears.keys() if not linears[name].has_bias}
    return {f"{name}.bias" for name in without}.intersection(renamed.values())


def _check_complete(
    causal: Any,
    linears: Mapping[str, FrozenLinear],
    stored: Mapping[str, str],
    tied: Sequence[tuple[str, ...]],
    unused: Sequence[str],
    expert_names: ExpertNames,
    source: ModelSource,
) -> None:
    """Every parameter and stored buffer has its tensor, every tensor its place, their shapes agree, and they hold
    numbers."""
    ignored = [re.compile(word) for word in (*_RECOMPUTED, *(causal._keys_to_ignore_on_load_unexpected or ()))]
    computed = {name for name, _ in causal.named_buffers(remove_duplicate=False)} - _named_tensors(causal).keys()
    left = [name for name in unused if name not in computed and not any(word.search(name) for word in ignored)]
    modules = {packed["module"] for name in stored if (packed := _PACKED.fullmatch(name))}
    there = {*stored, *(f"{module}.weight" for module in modules)}
    shared = {name for group in tied if there.intersection(group) for name in group}
    shapes = dict(_expected_shapes(causal, linears))
    missing = sorted((name for name in shapes if name not in there | shared), key=natural_order)
    missing += expert_names.missing()
    if missing or left:
        raise ModelError(
            "QH-M50",
            f"The checkpoint and {type(causal).__name__} do not match: {len(missing)} tensors missing "
            f"({', '.join(missing[:5]) or 'none'}), {len(left)} left over ({', '.join(left[:5]) or 'none'}).",
            where=source.name,
            cause=_other_kind(causal, source),
            fix="Check that config.json belongs to these weights, and that they are of a causal language model.",
            context={"missing": missing, "left_over": left},
        )
    for name, expected in shapes.items():
        found = source.facts.tensors[stored[name]].shape if name in stored else expected
        if tuple(found) != expected and name.rpartition(".")[0] not in modules:
            raise shape_mismatch(source.name, name, found, expected)
    for layer, expected in expert_names.expected_shapes():
        name = layer if layer in stored else f"{layer}.weight"
        if layer not in modules and tuple(source.facts.tensors[name].shape) != expected:
            raise shape_mismatch(source.name, name, source.facts.tensors[name].shape, expected)
    for name in (*_floating(causal, linears), *(f"{layer}.weight" for layer, _ in expert_names.expected_shapes())):
        if name in stored and name.rpartition(".")[0] not in modules:
            dtype = source.facts.tensors[stored[name]].dtype
            if dtype not in FLOATING_DTYPES:
                raise not_a_weight(stored[name], dtype, source.name)


def _floating(causal: Any, linears: Mapping[str, FrozenLinear]) -> Iterator[str]:
    """Names of what the architecture has as floating-point numbers, tables that it computes itself left out."""
    for name, tensor in _named_tensors(causal).items():
        if tensor.is_floating_point() and not any(re.search(word, name) for word in _RECOMPUTED):
            yield name
    for name in linears:
        yield from (f"{name}.weight", f"{name}.bias")


def _expected_shapes(causal: Any, linears: Mapping[str, FrozenLinear]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, tensor in _named_tensors(causal).items():
        yield name, tuple(tensor.shape)
    for name, linear in linears.items():
        yield f"{name}.weight", (linear.out_features, linear.in_features)
        if linear.has_bias:
            yield f"{name}.bias", (linear.out_features,)


def _other_kind(causal: Any, source: ModelSource) -> str:
    named = source.facts.architecture
    if not named or named == type(causal).__name__:
        return ""
    return f"config.json names {named}; a {type(causal).__name__} was expected."


def _conv1d_words(causal: Any) -> str:
    count = sum(type(module).__name__ == "Conv1D" for module in causal.modules())
    return f": its {count} projections are Conv1D, which store their weights transposed" if count else ""


def rotary_of(causal: Any) -> RotaryLength | None:
    """Where the rotary positions of a model change with the length of a row."""
    return rotary_length(causal.config.get_text_config().to_dict())


def shape_mismatch(where: str, name: str, found: Sequence[int], expected: Sequence[int]) -> ModelError:
    """The refusal of one tensor's shape."""
    return ModelError(
        "QH-M50",
        f"{name} has shape {list(found)}; config.json asks for {list(expected)}.",
        where=where,
        fix="Check that config.json belongs to these weights.",
    )


def _untrained(
    source: ModelSource, cause: str, fix: str = "Choose a decoder-only causal language model."
) -> ModelError:
    return ModelError(
        "QH-M51", f"{_name(source)} is not trained by this backend.", where=source.name, cause=cause, fix=fix
    )


def _name(source: ModelSource) -> str:
    facts = source.facts
    return facts.architecture or facts.model_type or "This model"
