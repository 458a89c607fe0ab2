"""Spelling of flags: dashes and underscores mean the same, and a yes-no flag may be followed by its value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_TRUTH_VALUES = frozenset({"true", "false", "yes", "no", "1", "0"})
_OPTIONS = "--backend.options."


def canonical(tokens: Sequence[str]) -> list[str]:
    """The tokens with every flag spelled as it is registered: fields as in the file, other flags with dashes."""
    return list(_joined(_spelled(tokens)))


def _spelled(tokens: Sequence[str]) -> Iterator[str]:
    all_positional = False
    for token in tokens:
        all_positional = all_positional or token == "--"
        name, equals, value = token.partition("=")
        if all_positional or not name.startswith("--") or name.startswith(_OPTIONS):
            yield token
        elif "." in name or name in ("--output-dir", "--output_dir"):
            yield f"--{name[2:].replace('-', '_')}{equals}{value}"
        else:
            yield f"--{name[2:].replace('_', '-')}{equals}{value}"


def _joined(tokens: Iterator[str]) -> Iterator[str]:
    """`--data.packing false` becomes `--data.packing=false`, the only form in which the parser takes a value."""
    held = ""
    for token in tokens:
        if held:
            if token.lower() in _TRUTH_VALUES:
                yield f"{held}={token.lower()}"
                held = ""
                continue
            yield held
            held = ""
        if "." in token and token.startswith("--") and "=" not in token and _is_yes_no(token[2:]):
            held = token
        else:
            yield token
    if held:
        yield held


def _is_yes_no(path: str) -> bool:
    from qlora_hal.settings_schema import settings

    setting = settings().get(path)
    return setting is not None and setting.kind == "true or false"
