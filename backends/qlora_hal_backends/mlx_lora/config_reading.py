"""config.json as transformers reads it, in the words of mlx-lm.

mlx-lm reads config.json with defaults of its own, and under the names that models had when they were published. What a
key means, what it is when it is absent and which older names it has are transformers' to say, so its configuration
class is asked (it needs no torch), and mlx-lm's `ModelArgs` get the answers. A key that transformers' code of a model
does not read has no effect there, so it has none here, whatever `ModelArgs` would make of it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from qlora_hal.model.facts import text_config

Config = Mapping[str, Any]


def as_transformers_reads(config: Config) -> dict[str, Any]:
    """`config` with all defaults and under transformers' own names, without what transformers' code of the model does
    not read; as it is where transformers knows no such model.

    Raises ValueError, with transformers' words, for a config.json that it refuses.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = _kind(config)
    if kind not in CONFIG_MAPPING:
        return dict(config)
    with _quiet("transformers"):
        try:
            read: dict[str, Any] = CONFIG_MAPPING[kind].from_dict({**_numbers(config), "model_type": kind}).to_dict()
        except Exception as error:  # its validators raise classes of other libraries
            raise ValueError(f"{type(error).__name__}: {error}") from error
    return _only_read(read)


def _kind(config: Config) -> str:
    """The model_type that transformers reads a config.json as: its AutoConfig takes a Mistral with kinds of layers for
    a Ministral."""
    kind = str(config.get("model_type"))
    return "ministral" if kind == "mistral" and "layer_types" in config else kind


def _only_read(read: Config) -> dict[str, Any]:
    """transformers keeps unknown keys as attributes that nothing looks at."""
    known = keys_read(str(read.get("model_type")))
    return {
        key: _only_read(value) if isinstance(value, Mapping) and "model_type" in value else value
        for key, value in read.items()
        if known is None or key in known
    }


_READ_BY_CONFIG = re.compile(r"""\bself\.(\w+)|\bkwargs\.\w+\(\s*["'](\w+)""")
_READ_BY_MODEL = re.compile(r"""\bconfig\.(\w+)|\bgetattr\(\s*[\w.]*config,\s*["'](\w+)""")


@cache
def keys_read(model_type: str) -> frozenset[str] | None:
    """Keys of config.json that transformers reads for this kind of model: those that its configuration class declares,
    and those that the class or the model's code asks for beside them (OLMo 2's `head_dim`). None: it knows no such
    model. The sources are read as text, so that torch is not needed."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return None
    kind = CONFIG_MAPPING[model_type]
    own = [one for one in kind.__mro__ if one.__module__.startswith("transformers.models.")]
    found = {field.name for field in dataclasses.fields(kind)} | {*kind.attribute_map, *kind.attribute_map.values()}
    found |= {key for one in own for pair in _READ_BY_CONFIG.findall(inspect.getsource(one)) for key in pair}
    file = Path(inspect.getfile(kind))
    modeling = file.with_name(file.name.replace("configuration_", "modeling_"))
    code = modeling.read_text(encoding="utf-8") if modeling.is_file() else ""
    return frozenset(found | {key for pair in _READ_BY_MODEL.findall(code) for key in pair} | {"model_type"})


def _numbers(value: Any) -> Any:
    """Infinity, which JSON has no number for, as transformers writes it: `{"__float__": "Infinity"}`."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if set(value) == {"__float__"} else {k: _numbers(v) for k, v in value.items()}
    return [*map(_numbers, value)] if isinstance(value, list) else value


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Its advice is for whoever calls transformers."""
    found = logging.getLogger(logger)
    before, found.disabled = found.level, False
    found.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        found.setLevel(before)


def in_words_of_mlx_lm(config: Config, read: Config, arguments_class: type[Any]) -> dict[str, Any]:
    """Values for the fields of `arguments_class`, as transformers has `read` them; as config.json gives them where
    mlx-lm cannot do without and transformers does not say."""
    given, meant = text_config(_numbers(config)), text_config(_numbers(read))
    aliases = _aliases(str(config.get("model_type")), str(given.get("model_type")))
    fields = inspect.signature(arguments_class).parameters
    asked = [name for name, field in fields.items() if field.default is field.empty]
    kept = {key for key in given if key in asked or key not in _not_read(config, fields)}
    words = {key: given[key] for key in kept - _ROTARY_KEYS if given[key] is not None}
    words |= {**meant, **_by_other_names(meant, aliases), **_rotary_words(meant), **_derived_words(meant, asked)}
    words["model_type"] = config.get("model_type", "")
    words |= _own_spellings(words)
    if "text_config" in fields:
        words["text_config"] = {**words, "model_type": given.get("model_type", "")}
    return {key: value for key, value in words.items() if key in fields}


def notes_on_keys_not_read(config: Config, arguments_class: type[Any]) -> tuple[str, ...]:
    """Sentences for the user, on keys that mlx-lm would heed and transformers does not."""
    given, fields = text_config(config), inspect.signature(arguments_class).parameters
    return tuple(
        f"config.json has {key} = {json.dumps(given[key])[:60]}, which transformers does not read for this kind of "
        "model: it has no effect"
        for key in sorted(_not_read(config, fields))
        if given[key] is not None and given[key] != fields[key].default
    )


def _not_read(config: Config, fields: Mapping[str, inspect.Parameter]) -> set[str]:
    """Keys of config.json that are fields of mlx-lm's and that transformers does not read."""
    given = text_config(config)
    known = [keys_read(_kind(part)) for part in (config, given)]
    if None in known:
        return set()
    read = frozenset().union(*(keys for keys in known if keys is not None))
    return {key for key in given if key in fields and key not in read | _ROTARY_KEYS}


def tied_words(words: Config, is_tied: bool) -> dict[str, Any]:
    """The words that tie the head or do not. mlx-lm ties some models by default where transformers does not."""
    own = {"tie_word_embeddings": is_tied}
    nested = words.get("text_config")
    return own if nested is None else {**own, "text_config": {**nested, **own}}


_ROTARY_KEYS = frozenset({"rope_scaling", "rope_theta", "rope_parameters"})


def _aliases(*model_types: str) -> dict[str, str]:
    """Other name -> transformers' own name of a key, for these kinds of model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found: dict[str, str] = {}
    for model_type in model_types:
        if model_type in CONFIG_MAPPING:
            found |= CONFIG_MAPPING[model_type].attribute_map
    return found


def _by_other_names(meant: Config, aliases: Mapping[str, str]) -> dict[str, Any]:
    both = [*aliases.items(), *((own, other) for other, own in aliases.items())]
    return {one: meant[other] for one, other in both if other in meant and one not in meant}


def _rotary_words(meant: Config) -> dict[str, Any]:
    """transformers 5 keeps all of rotary position in `rope_parameters`, once or for each kind of layer."""
    rope = meant.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return {}
    by_layer = {kind: given for kind, given in rope.items() if isinstance(given, Mapping)}
    whole = by_layer.get("full_attention", {}) if by_layer else rope
    theta = whole.get("rope_theta")
    words: dict[str, Any] = {"rope_parameters": rope, "rope_theta": theta, "rotary_emb_base": theta}
    share = whole.get("partial_rotary_factor")
    words |= {} if share is None else {"partial_rotary_factor": share, "rotary_pct": share, "rope_pct": share}
    kind = whole.get("rope_type", "default")
    scaling = {key: value for key, value in whole.items() if key != "rope_theta" and value is not None}
    words["rope_scaling"] = None if kind == "default" else {**scaling, "type": kind, "rope_type": kind}
    if "original_max_position_embeddings" in whole:
        words["original_max_position_embeddings"] = whole["original_max_position_embeddings"]
    local = by_layer.get("sliding_attention", {}).get("rope_theta")
    return words if local is None else {**words, "rope_local_base_freq": local}


def _derived_words(meant: Config, asked: Collection[str]) -> dict[str, Any]:
    """What mlx-lm asks for and config.json says otherwise, or need not say."""
    heads, hidden = meant.get("num_attention_heads"), meant.get("hidden_size")
    words: dict[str, Any] = {}
    if isinstance(heads, int) and isinstance(hidden, int) and heads and meant.get("head_dim") is None:
        words["head_dim"] = hidden // heads
    for word, derived in _DERIVED.items():
        if word in asked and word not in meant and (value := derived(meant)) is not None:
            words[word] = value
    return words


def _own_spellings(words: Config) -> dict[str, Any]:
    """Kinds of layers, as some of mlx-lm's models spell them."""
    kinds = words.get("layer_types")
    if not isinstance(kinds, list):
        return {}
    if words["model_type"] == "granitemoehybrid":
        spelled = {"linear_attention": "mamba", "full_attention": "attention"}
        positions = words.get("position_embedding_type") or "nope"
        return {"layer_types": [spelled.get(kind, kind) for kind in kinds], "position_embedding_type": positions}
    if words["model_type"] == "exaone4":
        pattern = "".join("L" if kind == "sliding_attention" else "G" for kind in kinds)
        return {"sliding_window_pattern": pattern if words.get("sliding_window") else None}
    return {}


_DERIVED: Mapping[str, Callable[[Config], Any]] = {
    "n_ctx": lambda meant: meant.get("n_positions"),
    "block_dim": lambda meant: meant.get("hidden_size"),
    # Asked for, and not used.
    "mlp_bias": lambda meant: False,
    "post_norm": lambda meant: False,
    "qk_norm": lambda meant: True,
    "shared_intermediate_size": lambda meant: 0,
    "intermediate_size": lambda meant: _product(meant, "expand", "hidden_size"),
    "rotary_dim": lambda meant: _rotated(meant) if meant.get("num_attention_heads") else None,
    "is_moe_layer": lambda meant: _where(meant.get("mlp_layer_types"), "sparse"),
}


def _product(meant: Config, *names: str) -> int | None:
    values = [value for name in names if isinstance(value := meant.get(name), int)]
    return math.prod(values) if len(values) == len(names) else None


def _rotated(meant: Config) -> int | None:
    """How many of a head's dimensions rotate."""
    size = meant.get("head_dim") or meant["hidden_size"] // meant["num_attention_heads"]
    share = _rotary_words(meant).get("partial_rotary_factor", 1.0)
    return int(size * share)


def _where(kinds: Iterable[str] | None, kind: str) -> list[bool] | None:
    return None if kinds is None else [one == kind for one in kinds]
