"""run.json: how a run was set up, what it resolved to, and how it ended. The keys are explained in docs/run-folder.md.

Secrets never enter: values of token-like environment variables and token-like texts are replaced, and the home folder
is written as `~`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal import strict_json
from qlora_hal.errors import ConfigError

if TYPE_CHECKING:
    from qlora_hal.backend import ProbeReport
    from qlora_hal.config import RunConfig

SCHEMA_VERSION = 1
RUN_FILE = "run.json"


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
    from qlora_hal.report.durable import replace_file

    text = json.dumps(run_facts(record), indent=2, ensure_ascii=False, allow_nan=False)
    path = run_dir / RUN_FILE
    replace_file(path, f"{text}\n".encode())
    return path


def read_run_file(run_dir: Path) -> dict[str, object]:
    """run.json as written. Raises ConfigError (S50) when the folder holds none or it is damaged."""
    path = run_dir / RUN_FILE
    try:
        content = strict_json.read_foreign_object(path)
    except (OSError, strict_json.JsonProblem) as error:
        raise _no_run(path, str(getattr(error, "strerror", None) or error)) from error
    if not isinstance(content.get("config"), dict):
        raise _no_run(path, "it holds no configuration")
    return content


def record_from(content: Mapping[str, object]) -> RunRecord:
    """The record that run.json was written from; a resumed run goes on with it. Raises ConfigError (S50) where an edit
    left a value of another kind."""
    known = {name: content[name] for name in RunRecord.__slots__ if name in content}
    _refuse_other_kinds(known)
    detection = known.get("detection")
    if isinstance(detection, Mapping):
        told = {name: detection[name] for name in Detection.__slots__ if name in detection}
        known["detection"] = Detection(**{**told, "reports": tuple(told.get("reports", ()))})
    for name in ("samples", "notes", "hand_overs"):
        known[name] = tuple(known.get(name) or ())  # type: ignore[arg-type]
    return RunRecord(**known)  # type: ignore[arg-type]


def _refuse_other_kinds(known: Mapping[str, object]) -> None:
    kinds = {f.name: _KINDS.get(str(f.type).partition("[")[0]) for f in fields(RunRecord)}
    for name, value in known.items():
        if (kind := kinds[name]) is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise _no_run(Path(RUN_FILE), f"{name} is a {type(value).__name__}")
    if absent := {"config", "origins"} - known.keys():
        raise _no_run(Path(RUN_FILE), f"{', '.join(sorted(absent))} is missing")
    detection = known.get("detection")
    if isinstance(detection, Mapping) and not (
        isinstance(detection.get("reports", []), list)
        and isinstance(detection.get("rejections", {}), Mapping)
        and {"chosen", "why"} <= detection.keys()
    ):
        raise _no_run(Path(RUN_FILE), "its detection is not what was written")


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


def read_run_config(run_dir: Path) -> RunConfig:
    """The configuration of a run, with `~` written out in its paths. Raises ConfigError."""
    from qlora_hal.settings import resolve_settings

    tree = read_run_file(run_dir)["config"]
    config = dict(tree) if isinstance(tree, Mapping) else {}
    for path in _PATHS:
        group, _, name = path.rpartition(".")
        home = config.get(group) if group else config
        if isinstance(home, dict) and isinstance(home.get(name), str):
            home[name] = os.path.expanduser(home[name])
    return resolve_settings(config, environ={}).config


_PATHS = (
    "output_dir",
    "model.name_or_path",
    "quantization.calibration_path",
    "data.path",
    "data.validation_path",
    "data.chat_template",
)


def redacted(value: object, secrets: Sequence[str] | None = None) -> object:
    """The value with secrets replaced and the home folder written as `~`, through all lists and mappings."""
    known = environment_secrets(os.environ) if secrets is None else secrets
    if isinstance(value, Mapping):
        return {
            _redacted_text(str(key), known): "[removed]"
            if _SECRET_KEY.search(str(key)) and isinstance(item, str)
            else redacted(item, known)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redacted(item, known) for item in value]
    if isinstance(value, (str, Path)):
        return _redacted_text(str(value), known)
    return value


def environment_secrets(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Values of environment variables whose names say that they are secret, and the passwords in addresses that any of
    them holds; longest first. Short values are no secrets, and would stand in many words."""
    named = (value for name, value in environ.items() if is_secret_variable(name))
    logins = (login for value in environ.values() for login in _LOGIN_PASSWORD.findall(value))
    return tuple(sorted({value for value in (*named, *logins) if len(value) >= 8}, key=len, reverse=True))


def is_secret_name(name: str) -> bool:
    """Whether the name of a setting or of an environment variable says that its value is secret."""
    return _SECRET_KEY.search(name) is not None


def is_secret_variable(name: str) -> bool:
    """Whether the name of an environment variable says that its value is secret: `X_KEY`, `PGPASSWORD`, `GH_PAT`."""
    return name not in _OPEN_VARIABLES and (is_secret_name(name) or _SECRET_VARIABLE.search(name) is not None)


_SECRET_KEY = re.compile(
    r"(?i)(^|_|-|\.)(token|api_?key|[a-z0-9]+[_-]key|secret|password|passwd|passphrase|credential|authorization)s?$"
)
_SECRET_VARIABLE = re.compile(
    r"(?i)(password|passwd|passphrase|secret|credential|api_?key|token(?!izer))"
    r"|(^|_)(key|keys|pass|pwd|pat|auth|creds?|jwt|bearer|cookie|dsn|sas|private|conn(ection)?_?str(ing)?)(_|$)"
    r"|pass$"
)
_OPEN_VARIABLES = frozenset({"PWD", "OLDPWD", "SSH_AUTH_SOCK"})
_SECRET_TEXT = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[A-Za-z0-9_-]{20,}"
    r"|[sr]k_(live|test)_\w{16,}|(AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|xox[a-z]-[\w-]{10,}|npm_\w{30,}|pypi-[\w-]{30,}"
    r"|dckr_pat_[\w-]{16,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})"
)
"""Texts that access tokens are known by."""
_SECRET_PAIR = re.compile(
    r"(?i)(?<![\w-])((?:[\w-]*[_-])?(?:password|passwd|pwd|secret|token|api_?key|access_?key|account_?key|"
    r"shared_?access_?key|signature|sig)\s?=\s?|bearer (?=[\w.~+/-]{20}))[^\s&;,\"'<>]{6,}"
)
"""A name and its secret, as connection strings and queries have them."""
_URL_LOGIN = re.compile(r"(?<=://)(?:[^\s/@\"'<>]+|[^\s/@:\"'<>]*:[^\s\"'<>]+)@")
_LOGIN_PASSWORD = re.compile(r"://[^\s/@:]*:([^\s\"'<>]+)@")


def _redacted_text(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "[removed]")
    text = _URL_LOGIN.sub("[removed]@", _SECRET_TEXT.sub("[removed]", text))
    text = _SECRET_PAIR.sub(r"\1[removed]", text)
    home = str(Path.home())
    if home in ("", "/", "\\"):
        return text
    return re.sub(rf"(?<![\w/\\]){re.escape(home)}(?=$|[/\\\s\"',:;)\]])", "~", text)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _no_run(path: Path, why: str) -> ConfigError:
    return ConfigError(
        "QH-S50",
        f"{path.parent} is no run folder: {RUN_FILE} cannot be used ({why}).",
        where=str(path),
        fix="Name the folder that train wrote, the one that holds run.json and checkpoints.",
    )
