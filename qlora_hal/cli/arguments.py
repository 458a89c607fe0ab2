"""Spelling of flags: dashes and underscores mean the same, a yes-no flag may be followed by its value, and a flag that
takes a list by several (`--lora.target_modules q_proj v_proj`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qlora_hal.errors import ConfigError

if TYPE_CHECKING:
    from qlora_hal.config.fields import Setting

_TRUTH_VALUES = frozenset({"true", "false", "yes", "no", "1", "0"})
_PLAIN_TRUTH_VALUES = frozenset({"true", "false"})
_OPTIONS = "--backend.options."
VERBS_WITH_SETTINGS = frozenset({"train", "estimate"})
"""Verbs whose one word without a flag is the settings file."""
_FILE_ENDINGS = (".yaml", ".yml", ".toml", ".json")
_OTHER_NAMES = {"--model": "model.name_or_path", "--data": "data.path", "--backend": "backend.name"}


def canonical(tokens: Sequence[str]) -> list[str]:
    """The tokens with every flag spelled as it is registered: fields as in the file, other flags with dashes.

    Raises ConfigError QH-U04 where a setting of one value is followed by several, or by another flag instead of one.
    """
    spelled = _joined(_spelled(tokens))
    return list(_repeated(spelled) if tokens and tokens[0] in VERBS_WITH_SETTINGS else spelled)


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
    """`--data.packing false` becomes `--data.packing=false`, the only form in which the parser takes a value; so does
    `--dry-run false`. A flag without a dot may be followed by a file: there only `true` and `false` are values."""
    held, values = "", frozenset[str]()
    for token in tokens:
        if held:
            if token.lower() in values:
                yield f"{held}={token.lower() if values is _TRUTH_VALUES else token}"
                held = ""
                continue
            yield held
            held = ""
        if token == "--":
            yield token
            yield from tokens
            return
        if not token.startswith("--") or "=" in token:
            yield token
        elif "." not in token:
            held, values = token, _PLAIN_TRUTH_VALUES
        elif _is_yes_no(token[2:]):
            held, values = token, _TRUTH_VALUES
        else:
            yield token
    if held:
        yield held


def _repeated(tokens: Iterator[str]) -> Iterator[str]:
    """`--training.report_to wandb mlflow` becomes two flags of one value each, the form in which the parser takes
    them. The name of a settings file ends the list."""
    flag, values, previous = "", 0, ""
    for token in tokens:
        if token == "--":
            yield token
            yield from tokens
            return
        if token.startswith("--"):
            if flag and not values and not _is_yes_no(flag[2:]):
                raise _no_value(flag)
            name, equals, _ = token.partition("=")
            flag, values = ("", 0) if setting_of_flag(name) is None else (name, 1 if equals else 0)
        elif flag and values and not token.lower().endswith(_FILE_ENDINGS):
            if not _takes_a_list(flag):
                raise _one_value(flag, token, follows_equals=previous == "=")
            yield flag
        elif flag:
            flag, values = (flag, 1) if not values else ("", 0)
        yield token
        previous = token


def _one_value(flag: str, value: str, *, follows_equals: bool) -> ConfigError:
    if follows_equals:
        return ConfigError(
            "QH-U04",
            f"{flag} = {value} has spaces around the =; {flag}={value} is expected.",
            where="command line",
            fix=f"Write {flag} {value}.",
        )
    return ConfigError(
        "QH-U04",
        f"{flag} takes one value; {value!r} follows it.",
        where="command line",
        cause="An argument without a flag is the settings file, which ends in .yaml, .yml, .toml or .json.",
        fix=f"Quote a value that contains spaces, or remove {value!r}.",
    )


def without_value(flag: str, setting: Setting) -> tuple[str, str]:
    """What to say of a flag that ends without its value, and what to do."""
    return f"{flag} requires an argument: {setting.expected} is expected.", f"Write it after {flag}."


def _no_value(flag: str) -> ConfigError:
    setting = setting_of_flag(flag)
    assert setting is not None
    message, fix = without_value(flag, setting)
    return ConfigError("QH-U04", message, where="command line", fix=fix)


def setting_of_flag(flag: str) -> Setting | None:
    """The setting that a flag sets, `--data` as `--data.path`; None where it sets none."""
    from qlora_hal.config.fields import settings

    return settings().get(_OTHER_NAMES.get(flag, flag[2:]))


def _takes_a_list(flag: str) -> bool:
    setting = setting_of_flag(flag)
    return setting is not None and setting.kind in ("list", "text or list")


def _is_yes_no(path: str) -> bool:
    setting = setting_of_flag(f"--{path}")
    return setting is not None and setting.kind == "true or false"


Switch = Parameter(negative="", show_default=False)

DevicesOption = Annotated[
    str | None, Parameter(help="Train on so many devices of this machine, or on all of them: auto.")
]
RestartsOption = Annotated[
    int, Parameter(help="With --devices: how often to go on from the last checkpoint when a device fails.")
]
TrustOption = Annotated[
    bool, Switch, Parameter(help="Let the base run the Python files of its repository, which a run's record cannot.")
]
"""For commands that open what a run folder names: that folder may be a stranger's."""


def as_devices(given: str | None) -> int | str | None:
    """`--devices` as Python takes it: a number where it is one; what else it may be is decided there."""
    return int(given) if given is not None and given.isascii() and given.isdecimal() else given
