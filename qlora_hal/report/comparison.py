"""Two runs side by side: settings that differ with their origin, what they resolved to, and their figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_hal.errors import ConfigError, figures
from qlora_hal.files.opening import refuse_link
from qlora_hal.report.html import flat_rows
from qlora_hal.report.run_file import read_run_file
from qlora_hal.report.series import METRICS_FILE, RunSeries, read_series

_COMPARED = ("resolved", "model", "versions", "environment")
"""Parts of run.json beside its configuration that two runs can differ in."""


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """One of the two, as its files are now: a run at work has those of its last save and of its log."""

    folder: Path
    record: Mapping[str, object]
    series: RunSeries

    @classmethod
    def read(cls, folder: Path) -> ComparedRun:
        """Raises as `read_run_file` does; also ConfigError QH-S50 where the log cannot be read, UnsafeInputError QH-X06
        where it is a link."""
        record = read_run_file(folder)
        refuse_link(folder / METRICS_FILE)
        try:
            return cls(folder, record, read_series(folder))
        except OSError as problem:
            raise ConfigError(
                "QH-S50",
                f"{folder} cannot be used as a run folder: {METRICS_FILE} cannot be read: "
                f"{problem.strerror or problem}.",
                where=str(folder / METRICS_FILE),
                fix="Put the file that the run wrote back, or remove it: the run is then compared without its curves.",
            ) from problem

    def part(self, name: str) -> Mapping[str, object]:
        value = self.record.get(name)
        return value if isinstance(value, Mapping) else {}


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that differs; None is a setting that one of the runs does not know."""

    path: str
    values: tuple[object, object]
    origins: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """`resolved` and `figures` are rows of (name, text of the first, text of the second)."""

    runs: tuple[ComparedRun, ComparedRun]
    settings: tuple[Setting, ...]
    resolved: tuple[tuple[str, str, str], ...]
    figures: tuple[tuple[str, str, str], ...]

    def as_json(self) -> dict[str, object]:
        return {
            "runs": [str(run.folder) for run in self.runs],
            "settings": {
                item.path: {"values": list(item.values), "origins": list(item.origins)} for item in self.settings
            },
            "resolved": {name: [first, second] for name, first, second in self.resolved},
            "figures": {name: [_value(run) for run in self.runs] for name, _value, _ in FIGURES},
        }


def compared(first: ComparedRun, second: ComparedRun, differing: Mapping[str, tuple[object, object]]) -> Comparison:
    """`differing` is what their configurations set otherwise (`run.identity.differing_settings`)."""
    origins = [run.part("origins") for run in (first, second)]
    return Comparison(
        runs=(first, second),
        settings=tuple(
            Setting(path, values, (_origin(path, origins[0]), _origin(path, origins[1])))
            for path, values in differing.items()
        ),
        resolved=tuple(row for part in _COMPARED for row in _differing_rows(part, first, second)),
        figures=tuple((name, text(value(first)), text(value(second))) for name, value, text in FIGURES),
    )


def _origin(path: str, origins: Mapping[str, object]) -> str:
    """Of a setting, or of the setting that holds it: what lies inside one (`data.sources.0.weight`) came with it."""
    while path and path not in origins:
        path = path.rpartition(".")[0]
    return str(origins.get(path, "default"))


def _differing_rows(part: str, first: ComparedRun, second: ComparedRun) -> list[tuple[str, str, str]]:
    left, right = (dict(flat_rows(run.part(part))) for run in (first, second))
    names = [*left, *(name for name in right if name not in left)]
    return [(name, left.get(name, "-"), right.get(name, "-")) for name in names if left.get(name) != right.get(name)]


# Figures -----------------------------------------------------------------------------------------------------------


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _of(part: str, name: str) -> Callable[[ComparedRun], object]:
    return lambda run: _number(run.part(part).get(name) if part else run.record.get(name))


def _steps(run: ComparedRun) -> object:
    """By the log, which a run at work writes on while its record waits for the next save."""
    logged = run.series.loss[-1][0] if run.series.loss else 0.0
    return max(_number(run.record.get("steps")) or 0.0, logged)


def _text(value: object) -> str:
    return str(value or "-")


def _optional(write: Callable[[float], str]) -> Callable[[object], str]:
    return lambda value: write(value) if isinstance(value, float) else "-"


FIGURES: tuple[tuple[str, Callable[[ComparedRun], object], Callable[[object], str]], ...] = (
    ("status", lambda run: run.record.get("status"), _text),
    ("steps", _steps, _optional(figures.count)),
    ("tokens", _of("", "tokens"), _optional(figures.count)),
    ("first loss", lambda run: run.series.loss[0][1] if run.series.loss else None, _optional(figures.loss)),
    ("last loss, average", lambda run: run.series.loss_average[-1][1] if run.series.loss_average else None,
     _optional(figures.loss)),
    ("evaluation loss before", _of("", "eval_loss_before"), _optional(figures.loss)),
    ("evaluation loss after", _of("", "eval_loss_after"), _optional(figures.loss)),
    ("lowest evaluation loss", _of("", "eval_loss_best"), _optional(figures.loss)),
    ("training time", _of("timings", "train_seconds"), _optional(figures.duration)),
    ("tokens per second", _of("timings", "tokens_per_second"), _optional(figures.count)),
    ("peak memory", _of("", "peak_memory_bytes"), _optional(figures.size)),
)  # fmt: skip
"""Name, value of a run, and how the value is written."""
