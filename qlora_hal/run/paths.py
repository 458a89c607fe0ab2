"""Where model and data of a run lie: written down so that any working directory finds them, moved on request."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from qlora_hal.data.source.row_files import KINDS
from qlora_hal.data.template.chat_template import BUILT_IN
from qlora_hal.errors import ConfigError
from qlora_hal.files.refused_paths import named_path, refuse_other_encodings, require_paths_given

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig

_FLAGS: Mapping[str, str] = {
    "model.name_or_path": "--model DIR",
    "data.path": "--data FILE",
    "data.validation_path": "--validation-data FILE",
}
"""The settings that name a place, with the flag of `resume` that moves it."""
_TRAINING_ROWS = ("data.path", "data.sources.")
_RECORDED = (*_FLAGS, "quantization.calibration_path", "data.chat_template")


@dataclass(frozen=True, slots=True)
class PathOverrides:
    """Where the same model and data lie on this machine; None: where the run says."""

    model: str | None = None
    data: str | None = None
    validation_data: str | None = None

    @classmethod
    def of(cls, **places: object) -> PathOverrides:
        """The places as a caller of `resume` gave them. Raises ConfigError QH-U01 for what is no path."""
        in_memory = "A run resumes with the data it started with; rows given in memory were kept with it."
        require_paths_given({}, places, cause=in_memory)
        return cls(**{name: None if place is None else str(place) for name, place in places.items()})

    def applied(self, config: RunConfig) -> RunConfig:
        """The configuration with the new places; that they hold the same things is checked later."""
        given = {"model.name_or_path": self.model, "data.validation_path": self.validation_data}
        places = {path: place for path, place in given.items() if place is not None}
        if self.data is not None:
            places |= _in_folder(config, self.data) if config.data.sources else {"data.path": self.data}
        return _with_paths(config, places)


def _in_folder(config: RunConfig, folder: str) -> dict[str, str]:
    """Where the sources of data.sources lie in one folder, each under the name that it had; hub datasets stay.

    Raises ConfigError QH-U18 where two have one name."""
    places = {
        f"data.sources.{number}.path": os.path.join(folder, Path(source.path).name)
        for number, source in enumerate(config.data.sources)
        if _is_path(source.path)
    }
    if len(set(places.values())) < len(places):
        raise ConfigError(
            "QH-U18",
            f"The sources of the run cannot be told apart by their names in {folder}.",
            where="data.sources",
            cause="A run with data.sources is moved with one folder, in which each source has the name that it had.",
            fix="Put the sources back where run.json says that they are, and leave --data out.",
        )
    return places


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Every place that is on this disk as an absolute path; hub ids and built-in names stay as they are.

    Raises ConfigError QH-U30 where the working directory's name is no UTF-8."""
    paths = (*_RECORDED, *_source_paths(config))
    found = {path: place for path in paths if (place := _place(config, path)) and _is_here(path, place)}
    absolute = {path: os.path.abspath(os.path.expanduser(place)) for path, place in found.items()}
    for place in absolute.values():
        refuse_other_encodings(place)
    return _with_paths(config, absolute)


def require_paths(config: RunConfig, run_dir: Path, *, reads_data: bool) -> None:
    """Name every place of a run that is gone, with the flag of `resume` for it. Raises ConfigError QH-U18."""
    read = {path for path in (*_FLAGS, *_source_paths(config)) if reads_data or not path.startswith(_TRAINING_ROWS)}
    gone = {path: place for path in sorted(read) if (place := _place(config, path)) and _is_gone(place)}
    if gone:
        listing = "; ".join(f"{path} {place}" for path, place in gone.items())
        flags = " ".join(dict.fromkeys(_FLAGS.get(path, "--data FOLDER") for path in gone))
        raise ConfigError(
            "QH-U18",
            f"What the run was made with is not where it was: {listing}.",
            where=", ".join(gone),
            cause="It was moved or removed, or the run came here from another machine.",
            fix=f"Give its new path: qlora-hal resume {quote(str(run_dir))} {flags}",
            context={"gone": gone},
        )


def _is_here(path: str, place: str) -> bool:
    if path == "data.chat_template":
        return place not in BUILT_IN and named_path(place).is_file()
    return named_path(place).exists()


def _is_gone(place: str) -> bool:
    """Whether a path, and no hub id, names nothing here."""
    return _is_path(place) and not named_path(place).exists()


def _is_path(place: str) -> bool:
    path = named_path(place)
    return path.is_absolute() or place.startswith(".") or path.suffix.lower() in KINDS


def _source_paths(config: RunConfig) -> list[str]:
    return [f"data.sources.{number}.path" for number in range(len(config.data.sources))]


def _place(config: RunConfig, path: str) -> str | None:
    group, name, *inner = path.split(".")
    held = getattr(getattr(config, group), name)
    place: str | None = held[int(inner[0])].path if inner else held
    return place


def _with_paths(config: RunConfig, places: Mapping[str, str]) -> RunConfig:
    for path, new in places.items():
        place: object = new
        group, name, *inner = path.split(".")
        if inner:
            sources = list(config.data.sources)
            sources[int(inner[0])] = sources[int(inner[0])].model_copy(update={"path": place})
            place = tuple(sources)
        config = config.model_copy(update={group: getattr(config, group).model_copy(update={name: place})})
    return config
