"""A training run that goes on in a process of its own, from a checkpoint on disk, as a user's would.

Nothing there tells of a test: the script is a copy of `user_script.py`, which knows the core alone, in a folder of its
own with a copy of the model; neither arguments, environment, paths nor ancestors name pytest or this suite. A backend
that computes rightly only where it is watched is not watched there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qlora_hal.checkpoint import TrainingState, load_checkpoint
from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.values import Batch, Float32
from qlora_hal_conformance.fixtures import placed
from qlora_hal_conformance.request import REQUEST_VARIABLE
from qlora_hal_conformance.subject import Reference
from qlora_hal_conformance.user_script import FIELDS

CHILD_SECONDS = 1800.0
"""A last resort: a child that makes no progress is ended with its case, by a clock that knows of busy machines."""
POLL_SECONDS = 0.05
SCRIPT = Path(__file__).with_name("user_script.py")
TELLING = ("PYTEST", "CONFORMANCE")
"""Parts of names of variables that tell of a test."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """Which backend goes on, on which base, from which checkpoint, at which rate, and how it computes."""

    reference: Reference
    model: Path
    quantization: Quantization
    dtype: str
    checkpoint: Path
    learning_rate: float
    weight_decay: float = 0.1
    checkpointing: bool = False
    options: Mapping[str, object] = field(default_factory=dict)


def continue_in_child(work: Continuation, windows: Sequence[Sequence[Batch]]) -> tuple[TrainingState, Float32]:
    """Train on `windows` in a fresh process; the state it ends in, and its logits of the first batch it was given.
    Raises AssertionError when it fails or hangs."""
    home = Path(tempfile.mkdtemp(dir=_outside()))
    try:
        _lay_out(home, work, windows)
        _run(home)
        after = load_checkpoint(next((home / "out" / "checkpoints").glob("step-*")))
        logits: Float32 = np.load(home / "logits.npy")
        return after, logits
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _outside() -> Path:
    """The folder for temporary files that the user has; that of a run of the suite lies in it."""
    folder = Path(os.environ[REQUEST_VARIABLE]).parent if REQUEST_VARIABLE in os.environ else None
    return folder.parent if folder is not None else Path(tempfile.gettempdir())


def _lay_out(home: Path, work: Continuation, windows: Sequence[Sequence[Batch]]) -> None:
    """Script, model, checkpoint and data, as in a project of a user's."""
    shutil.copyfile(SCRIPT, home / "finetune.py")
    shutil.copytree(work.model, home / "base")
    checkpoint = home / "run" / "checkpoints" / work.checkpoint.name
    shutil.copytree(work.checkpoint, checkpoint)
    (home / "tmp").mkdir()
    arrays = {
        f"{n}/{m}/{name}": getattr(batch, name)
        for n, window in enumerate(windows)
        for m, batch in enumerate(placed(window))
        for name in FIELDS
    }
    # Only object arrays would be pickled, and these are none; numpy 1 takes `allow_pickle` for the name of an array.
    np.savez(home / "data.npz", **arrays)
    quantization = work.quantization
    record = {
        "backend": work.reference.as_json(),
        "model": "base",
        "quantization": [quantization.weight_format.value, quantization.block_size, quantization.double_quant],
        "dtype": work.dtype,
        "checkpoint": str(checkpoint.relative_to(home)),
        "learning_rate": work.learning_rate,
        "weight_decay": work.weight_decay,
        "checkpointing": work.checkpointing,
        "options": dict(work.options),
        "seconds": CHILD_SECONDS,
    }
    (home / "run.json").write_text(json.dumps(record), encoding="utf-8")


def _run(home: Path) -> None:
    """The script, by a shell that does not stay: its parent is no test runner."""
    command = f"({_quoted(sys.executable)} finetune.py > log.txt 2>&1 < /dev/null; echo $? > status.part; "
    command += "mv status.part status.txt) &"
    detached = os.name == "posix"
    child = subprocess.Popen(
        ["/bin/sh", "-c", command] if detached else [sys.executable, "finetune.py"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=home,
        env=_environment(home),
        start_new_session=True,
    )
    try:
        status = _ended(home) if detached else child.wait(CHILD_SECONDS)
    except (TimeoutError, subprocess.TimeoutExpired) as error:
        raise AssertionError(f"the continuing process did not end within {CHILD_SECONDS:.0f} s") from error
    finally:
        if detached:
            with suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    log = home / "log.txt"
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    assert status == 0, f"the continuing process ended with status {status}: {(said or ['no message'])[-1]}"


def _ended(home: Path) -> int:
    """The status of the script, once it has ended. Raises TimeoutError."""
    until = time.monotonic() + CHILD_SECONDS
    while time.monotonic() < until:
        if (home / "status.txt").exists():
            return int((home / "status.txt").read_text(encoding="utf-8"))
        time.sleep(POLL_SECONDS)
    raise TimeoutError


def _environment(home: Path) -> dict[str, str]:
    """What the user has set, without what the suite and its runner have."""
    inherited = {n: v for n, v in os.environ.items() if not any(part in n.upper() for part in TELLING)}
    return {**inherited, "TMPDIR": str(home / "tmp"), "PWD": str(home)}


def _quoted(path: str) -> str:
    return "'" + path.replace("'", "'\\''") + "'"
