"""A file of another tool becomes settings of a run: which tool it is of, what each key becomes, what has no place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import ValidationError

from qlora_hal.config.fields import settings
from qlora_hal.config.files import read_settings_file
from qlora_hal.config.other_tools.catalogue import TOOLS
from qlora_hal.config.other_tools.script import read_script
from qlora_hal.config.other_tools.tables import Computed, Fate, Given, Key, Outcome, Tool, Value, left
from qlora_hal.config.other_tools.trl import TRL
from qlora_hal.config.other_tools.unsloth import UNSLOTH
from qlora_hal.config.problems import Problem, config_error, problems_of_validation
from qlora_hal.config.resolve import nest
from qlora_hal.config.schema import RunConfig
from qlora_hal.errors import ConfigError, UnsupportedFeatureError
from qlora_hal.errors.redaction import is_secret_name, redacted
from qlora_hal.files import strict_json

_SCRIPTS = (".py", ".ipynb")
_NEEDED = ("model.name_or_path", "data.path", "output_dir")
_FEWEST_KNOWN = 2
"""Keys that have to be known before a file without any mark counts as one of Hugging Face's arguments."""


@dataclass(frozen=True, slots=True)
class Line:
    """One key of the file: where it stands, its value there, and what became of it."""

    key: str
    line: int | None
    value: Value
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Imported:
    """What was made of a file. `settings` are those to write; `origins` says for each which keys or habits made it."""

    tool: Tool
    path: Path
    lines: tuple[Line, ...]
    settings: Mapping[str, Value]
    origins: Mapping[str, str]
    unset: tuple[str, ...]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]

    def with_fate(self, fate: Fate) -> list[Line]:
        return [line for line in self.lines if line.outcome.fate is fate]


@dataclass(frozen=True, slots=True)
class _Source:
    """A file's values by their spelling, with lines."""

    path: Path
    values: Mapping[str, Value]
    lines: Mapping[str, int]
    names: frozenset[str] = field(default_factory=frozenset)
    objective: str = ""

    @property
    def is_script(self) -> bool:
        return self.path.suffix.lower() in _SCRIPTS

    def origin(self, key: str) -> str:
        return f"{self.path.name}:{self.lines[key]}" if key in self.lines else self.path.name


def imported(path: Path, tool_name: str | None = None) -> Imported:
    """Read a file of another tool. Nothing in it is run.

    Raises ConfigError: QH-U02 and QH-U03 for a file that cannot be read, QH-U60 where its tool is not clear, QH-U01
    for values that no setting takes; UnsupportedFeatureError QH-U61 for another objective than fine-tuning.
    """
    source = _read(path)
    tool = _named(tool_name) if tool_name else _recognized(source)
    given = _given(source, tool)
    objective = source.objective or tool.objective(given)
    if objective:
        raise _other_objective(path, tool, objective)
    return _translated(source, tool, given)


# Reading -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> _Source:
    if path.suffix.lower() in _SCRIPTS:
        script = read_script(path)
        return _Source(path, script.values, script.lines, script.names, script.objective)
    file = read_settings_file(path)
    values: dict[str, Value] = {}
    groups = frozenset[str]().union(*(tool.groups for tool in TOOLS))
    for name, value in file.values.items():
        spelled = str(name).lstrip("-").replace("-", "_")
        if spelled in groups and isinstance(value, Mapping):
            values.update({f"{spelled}.{leaf}": item for leaf, item in value.items()})
        else:
            values[spelled] = value
    lines = {name.lstrip("-").replace("-", "_"): line for name, line in file.lines.items()}
    return _Source(path, values, lines)


def _named(name: str) -> Tool:
    by_name = {tool.name: tool for tool in TOOLS}
    if name.lower() not in by_name:
        raise ConfigError(
            "QH-U60",
            f"There is no importer for {name!r}; one of {', '.join(by_name)} is expected.",
            where="--from-tool",
            fix=f"Name one of them: --from-tool {TOOLS[0].name}",
        )
    return by_name[name.lower()]


def _recognized(source: _Source) -> Tool:
    candidates = [tool for tool in TOOLS if tool.marks & (source.values.keys() | source.names)]
    if source.is_script:
        known = [tool for tool in (UNSLOTH, TRL) if tool is TRL or tool in candidates]
        candidates = known[:1] if source.values else []
    elif not candidates and len(source.values.keys() & _become_settings(TRL)) >= _FEWEST_KNOWN:
        candidates = [TRL]
    if len(candidates) == 1:
        return candidates[0]
    names = ", ".join(tool.name for tool in candidates or TOOLS)
    found = (
        f"has keys of several tools ({names})" if candidates else "has none of the keys that tell which tool it is for"
    )
    raise ConfigError(
        "QH-U60",
        f"{source.path.name} {found}: {', '.join(list(source.values)[:8]) or 'it is empty'}.",
        where=str(source.path),
        cause="One key can mean different things in two tools.",
        fix=f"Name the tool: --from-tool {candidates[0].name}"
        if candidates
        else f"Name the tool where it is one of these: --from-tool {TOOLS[0].name}. Files of others are not read.",
        context={"candidates": [tool.name for tool in candidates]},
    )


def _become_settings(tool: Tool) -> set[str]:
    return {name for name, key in tool.by_name().items() if key.fate in (Fate.TAKEN, Fate.TRANSLATED)}


def _given(source: _Source, tool: Tool) -> Given:
    keys = tool.by_name()
    values = {keys[name].names[0] if name in keys else name: value for name, value in source.values.items()}
    if source.is_script:
        values["script"] = True
    bare = Given(values)
    defaults = {name: default.value for name, default in tool.defaults(bare).items()}
    named = next((key.names[0] for key in tool.keys if "model.name_or_path" in key.here), "")
    return Given(values, defaults, _config_of(values.get(named)))


def _config_of(model: Value) -> Mapping[str, Value]:
    """The base's config.json where it is a folder on this disk."""
    if not isinstance(model, str) or not model:
        return {}
    try:
        return strict_json.read_foreign_object(Path(model).expanduser() / "config.json")
    except (OSError, ValueError, RuntimeError):  # also the home of nobody
        return {}


# Translating -------------------------------------------------------------------------------------------------------


def _translated(source: _Source, tool: Tool, given: Given) -> Imported:
    keys = tool.by_name()
    names = [name for name in source.values if name not in ("script", "trainer")]
    values: dict[str, Value] = {}
    origins: dict[str, str] = {}
    lines = [
        _placed(
            Line(name, source.lines.get(name), source.values[name], _outcome(keys[name], source.values[name], given)),
            values,
            origins,
        )
        for name in names
        if name in keys and source.values[name] is not None
    ]
    lines += _add_what_is_done_unasked(tool, given, values, origins)
    lines = _settled(lines, values, origins)
    _refuse_wrong_values(source, values, origins)
    return Imported(
        tool=tool,
        path=source.path,
        lines=tuple(lines),
        settings={path: values[path] for path in settings() if path in values},
        origins=origins,
        unset=tuple(name for name in names if name in keys and source.values[name] is None),
        unknown=tuple(name for name in names if name not in keys),
        missing=tuple(
            path for path in _NEEDED if not values.get(path) and not (path == "data.path" and "data.sources" in values)
        ),
    )


def _placed(line: Line, values: dict[str, Value], origins: dict[str, str]) -> Line:
    """Add a line's settings. Where an earlier key set another value, that one counts, and the line says so."""
    for path, value in line.outcome.settings.items():
        if path in values and values[path] != value:
            return replace(line, outcome=left(f"{origins[path]} says {path}, too, and counts"))
    for path, value in line.outcome.settings.items():
        origins[path] = f"{origins[path]}, {line.key}" if path in values else line.key
        values[path] = value
    return line


def _outcome(key: Key, value: Value, given: Given) -> Outcome:
    if isinstance(value, Computed):
        if key.fate is Fate.NOT_NEEDED or not key.here:
            return key.rule(value, given)
        return left(f"the script computes it ({value.text[:80]}): set {key.here} by hand")
    return key.rule(value, given)


def _add_what_is_done_unasked(
    tool: Tool, given: Given, values: dict[str, Value], origins: dict[str, str]
) -> list[Line]:
    """Where a key is absent, that tool's own choice, unless it is this project's as well; returned are choices that
    have no place here."""
    keys = tool.by_name()
    asked = {*values, *(name for name, value in given.values.items() if value is not None)}
    computed = {keys[name].here for name, value in given.values.items() if name in keys and isinstance(value, Computed)}
    lines = []
    for name, default in tool.defaults(given).items():
        if (name in given.values and given.values[name] is not None) or asked & set(default.unless) or name not in keys:
            continue
        outcome = keys[name].rule(default.value, given)
        told = outcome.fate is Fate.NO_PLACE or (
            outcome.note and outcome.settings and not asked & outcome.settings.keys()
        )
        if told:
            lines.append(Line(name, None, default.value, outcome))
        for path, value in outcome.settings.items():
            if path not in values and (told or value != settings()[path].default):
                values[path], origins[path] = value, f"{name} is not given; {tool.title} takes {shown(default.value)}"
    for path, (value, why) in tool.habits.items():
        if _OVERRULED_BY.get(path) in values:
            continue
        if path not in values and path not in computed and value != settings()[path].default:
            values[path], origins[path] = value, why
    return lines


_OVERRULED_BY = {"training.warmup_ratio": "training.warmup_steps"}
"""Settings that another one leaves without a meaning."""


def _settled(lines: Sequence[Line], values: dict[str, Value], origins: dict[str, str]) -> list[Line]:
    """Settings that need another one, which the file does not give, become notes."""
    needs_rows = ("training.eval_steps", "training.early_stopping_patience")
    dropped = []
    if not (values.get("data.validation_path") or values.get("data.validation_fraction")):
        dropped = [path for path in needs_rows if path in values]
    elif "training.eval_steps" not in values:
        dropped = [path for path in needs_rows[1:] if path in values]
    for path in dropped:
        del values[path], origins[path]
    note = (
        "it needs held-out rows and steps here: set data.validation_path (or validation_fraction) and "
        "training.eval_steps"
    )
    return [
        Line(line.key, line.line, line.value, left(note)) if set(line.outcome.settings) & set(dropped) else line
        for line in lines
    ]


def _refuse_wrong_values(source: _Source, values: Mapping[str, Value], origins: Mapping[str, str]) -> None:
    where = {path: source.origin(origins[path].split(", ")[0]) for path in values}
    problems = list(_booleans_for_numbers(values, where))
    if problems:
        raise config_error(problems)
    try:
        RunConfig.model_validate(nest(values))
    except ValidationError as error:
        raise config_error(problems_of_validation(error, where)) from error


def _booleans_for_numbers(values: Mapping[str, Value], where: Mapping[str, str]) -> Iterator[Problem]:
    for path, value in values.items():
        setting = settings()[path]
        if isinstance(value, bool) and setting.kind in ("number", "whole number"):  # pydantic would read true as 1
            yield Problem(path, where[path], value, f"{setting.expected} is expected")


def shown(value: Value, key: str = "") -> str:
    """A value of another tool on one line, without secrets."""
    if isinstance(value, str) and is_secret_name(key):
        return "[removed]"
    text = f"({value.text})" if isinstance(value, Computed) else str(redacted(value))
    text = " ".join(str(redacted(text)).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _other_objective(path: Path, tool: Tool, objective: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        "QH-U61",
        f"{path.name} is for another kind of training ({objective} of {tool.title}); supervised fine-tuning is "
        "expected.",
        where=str(path),
        cause="Its rows and its loss are others; the same settings would train something else.",
        fix="Name a file for supervised fine-tuning.",
    )
