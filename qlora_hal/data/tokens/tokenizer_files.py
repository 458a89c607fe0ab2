"""What a model folder says about its tokenizer: the Rust tokenizer, the named special tokens, the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_hal.data.template.chat_template import read_template
from qlora_hal.data.tokens.declared_tokens import declare, declared_in
from qlora_hal.data.tokens.guarded_tokenizer import broken, converted, hostility_told, panics_told, read_tokenizer
from qlora_hal.data.tokens.rebuilt_tokenizers import rebuilding_notes
from qlora_hal.data.tokens.tokenizer_checks import MAX_TOKENIZER_BYTES, MAX_VALUES, check_added, check_vocabulary
from qlora_hal.errors import ModelError
from qlora_hal.files import strict_json
from qlora_hal.files.opening import kind_there, read_stored
from qlora_hal.files.strict_json import JsonProblem

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MORE_TEMPLATES = "additional_chat_templates"
"""The folder of a model's chat templates beside its default one."""
_DEFAULT = "default"
_READ_BY_CONVERSION = frozenset({".json", ".txt", ".model", ".bpe", ".spm", ".tiktoken", ".vocab"})
_VOCABULARIES = ("vocab.json", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The contents of a folder. `named` maps bos_token, eos_token, ... to text; `eos_ids` come from the generation
    configuration. `template` is the one template or the one named default; `named_templates` are the others, such as
    tool_use. `notes` say what of the folder is read otherwise than it may seem."""

    tokenizer: Tokenizer
    named: Mapping[str, str]
    template: str | None
    eos_ids: tuple[int, ...]
    named_templates: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_folder(folder: Path) -> TokenizerFiles:
    """Raises ModelError (QH-D52) when the folder holds no tokenizer that can be read, UnsafeInputError (QH-X15) when
    it takes memory or time without reason, UnsafeInputError (QH-X04) for a chat template that is too large."""
    config = _json_object(folder / "tokenizer_config.json")
    _refuse_split_special_tokens(folder, config)
    special_map, added = (_json_object(folder / name) for name in ("special_tokens_map.json", "added_tokens.json"))
    try:
        declared = declared_in(config, special_map, added, folder)
    except UnicodeEncodeError as error:
        raise broken(folder / "tokenizer_config.json", "it declares a token that is not Unicode text") from error
    with hostility_told(folder / "tokenizer_config.json"):
        check_added("the folder", {token.content for token in (*declared.named.values(), *declared.more)})
        check_added("the folder", {token.content for token in declared.listed.values()})
    named, notes = {name: token.content for name, token in declared.named.items()}, list(declared.notes)
    if _is_there(folder / "tokenizer.json"):
        tokenizer = read_tokenizer(folder / "tokenizer.json")
        notes += [*rebuilding_notes(folder, tokenizer, config), *_bos_notes(tokenizer, config, named)]
    else:
        tokenizer, found = _converted_tokenizer(folder)
        named = {**found, **named}
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
        notes.append("tokenizer.json drops merges at random (dropout); encoding is deterministic here")
    notes += declare(tokenizer, declared, folder)
    templates = _templates(folder, config)
    template = templates.pop(_DEFAULT, None)
    return TokenizerFiles(tokenizer, named, template, _eos_ids(folder), templates, tuple(notes))


def _bos_notes(tokenizer: Tokenizer, config: Mapping[str, object], named: Mapping[str, str]) -> list[str]:
    """A note where tokenizer_config.json says of the bos what tokenizer.json's post-processor does not do."""
    says, bos = config.get("add_bos_token"), tokenizer.token_to_id(named.get("bos_token", ""))
    does = bos is not None and bos in tokenizer.encode("a", add_special_tokens=True).ids
    if not isinstance(says, bool) or says == does:
        return []
    return [
        f"tokenizer_config.json has add_bos_token {str(says).lower()}; tokenizer.json "
        f"{'puts' if does else 'does not put'} bos before a text, and is used, as in transformers 5"
    ]


def _refuse_split_special_tokens(folder: Path, config: Mapping[str, object]) -> None:
    if config.get("split_special_tokens") is True:
        raise ModelError(
            "QH-D52",
            "tokenizer_config.json sets split_special_tokens; unsplit special tokens were expected.",
            where=str(folder / "tokenizer_config.json"),
            cause="With it the special tokens of a chat template could not be told from text.",
            fix="Set it to false in a copy of the folder.",
        )


def _is_there(path: Path) -> bool:
    """Whether the folder has this file. One that cannot be read is not taken for absent: in a cache that was cleaned,
    links to files that are gone stay, and without its template a model would be trained on another text."""
    kind = kind_there(path)
    if kind not in ("", "a regular file"):
        raise broken(path, f"{path.name} is {kind}")
    return bool(kind)


def _json_object(path: Path) -> dict[str, Any]:
    if not _is_there(path):
        return {}
    try:
        return strict_json.read_foreign_object(path)
    except (JsonProblem, OSError) as error:
        raise broken(path, f"it is not JSON ({error})") from error


def _converted_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    """A tokenizer without tokenizer.json (SentencePiece, vocab + merges), converted by transformers; no remote code.

    What the conversion reads is checked before it, what it makes behind it: ModelError (QH-D52), UnsafeInputError
    (QH-X15).
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise broken(
            folder, "there is no tokenizer.json, and transformers, which could convert it, is missing"
        ) from error
    _check_what_is_converted(folder)
    try:
        with panics_told(folder):
            loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            tokenizer = loaded.backend_tokenizer
    except ModelError as error:
        raise broken(
            folder, f"there is no tokenizer.json, and the other files do not load ({error.__cause__})"
        ) from error
    named = {name: str(text) for name, text in loaded.special_tokens_map.items() if isinstance(text, str)}
    return converted(tokenizer, folder), named


def _check_what_is_converted(folder: Path) -> None:
    """Raises ModelError (QH-D52) for a file that is none or too large, UnsafeInputError (QH-X15) for an id."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in _READ_BY_CONVERSION:
            continue
        try:
            size = path.stat().st_size
            if not path.is_file() or size > MAX_TOKENIZER_BYTES:
                reason = f"it has {size} bytes, at most {MAX_TOKENIZER_BYTES} are read"
                raise broken(path, reason if path.is_file() else "it is not a regular file")
            if path.name in _VOCABULARIES:
                raw = read_stored(path, MAX_TOKENIZER_BYTES)
                vocabulary = strict_json.decode_foreign(raw, most_bytes=MAX_TOKENIZER_BYTES, most_values=MAX_VALUES)
                with hostility_told(path):
                    check_vocabulary(path.name, vocabulary if isinstance(vocabulary, dict) else {})
        except (JsonProblem, OSError) as error:
            raise broken(path, str(getattr(error, "strerror", None) or error)) from error


def chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a model folder by name; `default` is the one that is used where none is named.

    Raises ModelError (QH-D52).
    """
    return _templates(folder, _json_object(folder / "tokenizer_config.json"))


def _templates(folder: Path, config: Mapping[str, object]) -> dict[str, str]:
    """The chat templates by name, from where transformers looks for them: files come before the configuration."""
    files = {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if _is_there(folder / "chat_template.jinja"):
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
        return read_template(path).decode("utf-8")
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
