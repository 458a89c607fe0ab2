"""Every setting of a run as a flag, generated from the schema: same spelling, choices and default."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from cyclopts import Group, Parameter

from qlora_hal.config.fields import Setting, groups, settings

ALIASES: Mapping[str, str] = {"model.name_or_path": "--model", "data.path": "--data", "backend.name": "--backend"}
_METAVARS = {
    "text": "TEXT",
    "whole number": "N",
    "number": "X",
    "true or false": "true|false",
    "choice": "CHOICE",
    "list": "ITEM",
    "text or list": "NAME",
    "mapping": "JSON",
    "groups": "JSON",
}


def with_settings(*, only: tuple[str, ...] = ()) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a verb one flag for each setting (of the groups in `only`); it receives those typed as `flags`.

    The verb is a function with a parameter `flags: Mapping[str, object]` from dotted key to text or list of texts.
    """
    chosen = [s for s in settings().values() if not only or s.group in only]

    def decorate(verb: Callable[..., int]) -> Callable[..., int]:
        own = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name != "flags"]

        def run(*positional: object, **named: Any) -> int:
            flags = {s.path: named.pop(_parameter_name(s.path), None) for s in chosen}
            typed = {path: value for path, value in flags.items() if value is not None}
            return verb(*positional, flags=typed, **named)

        generated = [_parameter(setting) for setting in chosen]
        run.__name__, run.__doc__, run.__module__ = verb.__name__, verb.__doc__, verb.__module__
        run.__signature__ = inspect.Signature([*own, *generated])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*own, *generated)}
        return run

    return decorate


def _parameter(setting: Setting) -> inspect.Parameter:
    kinds: dict[str, Any] = {
        "true or false": bool,
        "list": list[str],
        "text or list": list[str],
        "mapping": dict[str, str],
    }
    annotation: Any = Annotated[
        kinds.get(setting.kind, str) | None,
        Parameter(
            name=f"--{setting.path}",
            alias=ALIASES.get(setting.path),
            help=_help(setting),
            group=_panel(setting.group),
            metavar=_METAVARS[setting.kind],
            negative="",
            show_default=False,
            allow_leading_hyphen=True,
        ),
    ]
    return inspect.Parameter(
        _parameter_name(setting.path), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _parameter_name(path: str) -> str:
    return path.replace(".", "__")


def _panel(group: str) -> Group:
    title = f"{group}: {groups()[group]}" if group else "Settings (also in the file, and as QLORA_HAL_GROUP__NAME)"
    order = list(groups()).index(group) + 1 if group else 0
    return Group(title, sort_key=10 + order)


def _help(setting: Setting) -> str:
    parts = [setting.description]
    if setting.choices:
        parts.append(f"One of {', '.join(setting.choices)}.")
    elif not setting.description:
        parts.append(f"{setting.expected[0].upper()}{setting.expected[1:]}.")
    if setting.default_text:
        parts.append(f"[{setting.default_text}]")
    return " ".join(part for part in parts if part)
