"""`qlora-hal init`: a settings file with every setting, its meaning and its default, made from the schema."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Annotated

from cyclopts import Parameter

from qlora_hal.config.fields import Setting, groups, settings
from qlora_hal.errors import ConfigError, StorageError
from qlora_hal.files.output_path import write_whole
from qlora_hal.files.replacing import replace_file

SCHEMA_FILE = "qlora-hal.schema.json"
FILL_IN = {
    "output_dir": "runs/first",
    "model.name_or_path": "path/to/model",
    "data.path": "path/to/rows.jsonl",
}
"""What stands for settings that everybody has to give."""


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
    *,
    source: Annotated[
        Path | None,
        Parameter(
            name="--from",
            help="Make it from a configuration of Axolotl, LLaMA-Factory, mlx-lm or TRL, or from a training script or "
            "notebook of TRL or Unsloth, which is read and not run.",
        ),
    ] = None,
    from_tool: Annotated[
        str | None,
        Parameter(help="Whose file it is: axolotl, llama-factory, mlx-lm, trl or unsloth; default: by its keys."),
    ] = None,
) -> int:
    """Write a commented settings file, and beside it the schema that lets an editor complete and check it."""
    if from_tool is not None and source is None:
        raise ConfigError(
            "QH-U04",
            "--from-tool says which tool a file is for; --from names none.",
            where="command line",
            fix="Add --from FILE, or leave out --from-tool.",
        )
    if str(file) == "-":
        print(settings_text(YAML) if source is None else _imported(source, from_tool, YAML)[0], end="")
        return 0
    syntax = _syntax_of(file)
    _refuse_existing(file)
    text, told = (settings_text(syntax), "") if source is None else _imported(source, from_tool, syntax, str(file))
    _write(file, text)
    from qlora_hal.errors.terminal_text import show

    show(
        told or f"wrote {file}. Fill in model, data and output_dir, then: qlora-hal train {quote(str(file))}",
        stream=sys.stderr,
    )
    return 0


def _imported(source: Path, tool: str | None, syntax: Syntax, written: str = "run.yaml") -> tuple[str, str]:
    """The file, and what to say of it."""
    from qlora_hal.cli.imported_settings import Form, imported_text, summary
    from qlora_hal.config.other_tools.importing import imported

    made = imported(source, tool)
    assigned = syntax.assigned("{}", "{}")
    between = assigned.replace("{}", "")
    form = Form(syntax.editor_line, syntax.group, syntax.indent, assigned, between)
    return imported_text(made, form), summary(made, written)


def _refuse_existing(file: Path) -> None:
    if file.exists():
        raise ConfigError(
            "QH-U07",
            f"{file} already exists.",
            where=str(file),
            fix=f"Choose another name: qlora-hal init other{quote(file.suffix)}",
        )


def _write(file: Path, text: str) -> None:
    from qlora_hal.cli.schema import schema_text

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file.parent / SCHEMA_FILE, (schema_text() + "\n").encode())
        write_whole(file, text)
    except OSError as error:
        raise StorageError(
            "QH-S12", f"{file} cannot be written: {error.strerror}.", where=str(file), fix="Choose another path."
        ) from error


def _syntax_of(file: Path) -> Syntax:
    syntax = {".yaml": YAML, ".yml": YAML, ".toml": TOML}.get(file.suffix.lower())
    if syntax is None:
        why = "JSON has no comments" if file.suffix.lower() == ".json" else "train reads a file by its ending"
        raise ConfigError(
            "QH-U02",
            f"{file.name} ends in {file.suffix or 'nothing'}; one of .yaml, .yml, .toml is expected.",
            where=str(file),
            cause=f"The file explains every setting in comments, and {why}.",
            fix=f"Choose another name: qlora-hal init {quote(str(file.with_suffix('.yaml')))}",
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
    choices = f" ({' | '.join(setting.choices)})" if setting.choices else ""
    name = setting.path.rpartition(".")[2]
    assigned = syntax.assigned(name, syntax.value(setting))
    said_only = "" if setting.path in FILL_IN else "# "
    return [f"{indent}## {setting.description}{choices}", f"{indent}{said_only}{assigned}"]


def _in_yaml(setting: Setting) -> str:
    if setting.path in FILL_IN:
        return FILL_IN[setting.path]
    if _is_empty(setting):
        return "{}" if setting.kind == "mapping" else "[]"
    return setting.default_text or ("null" if setting.optional else '""')


def _is_empty(setting: Setting) -> bool:
    return setting.kind in ("mapping", "list", "groups") or setting.default == ()


def _in_toml(setting: Setting) -> str:
    """TOML has no null: what is unset by default stays empty, for the user to fill in."""
    if setting.path not in FILL_IN and _is_empty(setting):
        return "{}" if setting.kind == "mapping" else "[]"
    if setting.path in FILL_IN or (setting.kind in ("text", "choice", "text or list") and not setting.optional):
        return json.dumps(FILL_IN.get(setting.path, setting.default_text))
    return setting.default_text


YAML = Syntax(f"# yaml-language-server: $schema={SCHEMA_FILE}", "{}:", "  ", "{}: {}".format, _in_yaml)
TOML = Syntax(f"#:schema ./{SCHEMA_FILE}", "[{}]", "", "{} = {}".format, _in_toml)
