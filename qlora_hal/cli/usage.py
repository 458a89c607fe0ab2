"""A parser's complaint in our words: what was typed, what was expected, and what to type instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from itertools import pairwise
from shlex import quote

from cyclopts import CycloptsError
from cyclopts.exceptions import MissingArgumentError, UnknownCommandError, UnknownOptionError, UnusedCliTokensError

from qlora_hal.cli.application import VERBS
from qlora_hal.cli.arguments import VERBS_WITH_SETTINGS, canonical, setting_of_flag, without_value
from qlora_hal.config.fields import known_by_name, setting_by_letters
from qlora_hal.config.other_tools.hints import Hint, hint_for
from qlora_hal.errors import ConfigError

_OTHER_VERBS = {
    "finetune": "train", "fine-tune": "train", "sft": "train", "run": "train", "fit": "train",
    "infer": "generate", "inference": "generate", "predict": "generate", "serve": "chat",
    "fuse": "merge", "export": "merge", "convert": "adapter", "info": "doctor", "check": "doctor", "env": "doctor",
}  # fmt: skip
"""What other tools call these commands."""


def report_usage(error: CycloptsError, tokens: list[str]) -> ConfigError:
    """The error for a command line that cannot be parsed (QH-U04)."""
    verb = tokens[0] if tokens and tokens[0] in VERBS else ""
    text, fix = " ".join(str(error).split()), f"Run qlora-hal {verb} --help." if verb else "Run qlora-hal --help."
    if isinstance(error, UnknownOptionError):
        text, fix = _unknown_flag(error, verb, tokens, fix)
    elif isinstance(error, UnusedCliTokensError) and verb and error.unused_tokens:
        text, fix = _too_many(str(error.unused_tokens[0]), verb, tokens, fix)
    elif isinstance(error, MissingArgumentError) and verb and error.argument is not None:
        text, fix = _missing(error, verb, tokens, fix)
    elif isinstance(error, UnknownCommandError) and tokens and not verb:
        close = [_OTHER_VERBS.get(tokens[0].lower(), ""), *difflib.get_close_matches(tokens[0], VERBS, n=1)]
        meant = next(filter(None, close), "")
        text = f"{tokens[0]} is not a command{f'; did you mean {meant}?' if meant else '.'}"
        fix = f"Run qlora-hal {meant} --help." if meant else fix
    return ConfigError("QH-U04", text, where="command line", fix=fix)


def _unknown_flag(error: UnknownOptionError, verb: str, tokens: Sequence[str], fix: str) -> tuple[str, str]:
    flag = (error.token.keyword or error.token.value).partition("=")[0]
    own = [name for argument in error.argument_collection for name in argument.names if name.startswith("--")]
    text = f"{_as_typed(flag, tokens)} is not a flag of qlora-hal {verb}".rstrip()
    hint = hint_for(flag) if verb in VERBS_WITH_SETTINGS else Hint()
    nearest = f"--{hint.meant}" if hint.said and hint.meant else _nearest_flag(flag, own)
    if hint.to_do:
        return f"{text}; {_as_flags(hint.said)}.", f"{_begun(_as_flags(hint.to_do))}."
    if nearest is None:
        return f"{text}.", fix
    setting = setting_of_flag(nearest)
    value = f" with {setting.expected}" if setting is not None else ""
    return f"{text}; {f'{hint.said}.' if hint.said else f'did you mean {nearest}?'}", f"Write {nearest}{value}."


def _begun(sentence: str) -> str:
    """With a capital, unless the name of a setting begins it."""
    first = sentence.partition(" ")[0]
    return sentence if "." in first else f"{sentence[0].upper()}{sentence[1:]}"


def _as_flags(words: str) -> str:
    """`group.name: value` of a settings file as it is typed."""
    return re.sub(r"(\w+\.\w+): \[?([\w-]+)\]?", r"--\1 \2", words)


def _too_many(word: str, verb: str, tokens: Sequence[str], fix: str) -> tuple[str, str]:
    """A word that belongs to no flag, told by what stands before it or by its own form."""
    name, equals, _ = word.partition("=")
    if equals and setting_of_flag(f"--{name}") is not None:
        return f"{word} has no dashes; did you mean --{word}?", f"Write --{word}."
    before = next((first for first, second in pairwise(tokens) if second == word), "")
    setting = setting_of_flag(before) if before.startswith("--") else None
    if setting is not None:
        return f"{before} takes {setting.expected}; {word!r} follows it.", f"Write {before} true, or {before} false."
    if verb in VERBS_WITH_SETTINGS:
        return f"{word} is one argument too many: one settings file is expected, and flags.", f"Remove {word}."
    if verb in ("chat", "generate"):
        return f"{word} belongs to no flag; did you mean --run {word}?", f"Write --run {quote(word)}."
    return f"{word} is one argument too many for qlora-hal {verb}.", fix


def _missing(error: MissingArgumentError, verb: str, tokens: Sequence[str], fix: str) -> tuple[str, str]:
    assert error.argument is not None
    name = _as_typed(error.keyword or error.argument.name, tokens)
    setting = setting_of_flag(name) if name.startswith("--") else None
    if setting is not None:
        return without_value(name, setting)
    return f"qlora-hal {verb} requires an argument {name}.", fix


def _as_typed(flag: str, tokens: Sequence[str]) -> str:
    """The flag with the dashes and underscores that the user gave it."""
    typed = (token.partition("=")[0] for token in tokens)
    return next((token for token in typed if canonical([token]) == [flag]), flag)


def _nearest_flag(flag: str, own: Sequence[str]) -> str | None:
    """The flag of the same verb that was most likely meant: a setting known by that word first, then by its letters."""
    words = flag.lstrip("-")
    if (setting := f"--{known_by_name(words)}") in own:
        return setting
    if close := difflib.get_close_matches(flag, own, n=1, cutoff=0.75):
        return close[0]
    setting = f"--{setting_by_letters(words)}"
    return setting if setting in own else None
