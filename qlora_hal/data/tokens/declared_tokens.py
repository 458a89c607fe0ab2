"""Tokens that a folder declares beside tokenizer.json, each made one token with the id that transformers gives it.

`tokenizer_config.json` lists them in `added_tokens_decoder`; older folders have `added_tokens.json` and
`special_tokens_map.json`, which are read where that list is absent. What has no id in tokenizer.json gets the next free
one, in the order of the declared ids; where that is another id than the declared one, the folder is refused: the
embedding of that token stands elsewhere in the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken

from qlora_hal.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True, slots=True)
class Declared:
    """`named` are bos_token, eos_token, ...; `listed` are tokens by id, `more` those with neither."""

    named: Mapping[str, AddedToken]
    listed: Mapping[int, AddedToken]
    more: Sequence[AddedToken]
    notes: tuple[str, ...] = ()


def declared_in(
    config: Mapping[str, object], special_map: Mapping[str, object], added: Mapping[str, object], where: Path
) -> Declared:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json declare together.

    Raises ModelError (QH-D52) for an entry that is no token with an id.
    """
    listed = config.get("added_tokens_decoder")
    older = not isinstance(listed, Mapping)
    # transformers reads the map only where the list is absent, and then over the configuration.
    first, second = (special_map, config) if older else (config, special_map)
    named, more, notes = _named(first, second), _more(config), []
    if not isinstance(listed, Mapping):
        differing = [name for name, token in named.items() if _text(config.get(name)) not in (None, token.content)]
        notes = [
            f"special_tokens_map.json names the {name} {named[name].content!r}, which is used" for name in differing
        ]
        special = {token.content for token in (*named.values(), *more)}
        tokens = {
            number: _token(text, special=text in special) for text, number in added.items() if type(number) is int
        }
        if len(tokens) != len(added):
            raise _unusable(where / "added_tokens.json", added)
        more += _more(special_map)
    else:
        tokens = {_number(number, where): _listed_token(token, where) for number, token in listed.items()}
    return Declared(named, tokens, more, tuple(notes))


def declare(tokenizer: Tokenizer, declared: Declared, where: Path) -> list[str]:
    """Make every declared token one token of its own; notes on ids that tokenizer.json gives otherwise.

    Raises ModelError (QH-D52) where a token would get another id than the one it is declared with.
    """
    known = {token.content: tokenizer.token_to_id(token.content) for token in declared.listed.values()}
    special = {token.content for token in declared.named.values()}
    tokens = [_as_special(token, special) for _, token in sorted(declared.listed.items())]
    present = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    present.update((token.content, token) for token in tokens)
    for token in (*declared.named.values(), *declared.more):
        held = present.get(token.content)
        if held is None or not held.special:
            tokens.append(token if held is None else _as_special(held, {token.content}))
            present[token.content] = tokens[-1]
    tokenizer.add_tokens(tokens)
    notes = []
    for number, token in declared.listed.items():
        found = tokenizer.token_to_id(token.content)
        if found != number and known[token.content] is None:
            raise _other_id(where, token.content, number, found)
        if found != number:
            notes.append(
                f"tokenizer_config.json gives {token.content!r} the id {number}; tokenizer.json has {found}, "
                "which is used, as transformers does"
            )
    return notes


def _as_special(token: AddedToken, names: Iterable[str]) -> AddedToken:
    return token if token.special or token.content not in names else _token(token.content, special=True, of=token)


def _token(text: str, *, special: bool, of: AddedToken | Mapping[str, object] | None = None) -> AddedToken:
    flags: dict[str, bool] = {"normalized": not special}
    if isinstance(of, Mapping):
        flags |= {name: value for name in _FLAGS if isinstance(value := of.get(name), bool)}
    elif of is not None:
        flags |= {name: getattr(of, name) for name in _FLAGS}
    return AddedToken(text, special=special, **flags)


def _text(value: object) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _named(first: Mapping[str, object], second: Mapping[str, object]) -> dict[str, AddedToken]:
    """The named tokens, those of one model alone (`image_token`) behind the usual ones."""
    both = {**second, **first}
    own = [key for key, held in both.items() if key.endswith("_token") and key not in NAMED_TOKENS and _text(held)]
    given = {name: first[name] if _text(first.get(name)) else second.get(name) for name in [*NAMED_TOKENS, *own]}
    extra = both.get("extra_special_tokens")
    given |= {str(name): held for name, held in extra.items()} if isinstance(extra, dict) else {}
    return {name: _special(held, text) for name, held in given.items() if (text := _text(held)) is not None}


def _more(config: Mapping[str, object]) -> list[AddedToken]:
    listed = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    entries = listed if isinstance(listed, list) else []
    return [_special(entry, text) for entry in entries if (text := _text(entry)) is not None]


def _special(entry: object, text: str) -> AddedToken:
    return _token(text, special=True, of=entry if isinstance(entry, Mapping) else None)


def _number(number: object, where: Path) -> int:
    try:
        return int(str(number))
    except ValueError as error:
        raise _unusable(where / "tokenizer_config.json", number) from error


def _listed_token(token: object, where: Path) -> AddedToken:
    text = _text(token)
    if not isinstance(token, Mapping) or text is None:
        raise _unusable(where / "tokenizer_config.json", token)
    return _token(text, special=token.get("special") is True, of=token)


def _unusable(path: Path, entry: object) -> ModelError:
    return ModelError(
        "QH-D52",
        f"A declared token cannot be read: {str(entry)[:80]!r}; a string with an id was expected.",
        where=str(path),
        fix="Download the tokenizer's files again, all from one revision.",
    )


def _other_id(where: Path, text: str, number: int, found: int | None) -> ModelError:
    return ModelError(
        "QH-D52",
        f"The folder declares the token {text!r} with id {number}; tokenizer.json does not have it, "
        f"and its next free id is {found}.",
        where=str(where / "tokenizer_config.json"),
        cause="tokenizer.json and tokenizer_config.json belong to different versions of the tokenizer.",
        fix="Download the tokenizer's files again, all from one revision.",
        context={"token": text, "declared": number},
    )
