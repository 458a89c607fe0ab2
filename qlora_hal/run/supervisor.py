"""A run in a child process, for devices whose driver ends a process rather than raise (Metal does).

The child is a fresh interpreter that takes its request as JSON from standard input, runs `train` or `resume` as always,
and leaves its answer as JSON in a file. It stands in a session of its own: signals reach it once, through its parent.
When the parent is gone it stops as if it were asked to, with its state saved. Observers that are Python objects cannot
follow it, so a run with any is not supervised.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_hal.checkpoint.reading import checkpoints
from qlora_hal.config.resolve import ResolvedSettings
from qlora_hal.config.schema import RunConfig
from qlora_hal.detect import discovery
from qlora_hal.detect.discovery import find, load_spec, reports
from qlora_hal.errors import OutOfMemoryError, QloraHalError
from qlora_hal.errors.foreign_output import foreign_output_visible
from qlora_hal.errors.way_on import resume_line
from qlora_hal.processes import child_process
from qlora_hal.processes.child_errors import answer_of, defect_from, ended_from, error_from
from qlora_hal.processes.signals import EndedAtOnce, ended_by_signals, handing_on
from qlora_hal.report.console import RunConsole
from qlora_hal.run.finish import ended_in
from qlora_hal.run.paths import PathOverrides
from qlora_hal.run.result import TrainResult
from qlora_hal.run.start import run_new, run_resumed

SUPERVISED_VARIABLE = "QLORA_HAL_SUPERVISED"
"""Set in the child, which does the work itself."""

_LIKELY_CAUSES: Mapping[int, str] = {
    6: "A driver ends a process that asks for more memory than the device gives, or whose command runs longer than the "
    "display's watchdog allows; its own message is above.",
    9: "The system ends the largest process when memory runs out.",
    11: "A library below the backend read memory that is not there.",
}


def is_supervised(backend: str, observers: Sequence[object]) -> bool:
    """Whether a run on `backend` (or `auto`) may meet a backend that asks for supervision here."""
    if observers or os.environ.get(SUPERVISED_VARIABLE):
        return False

    entries = [entry for entry in discovery.listed() if backend in ("auto", entry.name)]
    for report in reports(entries):
        if report.ready:
            with suppress(QloraHalError):  # told by selection
                if load_spec(find(report.backend, entries)).supervised:
                    return True
    return False


def run_in_child(verb: str, request: Mapping[str, object], run_dir: Path, console: RunConsole | None) -> TrainResult:
    """Carry out `train` or `resume` in a child. Raises what the child raised (RuntimeError for what is not ours),
    EndedAtOnce when a signal handed on ended it, and OutOfMemoryError QH-S24 when it was ended from outside, with the
    way to go on."""
    shown = console.manner if console is not None else {}
    with tempfile.TemporaryDirectory(prefix="qlora-hal-run-") as scratch:
        answer = Path(scratch) / "answer.json"
        text = json.dumps({"verb": verb, "request": request, "console": shown, "answer": str(answer)})
        environment = {**os.environ, SUPERVISED_VARIABLE: "1"}
        command = child_process.module_command("qlora_hal.run.supervisor")
        child = child_process.start(command, text=True, start_new_session=True, env=environment)
        try:
            with handing_on(child.send_signal) as handed:
                _send(child, text)
                child.wait()
        finally:
            child_process.ended(child)
        if not answer.exists():
            if -child.returncode in handed:
                # It was asked to stop before it could listen.
                raise ended_in(run_dir, EndedAtOnce(-child.returncode, again=False))
            raise _ended(child.returncode, run_dir)
        found: Mapping[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in found:
        raise error_from(found["error"])
    if "ended" in found:
        raise ended_from(found["ended"])
    if "defect" in found:
        raise defect_from(found["defect"], "the training process")
    return TrainResult.from_json(found["result"])


def _send(child: subprocess.Popen[str], text: str) -> None:
    """The request, in one line; the pipe stays open."""
    assert child.stdin is not None
    with suppress(BrokenPipeError):  # it died at once; its exit status says more
        child.stdin.write(f"{text}\n")
        child.stdin.flush()


def _ended(status: int, run_dir: Path) -> OutOfMemoryError:
    how = f"exit status {status}"
    if status < 0:
        how = signal.Signals(-status).name
    saved = bool(checkpoints(run_dir))
    return OutOfMemoryError(
        "QH-S24",
        f"The training process was ended by {how}.",
        where=str(run_dir),
        cause=_LIKELY_CAUSES.get(-status, "Its last message is above."),
        fix=f"Resume with: {resume_line(run_dir)}"
        if saved
        else "Lower training.per_device_train_batch_size or data.max_seq_length, set training.gradient_checkpointing "
        "true, and start again; no checkpoint was saved yet.",
        context={"ended_by": how, "has_checkpoint": saved},
    )


# in the child -------------------------------------------------------------------------------------------------------
def main() -> int:
    """Answers on a file; what people read goes to standard error as always."""
    given: Mapping[str, Any] = json.loads(sys.stdin.readline())
    child_process.end_with_parent(child_process.ask_to_stop)
    with ended_by_signals(), foreign_output_visible():
        content = answer_of(lambda: carried_out(given["verb"], given["request"], given["console"]))
    Path(given["answer"]).write_text(json.dumps(content, default=str), encoding="utf-8")
    return 0


def carried_out(verb: str, request: dict[str, Any], shown: Mapping[str, bool]) -> TrainResult:
    """`train` or `resume`, as a parent asked for it in JSON."""
    console = RunConsole(
        quiet=shown.get("quiet", False), json=shown.get("json", False), silent=shown.get("silent", False)
    )
    if verb == "resume":
        run_dir, relocation = Path(request.pop("run_dir")), PathOverrides(**request.pop("relocation"))
        return run_resumed(run_dir, relocation=relocation, observers=(), console=console, **request)
    config, origins = RunConfig.model_validate(request.pop("config")), request.pop("origins")
    return run_new(
        ResolvedSettings(config, origins), request.pop("rows"), (), dry_run=False, console=console, **request
    )


if __name__ == "__main__":
    sys.exit(main())
