"""What a model folder says about its tokenizer: the Rust tokenizer, the named special tokens, the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_hal.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MORE_TEMPLATES = "additional_chat_templates"
"""The folder of a model's chat templates beside its default one."""
_DEFAULT = "default"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The contents of a folder. `named` maps bos_token, eos_token, ... to text; `eos_ids` come from the generation
    configuration; `adds_bos` is None where the folder leaves it to the tokenizer's post-processor. `template` is the
    one template or the one named default; `named_templates` are the others, such as tool_use."""

    tokenizer: Tokenizer
    named: Mapping[str, str]
    template: str | None
    eos_ids: tuple[int, ...]
    adds_bos: bool | None
    named_templates: Mapping[str, str] = field(default_factory=dict)


def read_folder(folder: Path) -> TokenizerFiles:
    """Raises ModelError (QH-D52) when the folder holds no tokenizer that can be read."""
    config = _json_object(folder / "tokenizer_config.json")
    named = {**_named(_json_object(folder / "special_tokens_map.json")), **_named(config)}
    if (folder / "tokenizer.json").is_file():
        tokenizer = _rust_tokenizer(folder / "tokenizer.json")
    else:
        tokenizer, found = _converted_tokenizer(folder)
        named = {**found, **named}
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _declare_special(tokenizer, config, named)
    adds_bos = config.get("add_bos_token")
    templates = _templates(folder, config)
    return TokenizerFiles(
        tokenizer,
        named,
        templates.pop(_DEFAULT, None),
        _eos_ids(folder),
        adds_bos if isinstance(adds_bos, bool) else None,
        templates,
    )


def broken(path: Path, reason: str) -> ModelError:
    """The error for a tokenizer that cannot be read (QH-D52)."""
    return ModelError(
        "QH-D52",
        f"The tokenizer cannot be read: {reason}.",
        where=str(path),
        fix="Download the model again, with its tokenizer.json and tokenizer_config.json.",
    )


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise broken(path, f"it is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise broken(path, "a JSON object was expected")
    return value


def _token_text(value: object) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _named(config: Mapping[str, object]) -> dict[str, str]:
    found = {name: _token_text(config.get(name)) for name in NAMED_TOKENS}
    return {name: text for name, text in found.items() if text is not None}


def _rust_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for every fault of the file
        raise broken(path, str(error)) from error


def _converted_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    """A tokenizer without tokenizer.json (SentencePiece, vocab + merges), converted by transformers; no remote code."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise broken(
            folder, "there is no tokenizer.json, and transformers, which could convert it, is missing"
        ) from error
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer = loaded.backend_tokenizer
    except Exception as error:  # converters raise many kinds
        raise broken(folder, f"there is no tokenizer.json, and the other files do not load ({error})") from error
    return tokenizer, _named(loaded.special_tokens_map)


def _declare_special(tokenizer: Tokenizer, config: Mapping[str, object], named: Mapping[str, str]) -> None:
    """Make every named token one token of its own, as transformers does when it loads the folder."""
    from tokenizers import AddedToken

    declared = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    listed = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    more = [_token_text(entry) for entry in listed] if isinstance(listed, list) else []
    for text in [*named.values(), *more]:
        if text is not None and text not in declared:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a model folder by name; `default` is the one that is used where none is named.

    Raises ModelError (QH-D52).
    """
    return _templates(folder, _json_object(folder / "tokenizer_config.json"))


def _templates(folder: Path, config: Mapping[str, object]) -> dict[str, str]:
    """The chat templates by name, from where transformers looks for them: files come before the configuration."""
    files = {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files[_DEFAULT] = folder / "chat_template.jinja"
    if files:
        return {name: _text_of_template(path) for name, path in files.items()}
    found: object = config.get("chat_template")
    if found is None:
        found = _json_object(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, Mapping)}
    named = found if isinstance(found, Mapping) else {_DEFAULT: found}
    return {str(name): text for name, text in named.items() if isinstance(text, str) and text}


def _text_of_template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise broken(path, not_utf8(error)) from error
    except OSError as error:
        raise broken(path, error.strerror or str(error)) from error


def not_utf8(error: UnicodeDecodeError) -> str:
    """Which byte of a text is not UTF-8, and where it stands; lines and columns count from 1."""
    before = error.object[: error.start]
    line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
    return f"byte 0x{error.object[error.start]:02x} on line {line}, column {column} is not UTF-8 text"


def _eos_ids(folder: Path) -> tuple[int, ...]:
    found = _json_object(folder / "generation_config.json").get("eos_token_id")
    if found is None:
        found = _json_object(folder / "config.json").get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return tuple(number for number in ids if isinstance(number, int) and not isinstance(number, bool) and number >= 0)
