"""What a model folder says about its tokenizer: the Rust tokenizer, the named special tokens, the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_hal import strict_json
from qlora_hal.data.guarded_tokenizer import broken, guarded, panics_told, read_tokenizer
from qlora_hal.errors import ModelError
from qlora_hal.strict_json import JsonProblem

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The contents of a folder. `named` maps bos_token, eos_token, ... to text; `eos_ids` come from the generation
    configuration; `adds_bos` is None where the folder leaves it to the tokenizer's post-processor."""

    tokenizer: Tokenizer
    named: Mapping[str, str]
    template: str | None
    eos_ids: tuple[int, ...]
    adds_bos: bool | None


def read_folder(folder: Path) -> TokenizerFiles:
    """Raises ModelError (QH-D52) when the folder holds no tokenizer that can be read, UnsafeInputError (QH-X15) when
    its tokenizer.json takes memory or time without reason."""
    config = _json_object(folder / "tokenizer_config.json")
    named = {**_named(_json_object(folder / "special_tokens_map.json")), **_named(config)}
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(folder / "tokenizer.json")
    else:
        tokenizer, found = _converted_tokenizer(folder)
        named = {**found, **named}
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _declare_special(tokenizer, config, named)
    adds_bos = config.get("add_bos_token")
    return TokenizerFiles(
        tokenizer,
        named,
        _template(folder, config),
        _eos_ids(folder),
        adds_bos if isinstance(adds_bos, bool) else None,
    )


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return strict_json.read_foreign_object(path)
    except (JsonProblem, OSError) as error:
        raise broken(path, f"it is no JSON ({error})") from error


def _token_text(value: object) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _named(config: Mapping[str, object]) -> dict[str, str]:
    found = {name: _token_text(config.get(name)) for name in NAMED_TOKENS}
    return {name: text for name, text in found.items() if text is not None}


def _converted_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    """A tokenizer without tokenizer.json (SentencePiece, vocab + merges), converted by transformers; no remote code."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise broken(
            folder, "there is no tokenizer.json, and transformers, which could convert it, is missing"
        ) from error
    try:
        with panics_told(folder):
            loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            tokenizer = loaded.backend_tokenizer
    except ModelError as error:
        raise broken(
            folder, f"there is no tokenizer.json, and the other files do not load ({error.__cause__})"
        ) from error
    return guarded(tokenizer, folder), _named(loaded.special_tokens_map)


def _declare_special(tokenizer: Tokenizer, config: Mapping[str, object], named: Mapping[str, str]) -> None:
    """Make every named token one token of its own, as transformers does when it loads the folder."""
    from tokenizers import AddedToken

    declared = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    listed = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    more = [_token_text(entry) for entry in listed] if isinstance(listed, list) else []
    new = dict.fromkeys(text for text in [*named.values(), *more] if text is not None and text not in declared)
    # All at once: the library builds its index anew with each call.
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in new])


def _template(folder: Path, config: Mapping[str, object]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    found: object = config.get("chat_template")
    if found is None:
        found = _json_object(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        by_name = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, Mapping)}
        found = by_name.get("default")
    return found if isinstance(found, str) and found else None


def _eos_ids(folder: Path) -> tuple[int, ...]:
    found = _json_object(folder / "generation_config.json").get("eos_token_id")
    if found is None:
        found = _json_object(folder / "config.json").get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return tuple(number for number in ids if isinstance(number, int) and not isinstance(number, bool) and number >= 0)
