"""metrics.jsonl: one JSON line for each optimizer step and each evaluation, in the order they became known.

The file is append-only while a run lives. A number that is not finite is written as null beside `"nonfinite": true`,
because JSON has no NaN. A torn last line (a crash while writing) is cut off on opening, with a note: the log never
stops a resume. A checkpoint keeps a mark of the log, by which a resume tells what was cut, changed or exchanged since.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BufferedReader, BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from qlora_hal.files.durable import DAMAGED, flush_to_medium, set_aside, storage_error, unique_name, write_new
from qlora_hal.files.opening import open_appending, open_regular, refuse_link
from qlora_hal.files.replacing import replace_file

if TYPE_CHECKING:
    from qlora_hal.contract.values import LossSum, StepStats

Record = Mapping[str, object]

_LONGEST_LINE = 512 * 1024
"""A line of a step has some 300 bytes; that of an evaluation as many figures as `hooks.MOST_FIGURES`."""


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


def evaluation_record(
    step: int, evaluation: LossSum, label: str, metrics: Mapping[str, float] | None = None
) -> dict[str, object]:
    """The line of one evaluation; `label` is `before`, `during` or `after`, `metrics` are a user's own figures."""
    figures: dict[str, object] = {"eval_loss": evaluation.loss, "eval_tokens": evaluation.token_count}
    return {
        "step": step,
        **figures,
        **{f"eval_{name}": value for name, value in (metrics or {}).items()},
        "label": label,
    }


class MetricsFile:
    """The log of one run, open for appending. `notes` says what was repaired on opening; `is_complete` whether every
    step is in it that should be, as far as `compare` found."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises StorageError when the place cannot be written, UnsafeInputError QH-X06 for a link."""
        self.path = path
        self.is_complete = True
        refuse_link(path)
        self._held: BufferedReader | None = None
        try:
            content = _content(path)
            kept, self.notes = _repaired(path, content)
            if kept != content or _has_other_names(path):  # a hard link's other name keeps what it has
                replace_file(path, kept)
            self._open(kept)
        except OSError as error:
            raise storage_error(error, path, what=f"the log {path.name}") from error

    def append(self, record: Record) -> None:
        """Write one line and hand it to the system. Raises StorageError when the disk is full."""
        line = (json.dumps(_finite(record), allow_nan=False, separators=(", ", ": ")) + "\n").encode()
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise storage_error(error, self.path, what=f"the log {self.path.name}") from error
        self._count(line)

    def sync(self) -> None:
        """Make every line durable; called when a checkpoint is saved. Raises StorageError."""
        try:
            flush_to_medium(self._file.fileno())
        except OSError as error:
            raise storage_error(error, self.path, what=f"the log {self.path.name}") from error

    def mark(self) -> dict[str, object]:
        """What the log holds now, for `compare`: its length, its hash, and number and hash of its first step."""
        number, digest = self._first
        return {"bytes": self._size, "sha256": self._digest.hexdigest(), "first_step": number, "first_sha256": digest}

    def truncate_after(self, step: int) -> int:
        """Drop the lines of later steps, which a resumed run takes again, and of the end that an earlier call came to.
        Returns how many were dropped."""
        self._file.flush()
        lines = _content(self.path).splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step and _label_of(line) != "after"]
        if len(kept) < len(lines):
            self._replace(b"".join(kept))
        return len(lines) - len(kept)

    def restored(self) -> str:
        """Write the log again that was removed or replaced meanwhile, and say so; nothing to say of one that is there.
        What was put in its place is kept under another name. Raises StorageError."""
        assert self._held is not None
        held = os.fstat(self._held.fileno())
        try:
            found = os.lstat(self.path) if os.path.lexists(self.path) else None
            if found is not None and (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino):
                return ""
            self._held.seek(0)
            content = self._held.read()
            aside = None if found is None else set_aside(self.path)
        except OSError as error:
            raise storage_error(error, self.path, what=f"the log {self.path.name}") from error
        self._replace(content)
        what = "was removed" if aside is None else f"was replaced by another file, kept as {aside.name},"
        return f"{self.path.name} {what} while this run wrote it; it was restored with all its lines"

    def compare(self, mark: object, step: int) -> str:
        """What to say of a log that is not the one whose `mark` the checkpoint of `step` keeps (None: one of an earlier
        release); nothing of the same. The log of another run is kept under another name, and this one begun anew, so
        this comes before `truncate_after`.

        Raises StorageError.
        """
        content = _content(self.path)
        logged = (_step_of(line) for line in content.splitlines() if _is_of_step(line))
        steps = [number for number in logged if number <= step]
        missing = sorted({*range(1, step + 1)} - {*steps})
        self.is_complete = not missing
        marked = mark if isinstance(mark, dict) else {}
        size, first = marked.get("bytes"), (marked.get("first_step"), marked.get("first_sha256"))
        if isinstance(size, int) and _sha256(content[:size]) == marked.get("sha256"):
            return ""
        found = _first_step(content)
        if marked and 0 < found[0] <= _number(first[0]) and found != first:
            return self._begun_anew(step)
        repeated = sorted(number for number, count in Counter(steps).items() if count > 1)
        told = [f"is missing {_spans(missing)}"] if missing else []
        told += [f"contains {_spans(repeated)} more than once"] if repeated else []
        what = "the curves and times of the run omit what is gone; of a duplicate step the last line counts"
        if told:
            return f"{self.path.name} {' and '.join(told)}: {what}"
        changed = f"{self.path.name} was changed after step {step} was saved; curves and times are of what it holds now"
        return changed if marked else ""

    def close(self) -> None:
        """Make everything durable and close. Safe to call twice. Raises StorageError, and is closed then, too."""
        if self._held is not None:
            self._held.close()
        if not self._file.closed:
            with self._file:
                self.sync()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, content: bytes) -> None:
        self._file: BufferedWriter = open_appending(self.path)
        if self._held is not None:
            self._held.close()
        self._held = open_regular(self.path)  # keeps the content within reach, whatever becomes of the name
        self._digest, self._size, self._first = hashlib.sha256(), 0, (0, "")
        if content:
            self._count(content)

    def _count(self, written: bytes) -> None:
        self._first = self._first if self._first[0] else _first_step(written)
        self._digest.update(written)
        self._size += len(written)

    def _replace(self, content: bytes) -> None:
        self._file.close()
        replace_file(self.path, content)
        self._open(content)

    def _begun_anew(self, step: int) -> str:
        self._file.close()
        try:
            kept = set_aside(self.path)
            self._open(b"")
        except OSError as error:
            raise storage_error(error, self.path, what=f"the log {self.path.name}") from error
        self.is_complete = False
        return (
            f"{self.path.name} belonged to another run; it is kept as {kept.name}, and the log begins after step {step}"
        )


def read_metrics(path: Path) -> list[dict[str, object]]:
    """All whole lines; a torn or foreign line is left out. An absent file is an empty log. Raises OSError."""
    return [record for line in _content(path).splitlines() if (record := _parsed(line)) is not None]


def last_step(path: Path) -> int | None:
    """The last step that the log has whole; None without any."""
    steps = [int(str(record["step"])) for record in read_metrics(path) if "loss" in record] if path.is_file() else []
    return steps[-1] if steps else None


def loss_before(path: Path) -> float | None:
    """The validation loss of the base, from the line of the evaluation before the first step."""
    for record in read_metrics(path):
        loss = record.get("eval_loss")
        if record.get("label") == "before" and isinstance(loss, float):
            return loss
    return None


def trained_seconds(path: Path) -> float:
    """What all steps in the log took together; of a step that stands there twice the last line counts."""
    steps = (record for record in read_metrics(path) if "loss" in record and isinstance(record.get("step"), int))
    seconds = {record["step"]: record.get("seconds_per_step") for record in steps}
    # A whole number of hundreds of digits, which a damaged log can hold, is no float.
    times = (value for value in seconds.values() if isinstance(value, (int, float)))
    return math.fsum(time for time in times if abs(time) < 2**53)


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


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as stream:
            return stream.read()
    except FileNotFoundError:
        return b""


def _repaired(path: Path, content: bytes) -> tuple[bytes, tuple[str, ...]]:
    """The lines that can be read, and what to say of the others. Those before the end are kept in a file of their own;
    at the end a line is torn by a crash. Raises OSError."""
    lines = content.splitlines(keepends=True)
    # A crash can also leave a line of zeros with its newline, where the length reached the disk before the data.
    whole = len(lines)
    while whole and (not lines[whole - 1].endswith(b"\n") or _parsed(lines[whole - 1]) is None):
        whole -= 1
    torn, notes = lines[whole:], []
    if torn:
        what = "the last line was torn" if len(torn) == 1 else f"the last {len(torn)} lines were torn"
        dropped = "it was" if len(torn) == 1 else "they were"
        notes.append(f"{path.name}: {what} ({sum(map(len, torn))} bytes); {dropped} dropped.")
    kept = [line for line in lines[:whole] if _parsed(line) is not None]
    if len(kept) < whole:
        aside = path.with_name(f"{DAMAGED}{path.name}-{unique_name()}")
        write_new(aside, [content])
        broken = "a line" if whole - len(kept) == 1 else f"{whole - len(kept)} lines"
        notes.append(f"{path.name}: {broken} cannot be read; the file as it was is kept as {aside.name}.")
    return b"".join(kept), tuple(notes)


def _has_other_names(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return path.lstat().st_nlink > 1
    return False


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _is_of_step(line: bytes) -> bool:
    return b'"loss"' in line  # evaluations have "eval_loss"


def _first_step(content: bytes) -> tuple[int, str]:
    """Number and hash of the first line of a step, which no other run has: it holds the seconds that the step took."""
    line = next(filter(_is_of_step, content.splitlines()), b"")
    return (_step_of(line), _sha256(line)) if line else (0, "")


def _spans(steps: Sequence[int], limit: int = 5) -> str:
    """`step 3`, `steps 3 to 5, 9`; rising numbers."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    shown = [str(first) if first == last else f"{first} to {last}" for first, last in spans[:limit]]
    more = f" and {len(spans) - limit} more spans" if len(spans) > limit else ""
    return f"{'step' if len(steps) == 1 else 'steps'} {', '.join(shown)}{more}"
