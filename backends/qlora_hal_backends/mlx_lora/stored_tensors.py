"""The tensors of a checkpoint, lazy, under the names of mlx-lm's model of it; none is left out without a word."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from qlora_hal.errors import ModelError
from qlora_hal.model.facts import TensorFacts, text_config
from qlora_hal.model.source import ModelSource

Arrays = dict[str, mx.array]

_DTYPES = {
    "BOOL": mx.bool_, "U8": mx.uint8, "U16": mx.uint16, "U32": mx.uint32, "U64": mx.uint64,
    "I8": mx.int8, "I16": mx.int16, "I32": mx.int32, "I64": mx.int64,
    "F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32,
}  # fmt: skip
_FREQUENCIES = re.compile(r"\b(rotary_emb|rope)\.inv_freq$")
_CAUSAL_MASK = re.compile(r"\.(attn|attention)\.(masked_)?bias$")
_OTHER_TOWERS = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector|embed_vision|audio_tower|embed_audio)\."
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
_NEXT_TOKENS = re.compile(r"(^|\.)mtp(_layers)?\.")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(slots=True)
class Weights:
    """Tensors under mlx-lm's names, lazy until evaluated; `origin` gives the checkpoint's name of a module. `notes` are
    about tensors that no part of the language model is made of."""

    arrays: Arrays
    origin: Mapping[str, str]
    where: str
    notes: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        return name in self.arrays

    def take(self, name: str) -> mx.array:
        """Hand one tensor over; nothing here holds it any longer. Raises ModelError QH-M50 when it is missing."""
        if name not in self.arrays:
            raise mismatch(self.where, missing=[name], left=[])
        return self.arrays.pop(name)


def open_tensors(source: ModelSource) -> Arrays:
    """All shards, lazily, under the checkpoint's own names; zeros of the same shapes, never made, while the weights lie
    on the hub. Raises ModelError QH-M50 for one that MLX cannot read."""
    arrays: Arrays = {}
    if source.remote is not None:
        arrays = {name: _outlined(tensor, source) for name, tensor in source.facts.tensors.items()}
        return {name: array for name, array in arrays.items() if not _is_recomputed(name, array)}
    for file in sorted({tensor.file for tensor in source.facts.tensors.values()}):
        # Contents decide what MLX reads, not the name: blobs of the hub's cache have none.
        path = (source.path / file).resolve(strict=True)
        try:
            arrays.update(cast("Arrays", mx.load(str(path), format="safetensors")))
        except (RuntimeError, ValueError) as error:
            raise _unread(file, source, str(error).splitlines()[0]) from error
    return {name: array for name, array in arrays.items() if not _is_recomputed(name, array)}


def _outlined(tensor: TensorFacts, source: ModelSource) -> mx.array:
    if tensor.dtype not in _DTYPES:
        raise _unread(tensor.file, source, f"MLX has no dtype {tensor.dtype}")
    return mx.zeros(tensor.shape, _DTYPES[tensor.dtype])


def _unread(file: str, source: ModelSource, cause: str) -> ModelError:
    return ModelError(
        "QH-M50",
        f"MLX cannot read {file}.",
        where=source.name,
        cause=cause,
        fix="Name a version of the model in bfloat16, float16 or float32.",
    )


def _is_recomputed(name: str, array: mx.array) -> bool:
    """Buffers that older checkpoints carry: frequencies of rotary position, and causal masks (or their -1e9)."""
    return bool(_FREQUENCIES.search(name)) or (array.ndim in (0, 4) and bool(_CAUSAL_MASK.search(name)))


def ties_its_head(arrays: Arrays, config: Mapping[str, object], read: Mapping[str, object]) -> bool:
    """Whether the head is the embedding, as transformers 5 decides it: where config.json (`read`: with transformers'
    defaults) says so, unless a head is stored that differs. An equal one is taken out of `arrays`."""
    heads = [name.removesuffix("weight") for name in arrays if _HEAD.search(name)]
    if not heads:
        return text_config(config).get("tie_word_embeddings") is not False
    embedding = next((name.removesuffix("weight") for name in arrays if _EMBEDDING.search(name)), "")
    if not text_config(read).get("tie_word_embeddings") or not embedding:
        return False
    if not all(_are_equal(_below(head, arrays), _below(embedding, arrays)) for head in heads):
        return False
    for name in [name for name in arrays if name.startswith(tuple(heads))]:
        del arrays[name]
    return True


def with_the_head_that_is_tied(arrays: Arrays, causal: Any) -> Arrays:
    """`arrays` with the embedding as the head too, where mlx-lm's model has a head of its own whatever config.json says
    (Qwen2-MoE); to be asked of a model that ties. The numbers are the same in memory."""
    named: list[tuple[str, mx.array]] = cast("Any", tree_flatten(causal.parameters()))
    heads = [name for name, _ in named if _HEAD.search(name) and name not in arrays]
    embedding = next((array for name, array in arrays.items() if _EMBEDDING.search(name)), None)
    if embedding is None:
        return arrays
    return {**arrays, **{name: mx.stop_gradient(embedding) for name in heads}}


def _below(module: str, arrays: Arrays) -> Arrays:
    """A module's weight, and the scales and biases of a packed one."""
    return {name.removeprefix(module): array for name, array in arrays.items() if name.startswith(module)}


def _are_equal(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(
        part.dtype == other[name].dtype and bool(mx.array_equal(part, other[name])) for name, part in one.items()
    )


def renamed(arrays: Arrays, causal: Any, source: ModelSource) -> Weights:
    """The tensors as `causal.sanitize` names, stacks and splits them.

    Raises ModelError QH-M50 for tensors that it drops, unless they belong to no layer of the language model.
    """
    names = {id(array): name for name, array in arrays.items()}
    before = dict(causal)
    try:
        kept = _sanitized(causal, arrays)
    except Exception as error:  # whatever mlx-lm raises over tensors it does not expect
        raise mismatch(source.name, missing=[str(error)], left=[]) from error
    after = dict(causal)
    origin = {
        name.removesuffix(".weight"): names[id(array)].removesuffix(".weight")
        for name, array in kept.items()
        if name.endswith(".weight") and id(array) in names
    }
    as_they_were = {names[id(array)] for array in kept.values() if id(array) in names}
    changed = [name for name in arrays if name not in as_they_were]
    outcome = _outcome(kept, names)

    def matters(group: list[str]) -> bool:
        dict.update(causal, before)
        # Copies, lazy as they are: some multiply what they get in place.
        copies = {name: mx.stop_gradient(array) for name, array in arrays.items() if name not in group}
        copied = {id(array): name for name, array in copies.items()}
        try:
            return _outcome(_sanitized(causal, copies), copied) != outcome
        except Exception:
            return True
        finally:
            for name in set(causal) - set(after):  # some take a tied head away
                dict.pop(causal, name)

    dropped = [name for group in _groups(changed) if not matters(group) for name in group]
    return Weights(kept, origin, source.name, _told(dropped, source))


def _sanitized(causal: Any, arrays: Arrays) -> Arrays:
    kept: Arrays = causal.sanitize(dict(arrays)) if hasattr(causal, "sanitize") else dict(arrays)
    return kept


def _outcome(kept: Arrays, names: Mapping[int, str]) -> dict[str, tuple[object, ...]]:
    return {name: (array.shape, array.dtype, names.get(id(array))) for name, array in kept.items()}


def _groups(changed: list[str]) -> list[list[str]]:
    """Tensors that only their numbers below the layer's tell apart: the experts of a layer become one tensor."""
    groups: dict[str, list[str]] = {}
    for name in changed:
        first, *_ = re.findall(r"\d+", name) or [""]
        groups.setdefault(f"{first} {re.sub(r'[0-9]+', '#', name)}", []).append(name)
    return [*groups.values()]


def _told(dropped: Collection[str], source: ModelSource) -> tuple[str, ...]:
    """Sentences on tensors that are left out rightly. Raises ModelError QH-M50 for any other."""
    found = text_config(source.facts.config).get("num_hidden_layers")
    layers = found if isinstance(found, int) else None
    towers = [name for name in dropped if _OTHER_TOWERS.search(name)]
    ahead = [name for name in dropped if name not in towers and _predicts_ahead(name, layers)]
    strange = sorted(set(dropped) - set(towers) - set(ahead))
    if strange:
        raise ModelError(
            "QH-M50",
            f"{len(strange)} stored tensors have no place in mlx-lm's model of {source.facts.architecture}: "
            f"{', '.join(strange[:5])}.",
            where=source.name,
            cause="Left out, the model would compute something else than was stored.",
            fix="Choose another backend for this model, or check that config.json belongs to these weights.",
            context={"left_over": strange},
        )
    return (f"{len(ahead)} tensors of layers that predict further tokens are left out.",) if ahead else ()


def _predicts_ahead(name: str, layers: int | None) -> bool:
    layer = _LAYER.search(name)
    beyond = layer is not None and layers is not None and int(layer[1]) >= layers
    return beyond or bool(_NEXT_TOKENS.search(name))


def mismatch(where: str, missing: list[str], left: list[str]) -> ModelError:
    return ModelError(
        "QH-M50",
        f"The checkpoint and its config.json do not match: {len(missing)} tensors missing "
        f"({', '.join(missing[:5]) or 'none'}), {len(left)} left over ({', '.join(left[:5]) or 'none'}).",
        where=where,
        fix="Check that config.json belongs to these weights.",
        context={"missing": missing, "left_over": left},
    )
