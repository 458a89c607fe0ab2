"""`qlora-hal init`: a settings file with every setting, its meaning and its default, made from the schema."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from qlora_hal.errors import ConfigError, StorageError
from qlora_hal.settings_schema import Setting, groups, settings

SCHEMA_FILE = "qlora-hal.schema.json"
_FILL_IN = {
    "output_dir": "runs/first",
    "model.name_or_path": "path/to/model",
    "data.path": "path/to/rows.jsonl",
}


def init(
    file: Annotated[Path, Parameter(help="The file to write; - prints it instead.", allow_leading_hyphen=True)] = Path(
        "run.yaml"
    ),
    /,
) -> int:
    """Write a commented settings file, and beside it the schema that lets an editor complete and check it."""
    if str(file) == "-":
        print(settings_text(), end="")
        return 0
    if file.exists():
        raise ConfigError(
            "QH-U07", f"{file} is already there.", where=str(file), fix="Give another name: qlora-hal init other.yaml"
        )
    from qlora_hal.cli.schema import schema_text

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / SCHEMA_FILE).write_text(schema_text() + "\n", encoding="utf-8")
        file.write_text(settings_text(), encoding="utf-8")
    except OSError as error:
        raise StorageError(
            "QH-S12", f"{file} cannot be written: {error.strerror}.", where=str(file), fix="Choose another place."
        ) from error
    from qlora_hal.terminal import show

    show(f"wrote {file}. Fill in model, data and output_dir, then: qlora-hal train {file}", stream=sys.stderr)
    return 0


def settings_text() -> str:
    """The file: the three settings everybody needs are filled in, all others stand as comments with their defaults."""
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "# Settings of a run. A line with ## explains the one below it; take the # away to change a default.",
        "# Flags (--training.learning_rate 1e-4) and variables (QLORA_HAL_TRAINING__LEARNING_RATE) win over this file.",
        "",
        *_lines(settings()["output_dir"], indent=""),
    ]
    for group, about in groups().items():
        lines += ["", f"{group}:  # {about}"]
        for setting in settings().values():
            if setting.group == group:
                lines += _lines(setting, indent="  ")
    return "\n".join(lines) + "\n"


def _lines(setting: Setting, *, indent: str) -> list[str]:
    about = setting.description or f"{setting.expected[0].upper()}{setting.expected[1:]}."
    choices = f" ({' | '.join(setting.choices)})" if setting.choices else ""
    name = setting.path.rpartition(".")[2]
    value = f"{name}: {_FILL_IN[setting.path]}" if setting.path in _FILL_IN else f"# {name}:{_default(setting)}"
    return [f"{indent}## {about}{choices}", f"{indent}{value}"]


def _default(setting: Setting) -> str:
    if setting.kind == "mapping":
        return " {}"
    if setting.kind == "list":
        return " []"
    return f" {setting.default_text}" if setting.default_text else " null" if setting.optional else ' ""'
