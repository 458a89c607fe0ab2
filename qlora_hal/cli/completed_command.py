"""The one thing to type: the command as it was typed, with what it lacks, ready to paste."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence

from qlora_hal.cli.arguments import VERBS_WITH_SETTINGS
from qlora_hal.cli.init import FILL_IN
from qlora_hal.errors import QloraHalError

_FLAGS = {"model.name_or_path": "--model", "data.path": "--data", "output_dir": "--output_dir"}
_OF_BACKEND = ("--backend", "--backend.name")
_SETTINGS_FILES = (".yaml", ".yml", ".toml")


def with_completed_command(error: QloraHalError, tokens: Sequence[str]) -> QloraHalError:
    """The error with the whole command line as its help, where flags alone are missing: `context["add"]` names them,
    or `context["absent"]` the settings that were not given."""
    added = _added(error, tokens)
    if added and tokens:
        error.fix = f"Type: {_completed(tokens, added)}"
    return error


def _added(error: QloraHalError, tokens: Sequence[str]) -> dict[str, str]:
    add, absent = error.context.get("add"), error.context.get("absent")
    if isinstance(add, Mapping):
        return {str(flag): str(value) for flag, value in add.items()}
    if error.code != "QH-U12" or not isinstance(absent, list) or not tokens or tokens[0] not in VERBS_WITH_SETTINGS:
        return {}
    return {flag: FILL_IN[path] for path, flag in _FLAGS.items() if path in absent} | _backend(tokens)


def _backend(tokens: Sequence[str]) -> dict[str, str]:
    """The backend that would have to be named next, where the command trains and nothing else may name one."""
    from qlora_hal.config.fields import settings
    from qlora_hal.detect.discovery import listed, reports
    from qlora_hal.detect.selection import backend_to_name

    named = settings()["backend.name"].environment_name in os.environ or any(
        token.startswith("--backend") or token.endswith(_SETTINGS_FILES) for token in tokens
    )
    if tokens[0] != "train" or named:
        return {}
    entries = listed()
    name = backend_to_name(entries, reports(entries))
    return {"--backend": name} if name else {}


def _completed(tokens: Sequence[str], added: Mapping[str, str]) -> str:
    typed = list(_without_backend(tokens)) if "--backend" in added else list(tokens)
    end = typed.index("--") if "--" in typed else len(typed)
    flags = [word for flag, value in added.items() for word in (flag, value)]
    return shlex.join(["qlora-hal", *typed[:end], *flags, *typed[end:]])


def _without_backend(tokens: Sequence[str]) -> Iterator[str]:
    """What was typed, without a backend that gives way to another."""
    words = iter(tokens)
    for word in words:
        if word in _OF_BACKEND:
            next(words, None)
        elif not word.startswith(tuple(f"{flag}=" for flag in _OF_BACKEND)):
            yield word
