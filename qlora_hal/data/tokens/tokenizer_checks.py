"""tokenizer.json before the Rust library reads it: what a stranger can make large or slow with a few bytes.

The library makes room for the largest id, chains replacements that double a text, and leaves regular expressions to
backtracking; it aborts the process when memory runs out, which nothing in Python can catch.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qlora_hal.files import strict_json
from qlora_hal.files.strict_json import JsonProblem

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENIZER_BYTES = 64 * 2**20
"""The largest published tokenizer.json have about 35 MB (Gemma 3)."""
MAX_VALUES = 4_000_000
MAX_ID = 2**22 - 1
"""Sixteen times the largest published vocabularies."""
MAX_GROWTH = 64
"""How many characters the replacements of one chain may make of one."""
_MAX_COMPONENTS = 64
_MOST_BYTES_OF_ONE = 4
_MAX_AFFIX = 256
_MAX_PATTERN = 8192
_MAX_STRIPPED = 2**16
_CHAINS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_SECONDS_OF_TRIAL = 0.25
_TRIAL_LENGTH = 64
_MOST_TRIALS = 48
_USUAL = ("a", "A", "1", " ", "\n", "é", "漢", ".", " a", "a1", "\n ", "'s")


class HostileTokenizer(Exception):
    """Why a tokenizer is refused; the end of a sentence."""


def checked(raw: bytes) -> Mapping[str, Any]:
    """The content of a tokenizer.json that may be handed to the library.

    Raises JsonProblem when it is not JSON or none of a tokenizer, HostileTokenizer when it is one that takes memory or
    time without reason.
    """
    content = strict_json.decode_foreign(raw, most_bytes=MAX_TOKENIZER_BYTES, most_values=MAX_VALUES)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise JsonProblem("an object with a model is expected")
    _check_model(content["model"])
    _check_added_tokens(content.get("added_tokens"))
    for name in _CHAINS:
        _check_chain(name, content.get(name))
    return content


def refuse_slow_or_broken(tokenizer: Tokenizer, content: Mapping[str, Any]) -> None:
    """Encode and decode short texts made of what the regular expressions of the tokenizer hold.

    Raises HostileTokenizer where one takes long, and the library's PanicException.
    """
    words, signs = _words_and_signs(content)
    trials = ["a b é 漢 \n"]
    # An expression takes long where it fails late; some fail at once where a sign that they need is nowhere.
    trials += [(piece * _TRIAL_LENGTH)[:_TRIAL_LENGTH] + "\x01" + signs + "!a" for piece in (*_USUAL, *words, *signs)]
    for text in trials[:_MOST_TRIALS]:
        started = time.thread_time()
        with suppress(Exception):  # what the vocabulary does not know is told of the row that has it
            ids = tokenizer.encode(text, add_special_tokens=True).ids
            tokenizer.decode(ids[:16], skip_special_tokens=False)
        if time.thread_time() - started > _SECONDS_OF_TRIAL:
            raise HostileTokenizer(f"a string of {len(text)} characters takes it more than {_SECONDS_OF_TRIAL} seconds")


def _check_model(model: Mapping[str, Any]) -> None:
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        _check_ids("model.vocab", vocabulary.values())
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if isinstance(affix := model.get(name), str) and len(affix) > _MAX_AFFIX:
            raise HostileTokenizer(f"model.{name} has {len(affix)} characters; the limit is {_MAX_AFFIX}")


def _check_added_tokens(tokens: object) -> None:
    if isinstance(tokens, list):
        _check_ids("added_tokens", (token.get("id") for token in tokens if isinstance(token, dict)))


def _check_ids(place: str, ids: Any) -> None:
    for number in ids:
        if isinstance(number, int) and not 0 <= number <= MAX_ID:
            shown = number if number.bit_length() <= 64 else f"of {number.bit_length()} bits"
            raise HostileTokenizer(f"{place} holds the id {shown}; the largest that is read is {MAX_ID}")


def _check_chain(name: str, chain: object) -> None:
    components = list(_components(chain))
    if len(components) > _MAX_COMPONENTS:
        raise HostileTokenizer(f"its {name} has more than {_MAX_COMPONENTS} parts")
    growth = math.prod(_growth(component) for component in components)
    if growth > MAX_GROWTH:
        raise HostileTokenizer(f"its {name} makes up to {growth:.3g} characters of one; the limit is {MAX_GROWTH}")
    for component in components:
        if len(_regex(component)) > _MAX_PATTERN:
            raise HostileTokenizer(f"its {name} has a regular expression of more than {_MAX_PATTERN} characters")
        if re.search(r"\\[gk][<']|\\[1-9]|\(\?\(|\(\?~|\(\?R", _regex(component)):
            raise HostileTokenizer(f"its {name} has a regular expression that refers to itself or to what it matched")
        for counted in ("start", "stop"):
            if isinstance(count := component.get(counted), int) and count > _MAX_STRIPPED:
                raise HostileTokenizer(f"its {name} strips {counted} more than {_MAX_STRIPPED} characters")


def _components(chain: object) -> Iterator[Mapping[str, Any]]:
    waiting = [chain]
    while waiting:
        component = waiting.pop()
        if isinstance(component, dict):
            yield component
            for inner in ("normalizers", "pretokenizers", "processors", "decoders"):
                if isinstance(parts := component.get(inner), list):
                    waiting.extend(parts)


def _growth(component: Mapping[str, Any]) -> int:
    """Characters that a component may make of one. ByteLevel writes one for each of its up to four bytes."""
    bytes_of_one = _MOST_BYTES_OF_ONE if component.get("type") == "ByteLevel" else 1
    return bytes_of_one * math.prod(max(1, len(text)) for text in _written(component))


def _written(component: Mapping[str, Any]) -> Iterator[str]:
    """What a component puts in the place of a character, or beside it."""
    for name in ("content", "prepend", "replacement", "prefix", "suffix"):
        if isinstance(text := component.get(name), str):
            yield text


def _regex(component: Mapping[str, Any]) -> str:
    pattern = component.get("pattern")
    found = pattern.get("Regex") if isinstance(pattern, dict) else None
    return found if isinstance(found, str) else ""


def _words_and_signs(content: Mapping[str, Any]) -> tuple[list[str], str]:
    """The words and the single characters that stand in the tokenizer's own expressions."""
    words: dict[str, None] = {}
    signs: dict[str, None] = {}
    for chain in (content.get(name) for name in _CHAINS):
        for component in _components(chain):
            plain = re.sub(r"\\[pPxuU]\{[^}]*\}|\\.", " ", _regex(component))
            words.update(dict.fromkeys(re.findall(r"[^\W_]{2,8}", plain)))
            signs.update(dict.fromkeys(re.findall(r"[^\s\[\](){}|*+?^$\\]", plain)))
    return list(words), "".join(signs)[:_TRIAL_LENGTH]
