"""From file, environment, keywords and flags to one RunConfig, with the origin of every value.

Precedence, strongest first: flags, keywords, environment, the file (or mapping, or RunConfig), a caller's defaults
(`--demo`), the schema's defaults. Every wrong item is found before anything is raised.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from shlex import quote

from pydantic import ValidationError

from qlora_hal.config.fields import (
    ENVIRONMENT_PREFIX,
    Setting,
    groups,
    nearest_group,
    setting_named,
    settings,
)
from qlora_hal.config.files import BYTE_LIMIT, read_settings_file
from qlora_hal.config.keywords import CommonSettings
from qlora_hal.config.other_tools.hints import Hint, hint_for, tool_of
from qlora_hal.config.problems import Problem, config_error, problems_of_validation
from qlora_hal.config.schema import RunConfig
from qlora_hal.errors import ConfigError
from qlora_hal.files import strict_json

OTHER_ENVIRONMENT_NAMES = frozenset({"QLORA_HAL_CACHE", "QLORA_HAL_FAULTS", "QLORA_HAL_TRACEBACK"})
"""Variables with our prefix that are no settings of a run."""

KEYWORD = "keyword"
"""The origin of what was given in Python."""
_DEFAULTS = frozenset({"default", "demo"})
_MOST_SEARCHED = 50
_KEYWORD_SETTINGS = {"model": "model.name_or_path", "data": "data.path", "backend": "backend.name"}
_LEFT_OUT = (*_KEYWORD_SETTINGS, "output_dir")
"""Keywords whose value None means that they were not given; any other one's is a value."""
_NOT_FROM_ENVIRONMENT = frozenset({"model.trust_remote_code"})


@dataclass(frozen=True, slots=True)
class ResolvedSettings:
    """A valid configuration and where each value came from.

    `origins` maps every dotted key to `command line --lora.r`, `keyword`, `environment QLORA_HAL_LORA__R`,
    `run.yaml:12`, `config argument`, the name of the caller's defaults, or `default`.
    """

    config: RunConfig
    origins: Mapping[str, str]

    def values(self) -> Mapping[str, object]:
        """Dotted key -> value, in the order of the schema."""
        return dict(flatten_config(self.config))

    @property
    def given(self) -> frozenset[str]:
        """Dotted keys of what was set for this run, and is no default of the schema or of the demo."""
        return frozenset(key for key, origin in self.origins.items() if origin not in _DEFAULTS)


@dataclass(slots=True)
class _Layers:
    """Values by dotted key, the strongest layer written last, and everything found wrong on the way."""

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    way_on: str = ""

    def put(self, key: str, value: object, origin: str) -> None:
        setting = settings().get(key)
        if setting is None:
            self.unknown(key, value, origin)
            return
        earlier = self.values.get(key)
        if setting.kind == "mapping" and isinstance(earlier, Mapping) and isinstance(value, Mapping):
            value = {**earlier, **value}
        is_other = isinstance(value, bool) or (isinstance(value, str) and "_" in value)
        if is_other and setting.kind in ("number", "whole number"):
            # pydantic would read true as 1, and 1_0e-5 as 1e-4.
            self.problems.append(Problem(key, origin, value, f"{setting.expected} is expected"))
            return
        self.values[key] = str(value) if isinstance(value, Path) else value
        self.origins[key] = origin

    def unknown(self, key: str, value: object, origin: str) -> None:
        # The search for what was meant takes a millisecond; a file of unknown keys is no file of slips.
        is_searched = len(self.problems) < _MOST_SEARCHED
        self.problems.append(_unknown(key, value, origin, is_searched))


def resolve_settings(
    config: ResolvedSettings | RunConfig | Mapping[str, object] | str | Path | None,
    *,
    keywords: Mapping[str, object] | None = None,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    defaults: Mapping[str, object] | None = None,
    defaults_name: str = "demo",
    defaults_yield: Callable[[Mapping[str, object], Collection[str]], Collection[str]] | None = None,
) -> ResolvedSettings:
    """Merge all layers and validate the result. `defaults_yield` names the defaults that make way, from all values and
    the keys that were given otherwise.

    `keywords` holds dotted keys, groups, common settings by their own names, or `model`, `data`, `output_dir`,
    `backend` (of which None and the backend `auto` mean not given); `flags` holds dotted keys with texts as typed,
    where None means not given. A ResolvedSettings is returned as it is when nothing is added, so that resolving twice
    keeps the origins. Raises ConfigError (U01..U03), UnsafeInputError (X07).
    """
    if isinstance(config, ResolvedSettings):
        if not dict(_given_keywords(keywords or {})) and not flags:
            return config
        layers = _Layers(dict(config.values()), dict(config.origins))
    else:
        layers = _Layers()
        for key, value in (defaults or {}).items():
            layers.put(key, value, defaults_name)
        _put_configuration(layers, config)
        _put_environment(layers, os.environ if environ is None else environ)
    _put_tree(layers, _given_keywords(keywords or {}), lambda key: KEYWORD)
    for key, value in (flags or {}).items():
        if value is not None:
            _put_text(layers, key, value, f"command line --{key}")
    if defaults_yield is not None:
        given = {key for key, origin in layers.origins.items() if origin != defaults_name}
        for key in set(defaults_yield(layers.values, given)) - given:
            layers.values.pop(key, None)
            layers.origins.pop(key, None)
    return _validated(layers)


def revalidated(config: object, origin: str) -> RunConfig:
    """A configuration that code has made, which pydantic checks only when it is asked to. Raises ConfigError QH-U01."""
    if not isinstance(config, RunConfig):
        expected = f"a RunConfig is expected, not a value of type {type(config).__name__}"
        raise config_error([Problem("config", origin, config, expected)])
    try:
        return RunConfig.model_validate(config.model_dump(warnings=False))
    except ValidationError as error:
        raise config_error(problems_of_validation(error, dict.fromkeys(settings(), origin))) from error


def require_settings(config: RunConfig, *paths: str) -> None:
    """Refuse a configuration in which one of these is empty, naming all that are. Raises ConfigError QH-U12."""
    values = dict(flatten_config(config))
    absent = [path for path in paths if not values[path]]
    if absent:
        raise ConfigError(
            "QH-U12",
            f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not set.",
            fix="Set them as flags or in train(model=..., data=..., output_dir=...), or run qlora-hal init for a "
            "commented run.yaml.",
            context={"absent": absent},
        )


def flatten_config(config: RunConfig) -> Iterator[tuple[str, object]]:
    """Every dotted key of a configuration with its value."""
    for path in settings():
        group, _, name = path.rpartition(".")
        yield path, getattr(getattr(config, group) if group else config, name)


def nest(values: Mapping[str, object]) -> dict[str, object]:
    """Dotted keys as nested groups, the form of a file."""
    tree: dict[str, object] = {}
    for path, value in values.items():
        group, _, name = path.rpartition(".")
        home = tree.setdefault(group, {}) if group else tree
        if isinstance(home, dict):
            home[name] = value
    return tree


# Layers ------------------------------------------------------------------------------------------------------------


def _put_configuration(layers: _Layers, config: RunConfig | Mapping[str, object] | str | Path | None) -> None:
    if config is None:
        return
    if isinstance(config, RunConfig):
        _put_tree(layers, config.model_dump(exclude_unset=True).items(), lambda key: "config argument")
    elif isinstance(config, Mapping):
        _put_tree(layers, config.items(), lambda key: "config argument")
    elif not isinstance(config, str | Path):
        received = type(config).__name__
        expected = f"a settings file, a mapping or a RunConfig is expected, not a value of type {received}"
        layers.problems.append(Problem("config", "config argument", config, expected))
    else:
        file = read_settings_file(Path(config))
        if tool := tool_of(file.values):
            command = f"qlora-hal init --from {quote(str(config))} {_new_name()}"
            layers.way_on = f"It is a configuration of {tool.title}; take it over by: {command}"
        _put_tree(layers, file.values.items(), file.origin)


def _new_name() -> str:
    """Of a settings file that is not there yet: `init` writes over none."""
    names = chain(("run.yaml", "ours.yaml"), (f"ours-{number}.yaml" for number in count(2)))
    return next(name for name in names if not os.path.lexists(name))


def _put_tree(layers: _Layers, tree: Iterable[tuple[str, object]], origin: Callable[[str], str]) -> None:
    met: set[str] = set()

    def put(key: str, value: object) -> None:
        if key in met:
            expected = "it is set twice, in its group and by its dotted name; one of them is expected"
            layers.problems.append(Problem(key, origin(key), value, expected))
            return
        met.add(key)
        layers.put(key, value, origin(key))

    for name, value in tree:
        name = str(name)
        if name in settings() or "." in name:
            put(name, value)
        elif name not in groups():
            layers.unknown(name, value, origin(name))
        elif isinstance(value, Mapping):
            for leaf, leaf_value in value.items():
                put(f"{name}.{leaf}", leaf_value)
        elif value is not None:
            names = ", ".join(path.rpartition(".")[2] for path in settings() if path.startswith(f"{name}."))
            expected = f"{name} is a group; its settings go below it, one per line: {names}"
            layers.problems.append(Problem(name, origin(name), value, expected))


def _put_environment(layers: _Layers, environ: Mapping[str, str]) -> None:
    by_name = {setting.environment_name: setting for setting in settings().values()}
    for name in sorted(environ):
        if not name.startswith(ENVIRONMENT_PREFIX) or name in OTHER_ENVIRONMENT_NAMES:
            continue
        origin = f"environment {name}"
        setting = by_name.get(name)
        key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
        if setting is None:
            found = hint_for(key)
            hint = f"did you mean {settings()[found.meant].environment_name}?" if found.meant else found.said
            layers.problems.append(Problem(name, origin, environ[name], "no setting has that name", hint))
        elif setting.path in _NOT_FROM_ENVIRONMENT:
            expected = "this setting is not taken from the environment; write it in the file or as a flag"
            layers.problems.append(Problem(setting.path, origin, environ[name], expected))
        else:
            _put_text(layers, setting.path, environ[name], origin)


def _given_keywords(keywords: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in keywords.items():
        if (key in _LEFT_OUT and value is None) or (key == "backend" and value == "auto"):
            continue
        if key in CommonSettings.__annotations__:
            key = setting_named(key)
        yield key if isinstance(value, Mapping) else _KEYWORD_SETTINGS.get(key, key), value


def _as_keyword(path: str) -> str:
    """A setting as a call of `train` spells it: `learning_rate`, or `training={"adam_beta2": ...}`."""
    group, _, name = path.rpartition(".")
    short = {path: key for key, path in _KEYWORD_SETTINGS.items()}
    if path in short or not group:
        return short.get(path, path)
    return name if name in CommonSettings.__annotations__ else f'{group}={{"{name}": ...}}'


def _put_text(layers: _Layers, key: str, value: object, origin: str) -> None:
    """A value that was typed as text, or a list of texts where a flag was repeated."""
    setting = settings().get(key)
    if isinstance(value, str) and len(value) > BYTE_LIMIT:
        expected = f"it has {len(value)} characters; at most {BYTE_LIMIT} are expected, as in a settings file"
        layers.problems.append(Problem(key, origin, value, expected))
        return
    try:
        layers.put(key, _from_text(setting, value) if setting else value, origin)
    except ValueError:
        expected = f"{setting.expected if setting else 'JSON'} is expected"
        layers.problems.append(Problem(key, origin, value, expected))


def _from_text(setting: Setting, value: object) -> object:
    if setting.optional and isinstance(value, str) and value.lower() in ("none", "null"):
        if value.lower() in setting.choices:  # `recompute none` says something
            return value.lower()
        return None
    if setting.kind == "list":
        return _listed(value, split=bool(setting.choices))
    if setting.kind == "text or list":
        # A lone word is a module's name; only all-linear and real patterns stay texts.
        texts = _listed(value, split=False)
        if texts == setting.choices[-1:]:  # the one that is a text
            return texts[0]
        names = "[A-Za-z0-9_]+"
        if len(texts) == 1 and not re.fullmatch(rf"{names}(\s*[,\s]\s*{names})*", texts[0]):
            return texts[0]
        return tuple(name for text in _listed(value, split=True) for name in text.split())
    if setting.kind == "mapping":
        return _mapping(value)
    if setting.kind == "groups":
        return _from_json(value) if isinstance(value, str) else value
    return value


def _listed(value: object, *, split: bool) -> tuple[str, ...]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        found = _from_json(value)
        return tuple(str(item) for item in found) if isinstance(found, list) else ()
    items = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    texts = (str(item) for item in items)
    return tuple(part.strip() for text in texts for part in text.split(",")) if split else tuple(texts)


def _mapping(value: object) -> dict[str, object]:
    if isinstance(value, str):
        value = _from_json(value)
    if not isinstance(value, Mapping):
        raise ValueError("not a mapping")
    return {str(key): _scalar(item) for key, item in value.items()}


def _scalar(value: object) -> object:
    try:
        return _from_json(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _from_json(text: str) -> object:
    """Raises ValueError, also for what is nested too deeply or too much, and for a key that is there twice."""
    return strict_json.decode(text.encode("utf-8", "surrogatepass"))


# Validation --------------------------------------------------------------------------------------------------------


def _validated(layers: _Layers) -> ResolvedSettings:
    try:
        config = RunConfig.model_validate(nest(layers.values))
    except ValidationError as error:
        raise config_error([*layers.problems, *problems_of_validation(error, layers.origins)], layers.way_on) from error
    if layers.problems:
        raise config_error(layers.problems, layers.way_on)
    return ResolvedSettings(config, {path: layers.origins.get(path, "default") for path in settings()})


def _unknown(key: str, value: object, origin: str, is_searched: bool) -> Problem:
    if is_searched and isinstance(value, Mapping) and "." not in key and (group := nearest_group(key)):
        return Problem(key, origin, value, "no group has that name", f"did you mean {group}?")
    found = hint_for(key) if is_searched else Hint()
    meant = _as_keyword(found.meant) if found.meant and origin == KEYWORD else found.meant
    hint = found.said or (f"did you mean {meant}?" if meant else "")
    return Problem(key, origin, value, "no setting has that name", hint)
