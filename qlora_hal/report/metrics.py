"""metrics.jsonl: one JSON line for each optimizer step and each evaluation, in the order they became known.

The file is append-only while a run lives. A number that is not finite is written as null beside `"nonfinite": true`,
because JSON has no NaN. A torn last line (a crash while writing) is cut off on opening, with a note: the log never
stops a resume.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from qlora_hal.durable_files import flush_to_medium, storage_error
from qlora_hal.report.durable import replace_file

if TYPE_CHECKING:
    from qlora_hal.values import LossSum, StepStats

Record = Mapping[str, object]

_LONGEST_LINE = 64 * 1024
"""A line of a step has some 300 bytes."""


def step_record(
    step: int,
    stats: StepStats,
    *,
    learning_rate: float,
    epoch: float,
    tokens_seen: int,
    tokens_per_second: float,
    seconds_per_step: float,
    memory_bytes: int | None,
) -> dict[str, object]:
    """The line of one optimizer step. `loss` is nats per counted token, `grad_norm` the norm before clipping."""
    return {
        "step": step,
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "learning_rate": learning_rate,
        "epoch": epoch,
        "token_count": stats.token_count,
        "tokens_seen": tokens_seen,
        "tokens_per_second": tokens_per_second,
        "seconds_per_step": seconds_per_step,
        "memory_bytes": memory_bytes,
        "applied": stats.applied,
    }


def evaluation_record(step: int, evaluation: LossSum, label: str) -> dict[str, object]:
    """The line of one evaluation; `label` is `before`, `during` or `after`."""
    return {"step": step, "eval_loss": evaluation.loss, "eval_tokens": evaluation.token_count, "label": label}


class MetricsFile:
    """The log of one run, open for appending. `notes` says what was repaired on opening."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises StorageError when the place cannot be written."""
        self.path = path
        self.notes: tuple[str, ...] = ()
        try:
            dropped = _cut_torn_line(path)
            self._file: BufferedWriter = path.open("ab")
        except OSError as error:
            raise storage_error(error, path, what=f"the log {path.name}") from error
        if dropped:
            self.notes = (f"{path.name}: the last line was torn ({dropped} bytes); it was dropped.",)

    def append(self, record: Record) -> None:
        """Write one line and hand it to the system. Raises StorageError when the disk is full."""
        line = json.dumps(_finite(record), allow_nan=False, separators=(", ", ": ")) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            raise storage_error(error, self.path, what=f"the log {self.path.name}") from error

    def sync(self) -> None:
        """Make every line durable; called when a checkpoint is saved. Raises StorageError."""
        try:
            flush_to_medium(self._file.fileno())
        except OSError as error:
            raise storage_error(error, self.path, what=f"the log {self.path.name}") from error

    def truncate_after(self, step: int) -> int:
        """Drop the lines of later steps, which a resumed run takes again, and of the end that an earlier call came to.
        Returns how many were dropped."""
        self._file.flush()
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step and _label_of(line) != "after"]
        if len(kept) < len(lines):
            self._file.close()
            replace_file(self.path, b"".join(kept))
            self._file = self.path.open("ab")
        return len(lines) - len(kept)

    def close(self) -> None:
        """Make everything durable and close. Safe to call twice. Raises StorageError, and is closed then, too."""
        if not self._file.closed:
            with self._file:
                self.sync()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, object]]:
    """All whole lines; a torn or foreign line is left out. An absent file is an empty log."""
    if not path.exists():
        return []
    return [record for line in path.read_bytes().splitlines() if (record := _parsed(line)) is not None]


def loss_before(path: Path) -> float | None:
    """The validation loss of the base, from the line of the evaluation before the first step."""
    for record in read_metrics(path):
        loss = record.get("eval_loss")
        if record.get("label") == "before" and isinstance(loss, float):
            return loss
    return None


def trained_seconds(path: Path) -> float:
    """What all steps in the log took together."""
    seconds = (record.get("seconds_per_step") for record in read_metrics(path))
    return sum(value for value in seconds if isinstance(value, (int, float)))


def smoothed(values: Sequence[float | None], weight: float = 0.9) -> list[float | None]:
    """The Smoother's averages for a whole curve; gaps stay gaps."""
    smoother = Smoother(weight)
    return [None if value is None else smoother.add(value) for value in values]


class Smoother:
    """Exponential moving average with bias correction (Kingma and Ba 2015, section 3)."""

    def __init__(self, weight: float = 0.9) -> None:
        self._weight = weight
        self._average = 0.0
        self._seen = 0

    def add(self, value: float) -> float:
        """Take a value and give the average so far; a value that is not finite leaves it unchanged."""
        if math.isfinite(value):
            self._seen += 1
            self._average = self._weight * self._average + (1 - self._weight) * value
        return self._average / (1 - self._weight**self._seen) if self._seen else value


def _finite(record: Record) -> dict[str, object]:
    clean = {key: _clean(value) for key, value in record.items()}
    if any(isinstance(value, float) and not math.isfinite(value) for value in record.values()):
        clean["nonfinite"] = True
    return clean


def _clean(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parsed(line: bytes) -> dict[str, object] | None:
    if len(line) > _LONGEST_LINE:
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _step_of(line: bytes) -> int:
    record = _parsed(line) or {}
    step = record.get("step", 0)
    return step if isinstance(step, int) else 0


def _label_of(line: bytes) -> object:
    return (_parsed(line) or {}).get("label")


def _cut_torn_line(path: Path) -> int:
    """Cut what follows the last whole line; returns the bytes cut."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    # A crash can also leave a line of zeros with its newline, where the length reached the disk before the data.
    while whole and _parsed(whole[whole.rfind(b"\n", 0, -1) + 1 :]) is None:
        whole = whole[: whole.rfind(b"\n", 0, -1) + 1]
    if len(whole) < len(content):
        replace_file(path, whole)
    return len(content) - len(whole)
