"""run.json: how a run was set up, what it resolved to, and how it ended. The keys are explained in docs/run-folder.md.

Secrets never enter: values of token-like environment variables and token-like texts are replaced, and the home folder
is written as `~`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal.config.resolve import resolve_settings
from qlora_hal.errors import CheckpointError, ConfigError, UnsafeInputError
from qlora_hal.errors.redaction import redacted
from qlora_hal.files import sealed_json, strict_json
from qlora_hal.files.opening import refuse_link
from qlora_hal.files.replacing import replace_file

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.backend import ProbeReport

SCHEMA_VERSION = 1
RUN_FILE = "run.json"
_BEYOND_COUNTING = 2**63
"""Such whole numbers are no longer read: an estimate can reach it, of rows that are longer than any memory is large."""


@dataclass(frozen=True, slots=True)
class Detection:
    """Which backend was taken and why; `rejections` maps every other backend to its reason."""

    chosen: str
    why: str
    reports: tuple[Mapping[str, object], ...] = ()
    rejections: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, chosen: str, why: str, reports: Sequence[ProbeReport], rejections: Mapping[str, str]) -> Detection:
        return cls(chosen, why, tuple(report.as_json() for report in reports), dict(rejections))


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The content of run.json. Start with what is known, and write again with `dataclasses.replace` at the end.

    `resolved` holds backend, device, weight_format, block_size, double_quant, compute_dtype, kernel_path, driver, seed,
    total_steps. `model` holds name, revision, architecture, parameter_count, fingerprint. `timings` are seconds.
    `status` is `running`, `finished`, `stopped` or `failed`.
    """

    config: Mapping[str, object]
    origins: Mapping[str, str]
    resolved: Mapping[str, object] = field(default_factory=dict)
    model: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    detection: Detection | None = None
    data_report: Mapping[str, object] = field(default_factory=dict)
    memory_estimate: Mapping[str, int] = field(default_factory=dict)
    status: str = "running"
    stopped_because: str = ""
    started_at: str = ""
    finished_at: str = ""
    steps: int = 0
    tokens: int = 0
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    eval_loss_best: float | None = None
    best_step: int | None = None
    samples: tuple[Mapping[str, str], ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    adapter_dir: str = ""
    notes: tuple[str, ...] = ()
    hand_overs: tuple[Mapping[str, object], ...] = ()
    ranks: Mapping[str, object] = field(default_factory=dict)


def given_config(config: RunConfig) -> dict[str, object]:
    """The configuration as the user gave it, as JSON and redacted: what run.json holds and later runs compare with."""
    tree = redacted(config.model_dump(mode="json"))
    return tree if isinstance(tree, dict) else {}


def run_facts(record: RunRecord) -> dict[str, object]:
    """The record as JSON values, redacted: the keys of run.json."""
    content = {"schema_version": SCHEMA_VERSION, **asdict(record)}
    facts = _plain(redacted(content))
    return facts if isinstance(facts, dict) else {}


def write_run_file(run_dir: Path, record: RunRecord) -> Path:
    """Replace run.json in one move. Raises StorageError."""
    path = run_dir / RUN_FILE
    replace_file(path, strict_json.encode(sealed_json.sealed(run_facts(record))))
    return path


def read_run_file(run_dir: Path) -> dict[str, object]:
    """run.json as written. Raises ConfigError QH-S50 when the folder holds none, or it is damaged or was changed, and
    as `examined_run_file`."""
    content, problem = examined_run_file(run_dir)
    if problem:
        raise _no_run(run_dir / RUN_FILE, problem)
    return content


def examined_run_file(run_dir: Path) -> tuple[dict[str, object], str]:
    """What run.json holds, and what is wrong with it ("" for nothing). An edited file has both.

    Raises CheckpointError QH-C13 for that of a newer release, UnsafeInputError QH-X06 for a link.
    """
    path = run_dir / RUN_FILE
    refuse_link(path)
    try:
        content = strict_json.read_object(path)
    except FileNotFoundError:
        return {}, "it is missing"
    except OSError as problem:
        return {}, f"it cannot be read: {problem.strerror or problem}"
    except strict_json.JsonProblem as problem:
        return {}, f"it is damaged: {problem}"
    _refuse_newer(content.get("schema_version"), path)
    return content, _problem_of(content)


def _problem_of(content: Mapping[str, object]) -> str:
    # A run with an id was begun by a release that seals its record.
    changed = sealed_json.is_sealed(content) and not sealed_json.is_as_sealed(content)
    if changed or ("run_id" in content and not sealed_json.is_sealed(content)):
        return "it was changed after it was written"
    if not isinstance(content.get("config"), dict):
        return "it holds no configuration"
    return _wrong_kinds(content)


def _refuse_newer(version: object, path: Path) -> None:
    if type(version) is int and version > SCHEMA_VERSION:
        raise CheckpointError(
            "QH-C13",
            f"{RUN_FILE} has schema version {version}, this version of qlora_hal reads {SCHEMA_VERSION}.",
            where=str(path),
            cause="A newer release wrote it; its fields may have another meaning.",
            fix="Use the release of qlora_hal that wrote it.",
        )


def record_from(content: Mapping[str, object]) -> RunRecord:
    """The record that run.json was written from; a resumed run goes on with it. Raises ConfigError (S50) where an edit
    left a value of another kind."""
    known = {name: content[name] for name in RunRecord.__slots__ if name in content}
    absent = {"config", "origins"} - known.keys()
    if problem := f"{', '.join(sorted(absent))} is missing" if absent else _wrong_kinds(known):
        raise _no_run(Path(RUN_FILE), problem)
    detection = known.get("detection")
    if isinstance(detection, Mapping):
        told = {name: detection[name] for name in Detection.__slots__ if name in detection}
        known["detection"] = Detection(**{**told, "reports": tuple(told.get("reports", ()))})
    for name in ("samples", "notes", "hand_overs"):
        known[name] = tuple(known.get(name) or ())  # type: ignore[arg-type]
    return RunRecord(**known)  # type: ignore[arg-type]


def _wrong_kinds(content: Mapping[str, object]) -> str:
    """Which values are not of the kind that was written; nothing where all are."""
    kinds = {"origins": dict, **{f.name: _KINDS.get(str(f.type).partition("[")[0], object) for f in fields(RunRecord)}}
    wrong = [
        name
        for name, kind in kinds.items()
        if name in content and (not isinstance(content[name], kind) or isinstance(content[name], bool))
    ]
    detection = content.get("detection")
    if isinstance(detection, Mapping) and not (
        isinstance(detection.get("reports", []), list)
        and isinstance(detection.get("rejections", {}), Mapping)
        and {"chosen", "why"} <= detection.keys()
    ):
        wrong.append("detection")
    return f"it holds a value of a wrong type under {', '.join(wrong)}" if wrong else ""


_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "Mapping": Mapping,
    "tuple": list,
    "str": str,
    "int": int,
    "float | None": (int, float, type(None)),
    "int | None": (int, type(None)),
    "Detection | None": (Mapping, type(None)),
}
"""What JSON has for each kind of field."""


def read_run_config(run_dir: Path, *, trust_remote_code: bool = False) -> RunConfig:
    """The configuration of a run, with `~` written out in its paths. Raises ConfigError, and UnsafeInputError QH-X03
    where it lets the base run code of its own and this call does not."""
    tree = read_run_file(run_dir)["config"]
    config = dict(tree) if isinstance(tree, Mapping) else {}
    for path in _PATHS:
        group, _, name = path.rpartition(".")
        home = config.get(group) if group else config
        if isinstance(home, dict) and isinstance(home.get(name), str):
            home[name] = os.path.expanduser(home[name])
    for source in _sources_of(config):
        source["path"] = os.path.expanduser(str(source.get("path")))
    read = resolve_settings(config, environ={}).config
    if read.model.trust_remote_code and not trust_remote_code:
        raise UnsafeInputError(
            "QH-X03",
            f"The record of this run lets {read.model.name_or_path} run Python code of its own; this call does not.",
            where=str(run_dir / RUN_FILE),
            cause="A run folder can come from anyone, and its record is no permission.",
            fix="Read the Python files of the model; if you trust them, add --trust-remote-code "
            "(trust_remote_code=True in Python).",
        )
    return read


def _sources_of(config: Mapping[str, object]) -> Iterator[dict[str, object]]:
    data = config.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    return (source for source in (sources if isinstance(sources, list) else ()) if isinstance(source, dict))


_PATHS = (
    "output_dir",
    "model.name_or_path",
    "quantization.calibration_path",
    "data.path",
    "data.validation_path",
    "data.chat_template",
)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and abs(value) >= _BEYOND_COUNTING:
        return float(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _no_run(path: Path, why: str) -> ConfigError:
    what = "is not a run folder" if not path.exists() else "cannot be used as a run folder"
    return ConfigError(
        "QH-S50",
        f"{path.parent} {what}: {RUN_FILE} is unusable, {why}.",
        where=str(path),
        fix="Name the folder that train wrote; where it has checkpoints, qlora-hal resume writes run.json again.",
    )
