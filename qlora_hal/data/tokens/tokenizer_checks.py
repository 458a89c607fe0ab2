"""tokenizer.json before the Rust library reads it: what a stranger can make large or slow with a few bytes.

The library makes room for the largest id, chains replacements that double a text, and leaves regular expressions to
backtracking; it aborts the process when memory runs out, which nothing in Python can catch.
"""

from __future__ import annotations

import base64
import math
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
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
MAX_ADDED_TOKENS, MAX_ADDED_LENGTH = 100_000, 1024
"""Tokens added to a vocabulary, and the characters of one. Models of speech add 65,536."""
MAX_ADDED_CHARACTERS = 2**18
"""Of all added tokens, what several begin with counted once: what the library makes a state of, in some 3 microseconds.
The 65,536 tokens `<|s_0|>`, `<|s_1|>`, ... have 208,000."""
_MAX_WORD, _MAX_PIECE = 256, 128
"""Characters of a word that WordPiece takes apart (published: 100), with a work of their third power, and of a piece of
a Unigram vocabulary (published: 16, some 48), each of which may be tried at every character."""
_MAX_CHARSMAP = 4 * 2**20
"""Of base64; that of NFKC, the largest published, has 320,000."""
_MAX_TEMPLATE_IDS = 1024
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
    for name in _CHAINS:
        _check_chain(name, content.get(name))
    _check_added_tokens(content.get("added_tokens"), _growth_of_chain(content.get("normalizer")))
    return content


def check_vocabulary(place: str, vocabulary: Mapping[str, Any]) -> None:
    """Raises HostileTokenizer where an id is too large."""
    _check_ids(place, vocabulary.values())


def check_added(place: str, texts: Collection[str], normalized: Collection[str] = (), growth: int = 1) -> None:
    """Raises HostileTokenizer where added tokens are too many or too long: those of `texts`, and the `normalized` ones,
    which the library makes up to `growth` times longer."""
    count = len(texts) + len(normalized)
    if count > MAX_ADDED_TOKENS:
        raise HostileTokenizer(f"{place} holds {count} tokens; the limit is {MAX_ADDED_TOKENS}")
    if (longest := max(map(len, (*texts, *normalized)), default=0)) > MAX_ADDED_LENGTH:
        raise HostileTokenizer(f"{place} holds a token of {longest} characters; the limit is {MAX_ADDED_LENGTH}")
    characters = _different_beginnings(texts) + growth * _different_beginnings(normalized)
    if characters > MAX_ADDED_CHARACTERS:
        raise HostileTokenizer(
            f"{place} holds tokens of {characters} characters, their common beginnings counted once; the limit is "
            f"{MAX_ADDED_CHARACTERS}"
        )


def _different_beginnings(texts: Iterable[str]) -> int:
    """The characters of texts, those that several begin with counted once."""
    count, before = 0, ""
    for text in sorted(texts):
        count += len(text) - _common_length(before, text)
        before = text
    return count


def _common_length(one: str, other: str) -> int:
    """How many characters two texts begin with alike, found in few comparisons."""
    sure, most = 0, min(len(one), len(other))
    while sure < most:
        tried = (sure + most + 1) // 2
        sure, most = (tried, most) if one[:tried] == other[:tried] else (sure, tried - 1)
    return sure


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
    if isinstance(word := model.get("max_input_chars_per_word"), int) and word > _MAX_WORD:
        raise HostileTokenizer(
            f"model.max_input_chars_per_word is {_number_shown(word)}; the largest that is read is {_MAX_WORD}"
        )
    if isinstance(vocabulary, list):
        pieces = (entry[0] for entry in vocabulary if isinstance(entry, list) and entry and isinstance(entry[0], str))
        if (longest := max(map(len, pieces), default=0)) > _MAX_PIECE:
            raise HostileTokenizer(f"model.vocab holds a piece of {longest} characters; the limit is {_MAX_PIECE}")


def _check_added_tokens(tokens: object, growth: int) -> None:
    entries = [token for token in tokens if isinstance(token, dict)] if isinstance(tokens, list) else []
    _check_ids("added_tokens", (token.get("id") for token in entries))
    texts: tuple[list[str], list[str]] = ([], [])
    for token in entries:
        if isinstance(text := token.get("content"), str):
            texts[token.get("normalized") is not False].append(text)
    check_added("added_tokens", *texts, growth)


def _check_ids(place: str, ids: Any) -> None:
    for number in ids:
        if isinstance(number, int) and not 0 <= number <= MAX_ID:
            raise HostileTokenizer(
                f"{place} holds the id {_number_shown(number)}; the largest that is read is {MAX_ID}"
            )


def _number_shown(number: int) -> str:
    return str(number) if number.bit_length() <= 64 else f"of {number.bit_length()} bits"


def _check_chain(name: str, chain: object) -> None:
    components = list(_components(chain))
    if len(components) > _MAX_COMPONENTS:
        raise HostileTokenizer(f"its {name} has more than {_MAX_COMPONENTS} parts")
    growth = _growth_of_chain(chain)
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
        if len(_charsmap(component)) > _MAX_CHARSMAP:
            raise HostileTokenizer(f"its {name} has a table of replacements of more than {_MAX_CHARSMAP} characters")
        if (count := _ids_of_template(component)) > _MAX_TEMPLATE_IDS:
            raise HostileTokenizer(f"its {name} adds {count} ids to a text; the limit is {_MAX_TEMPLATE_IDS}")


def _components(chain: object) -> Iterator[Mapping[str, Any]]:
    waiting = [chain]
    while waiting:
        component = waiting.pop()
        if isinstance(component, dict):
            yield component
            for inner in ("normalizers", "pretokenizers", "processors", "decoders"):
                if isinstance(parts := component.get(inner), list):
                    waiting.extend(parts)


def _growth_of_chain(chain: object) -> int:
    return math.prod(_growth(component) for component in _components(chain))


def _growth(component: Mapping[str, Any]) -> int:
    """Characters that a component may make of one, or how often it writes the whole text. ByteLevel writes one for each
    of its up to four bytes."""
    bytes_of_one = _MOST_BYTES_OF_ONE if component.get("type") == "ByteLevel" else 1
    copies = sum("Sequence" in piece for piece in _pieces_of_template(component))
    return bytes_of_one * max(1, copies) * math.prod(max(1, len(text)) for text in _written(component))


def _written(component: Mapping[str, Any]) -> Iterator[str]:
    """What a component puts in the place of a character, or beside it."""
    for name in ("content", "prepend", "replacement", "prefix", "suffix"):
        if isinstance(text := component.get(name), str):
            yield text
    yield _longest_replacement(_charsmap(component))


def _charsmap(component: Mapping[str, Any]) -> str:
    found = component.get("precompiled_charsmap")
    return found if isinstance(found, str) else ""


def _longest_replacement(charsmap: str) -> str:
    """What SentencePiece's table of replacements makes of one character at most.

    The table, in base64: the length of its trie in four bytes, the trie, and texts that end with NUL; a replacement is
    what stands from a place in them to the next NUL.
    """
    try:
        raw = base64.b64decode(charsmap[:_MAX_CHARSMAP])
    except ValueError:
        return ""  # the library says so
    texts = raw[4 + int.from_bytes(raw[:4], "little") :]
    return max(texts.split(b"\0"), key=len).decode("utf-8", "replace")


def _pieces_of_template(component: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a TemplateProcessing puts together for a text: sequences, which are the text, and special tokens."""
    single = component.get("single")
    return [piece for piece in single if isinstance(piece, dict)] if isinstance(single, list) else []


def _ids_of_template(component: Mapping[str, Any]) -> int:
    """How many ids a TemplateProcessing adds to a text."""
    tokens = component.get("special_tokens")
    known = tokens if isinstance(tokens, dict) else {}
    sizes = {
        name: len(token["ids"])
        for name, token in known.items()
        if isinstance(token, dict) and isinstance(token.get("ids"), list)
    }
    added = [piece["SpecialToken"].get("id") for piece in _pieces_of_template(component) if _adds_token(piece)]
    return sum(max(1, sizes.get(name, 0)) for name in added if isinstance(name, str))


def _adds_token(piece: Mapping[str, Any]) -> bool:
    return isinstance(piece.get("SpecialToken"), dict)


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
