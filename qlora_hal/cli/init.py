"""`qlora-hal init`: a settings file with every setting, its meaning and its default, made from the schema."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from qlora_hal.config.fields import Setting, groups, settings
from qlora_hal.errors import ConfigError, StorageError
from qlora_hal.files.output_path import write_whole
from qlora_hal.files.replacing import replace_file

SCHEMA_FILE = "qlora-hal.schema.json"
_FILL_IN = {
    "output_dir": "runs/first",
    "model.name_or_path": "path/to/model",
    "data.path": "path/to/rows.jsonl",
}


@dataclass(frozen=True, slots=True)
class Syntax:
    """How a format writes a file with comments. `assigned` gives the line of a name and its value as text."""

    editor_line: str
    group: str
    indent: str
    assigned: Callable[[str, str], str]
    value: Callable[[Setting], str]


def init(
    file: Annotated[
        Path, Parameter(help="The file to write, .yaml, .yml or .toml; - prints YAML.", allow_leading_hyphen=True)
    ] = Path("run.yaml"),
    /,
) -> int:
    """Write a commented settings file, and beside it the schema that lets an editor complete and check it."""
    if str(file) == "-":
        print(settings_text(YAML), end="")
        return 0
    syntax = _syntax_of(file)
    if file.exists():
        raise ConfigError(
            "QH-U07",
            f"{file} already exists.",
            where=str(file),
            fix=f"Choose another name: qlora-hal init other{file.suffix}",
        )
    from qlora_hal.cli.schema import schema_text

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file.parent / SCHEMA_FILE, (schema_text() + "\n").encode())
        write_whole(file, settings_text(syntax))
    except OSError as error:
        raise StorageError(
            "QH-S12", f"{file} cannot be written: {error.strerror}.", where=str(file), fix="Choose another path."
        ) from error
    from qlora_hal.errors.terminal_text import show

    show(f"wrote {file}. Fill in model, data and output_dir, then: qlora-hal train {file}", stream=sys.stderr)
    return 0


def _syntax_of(file: Path) -> Syntax:
    syntax = {".yaml": YAML, ".yml": YAML, ".toml": TOML}.get(file.suffix.lower())
    if syntax is None:
        why = "JSON has no comments" if file.suffix.lower() == ".json" else "train reads a file by its ending"
        raise ConfigError(
            "QH-U02",
            f"{file.name} ends in {file.suffix or 'nothing'}; one of .yaml, .yml, .toml is expected.",
            where=str(file),
            cause=f"The file explains every setting in comments, and {why}.",
            fix=f"Choose another name: qlora-hal init {file.with_suffix('.yaml')}",
        )
    return syntax


def settings_text(syntax: Syntax) -> str:
    """The file: the three settings everybody needs are filled in, all others stand as comments with their defaults."""
    lines = [
        syntax.editor_line,
        "# Settings of a run. A line with ## explains the one below it; remove the # to change a default.",
        "# Flags (--training.learning_rate 1e-4) and variables (QLORA_HAL_TRAINING__LEARNING_RATE) override this file.",
        "",
        *_lines(settings()["output_dir"], syntax, indent=""),
    ]
    for group, about in groups().items():
        lines += ["", f"{syntax.group.format(group)}  # {about}"]
        for setting in settings().values():
            if setting.group == group:
                lines += _lines(setting, syntax, indent=syntax.indent)
    return "\n".join(lines) + "\n"


def _lines(setting: Setting, syntax: Syntax, *, indent: str) -> list[str]:
    about = setting.description or f"{setting.expected[0].upper()}{setting.expected[1:]}."
    choices = f" ({' | '.join(setting.choices)})" if setting.choices else ""
    name = setting.path.rpartition(".")[2]
    assigned = syntax.assigned(name, syntax.value(setting))
    return [f"{indent}## {about}{choices}", f"{indent}{'' if setting.path in _FILL_IN else '# '}{assigned}"]


def _in_yaml(setting: Setting) -> str:
    if setting.path in _FILL_IN:
        return _FILL_IN[setting.path]
    if setting.kind in ("mapping", "list", "groups"):
        return "{}" if setting.kind == "mapping" else "[]"
    return setting.default_text or ("null" if setting.optional else '""')


def _in_toml(setting: Setting) -> str:
    """TOML has no null: what is unset by default stays empty, for the user to fill in."""
    if setting.path in _FILL_IN or (setting.kind in ("text", "choice", "text or list") and not setting.optional):
        return json.dumps(_FILL_IN.get(setting.path, setting.default_text))
    if setting.kind in ("mapping", "list", "groups"):
        return "{}" if setting.kind == "mapping" else "[]"
    return setting.default_text


YAML = Syntax(f"# yaml-language-server: $schema={SCHEMA_FILE}", "{}:", "  ", "{}: {}".format, _in_yaml)
TOML = Syntax(f"#:schema ./{SCHEMA_FILE}", "[{}]", "", "{} = {}".format, _in_toml)
