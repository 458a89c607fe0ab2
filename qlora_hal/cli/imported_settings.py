"""What `init --from` writes and says of another tool's file: no key of it is left out without a word."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote

from qlora_hal.config.fields import groups, settings
from qlora_hal.config.other_tools.importing import Imported, Line, shown
from qlora_hal.config.other_tools.tables import Fate
from qlora_hal.errors.terminal_text import visible_line

_FILL_IN = {"model.name_or_path": "path/to/model", "data.path": "path/to/rows.jsonl", "output_dir": "runs/first"}


@dataclass(frozen=True, slots=True)
class Form:
    """How a format writes groups and assignments. Values are written as JSON, which YAML and TOML both read but for
    what stands between a name and its value in a mapping: `between`."""

    editor_line: str
    group: str
    indent: str
    assigned: str
    between: str

    def value(self, value: object) -> str:
        text = json.dumps(value, ensure_ascii=False, separators=(", ", self.between))
        return "".join(mark if mark.isprintable() else f"\\U{ord(mark):08x}" for mark in text)


def imported_text(imported: Imported, form: Form) -> str:
    """The settings file: the key that a value comes from stands beside it, and what was not taken at the end."""
    lines = [
        form.editor_line,
        f"# Made from {imported.path.name}, a configuration of {imported.tool.title}. Beside each value stands the key",
        "# that it comes from; what was not taken stands at the end. qlora-hal init - prints all settings.",
        "",
        *_group_lines("", imported, form),
    ]
    for group in groups():
        body = list(_group_lines(group, imported, form))
        lines += ["", form.group.format(group), *body] if body else []
    return "\n".join([*lines, "", *_not_taken(imported)]) + "\n"


def _group_lines(group: str, imported: Imported, form: Form) -> Iterator[str]:
    notes = _notes(imported)
    for path, setting in settings().items():
        if setting.group != group or (path not in imported.settings and path not in imported.missing):
            continue
        indent, name = form.indent if group else "", path.rpartition(".")[2]
        for note in notes.get(path, ()):
            yield f"{indent}## {_comment(note)}"
        if path in imported.missing:
            value, origin = json.dumps(_FILL_IN[path]), "fill in: the file does not say it"
        else:
            value, origin = form.value(imported.settings[path]), imported.origins[path]
        yield f"{indent}{form.assigned.format(name, value)}  # {_comment(origin)}"


def _notes(imported: Imported) -> Mapping[str, list[str]]:
    """What to say above a setting: of keys whose value here is another, what it was there."""
    found: dict[str, list[str]] = {}
    for line in imported.lines:
        if line.outcome.note and line.outcome.settings:
            first = next((path for path in line.outcome.settings if path in imported.settings), None)
            if first:
                found.setdefault(first, []).append(f"{line.key} = {shown(line.value, line.key)}: {line.outcome.note}")
    return found


def _not_taken(imported: Imported) -> Iterator[str]:
    yield f"# Of every configuration of {imported.tool.title}:"
    for sentence in imported.tool.about:
        yield f"#   {sentence}"
    for fate, title in (
        (Fate.NO_PLACE, "No place here, and the result may differ"),
        (Fate.NOT_NEEDED, "Not needed here; the result is the same"),
    ):
        found = [line for line in imported.with_fate(fate) if not line.outcome.settings]
        yield from [f"# {title}:"] if found else []
        for line in found:
            yield f"#   {_comment(_key_and_value(line))}: {_comment(line.outcome.note)}"
    for title, names in (("Set to nothing there", imported.unset), ("Not known to this importer", imported.unknown)):
        if names:
            yield f"# {title}: {_comment(', '.join(names))}"


def summary(imported: Imported, written: str) -> str:
    """What to print when the file is written: the counts, and each key that is translated or has no place."""
    tool, fates = imported.tool, {fate: imported.with_fate(fate) for fate in Fate}
    counts = ", ".join(f"{len(lines)} {fate.value}" for fate, lines in fates.items())
    lines = [f"read {imported.path} as a configuration of {tool.title}: {counts}"]
    for fate in (Fate.TRANSLATED, Fate.NO_PLACE):
        lines += [f"{fate.value}:"] if fates[fate] else []
        lines += [f"  {_key_and_value(line)}{_arrow(line)}: {line.outcome.note}" for line in fates[fate]]
    if fates[Fate.NOT_NEEDED]:
        lines.append(f"not needed: {', '.join(line.key for line in fates[Fate.NOT_NEEDED])}")
    lines += [f"set to nothing there: {', '.join(imported.unset)}"] if imported.unset else []
    lines += [f"not known to this importer: {', '.join(imported.unknown)}"] if imported.unknown else []
    if imported.missing:
        lines.append(f"fill in: {', '.join(imported.missing)}")
    return "\n".join([*lines, f"wrote {written}. Check it: qlora-hal train {quote(written)} --dry-run"])


def _key_and_value(line: Line) -> str:
    where = f" (line {line.line})" if line.line else " (not given)"
    return f"{line.key}{where} = {shown(line.value, line.key)}"


def _arrow(line: Line) -> str:
    made = [f"{path} {_short(value)}" for path, value in line.outcome.settings.items()]
    return f" -> {', '.join(made)}" if made else ""


def _short(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else shown(value)


def _comment(text: str) -> str:
    """On one line, for a break would end the comment, and without what neither format allows in one."""
    return visible_line(" ".join(text.split()))
