"""Where transformers 5 would not read tokenizer.json as it stands, and what that changes.

From the vocabulary and the merges of tokenizer.json, transformers 5 builds the tokenizer of some classes anew, with the
normalizer and the pre-tokenizer that the class has there. A model was trained with those of its own tokenizer.json, and
their meaning does not change with a library's version, so they are what is used here. Where the two would cut a text
into other tokens, the user is told, with an example: `<s>[INST]` of a Llama 2 is `<s> ▁[INST]` in its tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from qlora_hal.files import strict_json
from qlora_hal.files.strict_json import JsonProblem

_SPECIAL = "<s>"
_PROBES = (
    "a b",
    f"{_SPECIAL}a",
    f"{_SPECIAL} a",
    f"{_SPECIAL}\na",
    " a",
    "a  b\n\nc",
    "it's 123, A.b!",
    "e\u0301 日本",
)
"""Texts in which the pipelines of these classes differ, the plainest first; checked against transformers by a test."""

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_AS_IT_STANDS = frozenset(
    {"mistral", "mixtral", "phi3", "phimoe", "granite", "stablelm", "persimmon", "glm", "glm4", "olmo2", "internlm2"}
)
"""Models for which transformers 5.23 reads tokenizer.json as it stands, whatever class the folder names."""
_ALWAYS = {"qwen2": "Qwen2Tokenizer"}
_OF_MODEL = {
    **dict.fromkeys(("qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("gpt2", "phi", "starcoder2", "gptj", "codegen"), "GPT2Tokenizer"),
    **dict.fromkeys(("gpt_neox", "olmo", "mpt"), "GPTNeoXTokenizer"),
}
"""The class of models whose folder names none."""


def rebuilding_notes(folder: Path, tokenizer: Tokenizer, config: Mapping[str, object]) -> list[str]:
    """A note where transformers 5.23 would give some text other tokens than tokenizer.json does; else none."""
    name = _class_of(folder, config)
    if name not in _PIPELINES or type(tokenizer.model).__name__ != "BPE":
        return []
    if name == "LlamaTokenizer" and b"ByteLevel" in _state(tokenizer.pre_tokenizer):
        return []
    ours, theirs = _characters(tokenizer.normalizer, tokenizer.pre_tokenizer), _characters(*_PIPELINES[name](config))
    probe = next((text for text in _PROBES if _pieces(ours, text) != _pieces(theirs, text)), None)
    if probe is None:
        return []
    cut, rebuilt = (" ".join(_pieces(tokenizer, probe)) for tokenizer in (ours, theirs))
    return [
        f"tokenizer.json is used unchanged; transformers 5 rebuilds {name} and may give other ids: it splits "
        f"{probe!r} into {rebuilt}, where tokenizer.json has {cut}. To use the trained ids there, set "
        "tokenizer_class to PreTrainedTokenizerFast in tokenizer_config.json"
    ]


def _class_of(folder: Path, config: Mapping[str, object]) -> str:
    """The class that transformers 5.23 loads the folder with, as far as it is one of those below."""
    try:
        model = strict_json.read_foreign_object(folder / "config.json")
    except (OSError, JsonProblem):
        model = {}
    family = str(model.get("model_type"))
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    if family in _ALWAYS or family in _AS_IT_STANDS:
        return _ALWAYS.get(family, "")
    return str(named).removesuffix("Fast") if named else _OF_MODEL.get(family, "")


def _state(part: Any) -> bytes:
    return bytes(part.__getstate__()) if part is not None else b""


def _characters(normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    """A tokenizer of single characters, which shows what comes out of the two and where it is cut."""
    signs = sorted({*pre_tokenizers.ByteLevel.alphabet(), "▁", "\u0301", *"".join(_PROBES), "é"})
    tokenizer = Tokenizer(models.BPE(vocab={sign: number for number, sign in enumerate(signs)}, merges=[]))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens([AddedToken(_SPECIAL, special=True, normalized=False)])
    return tokenizer


def _pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    pieces: list[str] = []
    before: object = ()
    for token, word in zip(encoding.tokens, encoding.word_ids, strict=True):
        if word != before or token == _SPECIAL:
            pieces.append("")
        pieces[-1] += token
        before = word
    return pieces


# the pipelines of the classes, as transformers 5.23 builds them -------------------------------------------------------


def _llama(config: Mapping[str, object]) -> tuple[Any, Any]:
    scheme = "always" if config.get("legacy") else "first"
    scheme = "never" if config.get("add_prefix_space") is False else scheme
    return None, pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)


def _qwen(config: Mapping[str, object]) -> tuple[Any, Any]:
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space") is True, use_regex=False)
    return normalizers.NFC(), pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN), "isolated"), bytes_of])


def _gpt2(config: Mapping[str, object]) -> tuple[Any, Any]:
    return None, pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space") is True)


def _gpt_neox(config: Mapping[str, object]) -> tuple[Any, Any]:
    return normalizers.NFC(), _gpt2(config)[1]


def _gemma(config: Mapping[str, object]) -> tuple[Any, Any]:
    return normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")


_PIPELINES: Mapping[str, Callable[[Mapping[str, object]], tuple[Any, Any]]] = {
    "LlamaTokenizer": _llama,
    "Qwen2Tokenizer": _qwen,
    "GPT2Tokenizer": _gpt2,
    "GPTNeoXTokenizer": _gpt_neox,
    "GemmaTokenizer": _gemma,
}
