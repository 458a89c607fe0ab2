"""The settings of a command, and how --print-config shows them."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping
from pathlib import Path

from pydantic_core import to_jsonable_python

from qlora_hal.config.resolve import ResolvedSettings, resolve_settings
from qlora_hal.errors.terminal_text import json_line


def resolved(config: Path | None, flags: Mapping[str, object], *, demo: bool) -> ResolvedSettings:
    """File, environment and flags, over the demo's settings where it is asked for."""
    if not demo:
        return resolve_settings(config, flags=flags)
    from qlora_hal.config.demo import demo_settings, in_the_way

    return resolve_settings(
        config, flags=flags, defaults=demo_settings(), defaults_name="demo", defaults_yield=in_the_way
    )


def settings_as_text(settings: ResolvedSettings) -> str:
    """One line a setting: name, value, origin."""
    rows = [(path, _shown(value), settings.origins[path]) for path, value in settings.values().items()]
    wide, wider = max(len(row[0]) for row in rows), min(40, max(len(row[1]) for row in rows))
    return "\n".join(f"{path:<{wide}}  {value:<{wider}}  {origin}" for path, value, origin in rows)


def settings_as_json(settings: ResolvedSettings) -> str:
    """`{"config": nested, "origins": by dotted key}`."""
    content = {"config": settings.config.model_dump(mode="json"), "origins": dict(settings.origins)}
    return json_line(content)


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, dict)):
        return json_format.dumps(to_jsonable_python(value), ensure_ascii=False)
    return str(value) or '""'
