"""How work in a child process ended, on its way to the parent."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_hal import errors
from qlora_hal.errors import QloraHalError
from qlora_hal.processes.signals import EndedAtOnce

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def answer_of(work: Callable[[], DataclassInstance]) -> dict[str, object]:
    """Its result, or how it ended, as JSON holds it: `result`, `error`, `ended` (by a signal) or `defect`."""
    try:
        return {"result": asdict(work())}
    except QloraHalError as error:
        return {"error": {**told_of(error), "exit_status": error.exit_status}}
    except EndedAtOnce as ended:
        run_dir = None if ended.run_dir is None else str(ended.run_dir)
        return {"ended": {"number": ended.number, "run_dir": run_dir, "safe_step": ended.safe_step}}
    except KeyboardInterrupt:
        return {"ended": {"number": signal.SIGINT, "run_dir": None, "safe_step": None}}
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        return {"defect": {"summary": f"{type(error).__name__}: {error}", "trace": trace}}


def ended_from(told: Mapping[str, Any]) -> EndedAtOnce:
    """The end by a signal that `answer_of` wrote down."""
    ended = EndedAtOnce(told["number"])
    ended.run_dir = None if told["run_dir"] is None else Path(told["run_dir"])
    ended.safe_step = told["safe_step"]
    return ended


def defect_from(told: Mapping[str, str], process: str) -> RuntimeError:
    """What was not ours, with its traceback as a note."""
    error = RuntimeError(f"in {process}: {told['summary']}")
    error.add_note(told["trace"])
    return error


def told_of(error: QloraHalError) -> dict[str, object]:
    """An error as JSON holds it on its way between processes; `error_from` reads it."""
    told = {name: getattr(error, name) for name in ("code", "message", "where", "cause", "fix", "context")}
    return {"class": type(error).__name__, **told}


def error_from(told: Mapping[str, Any]) -> QloraHalError:
    """The error that `told_of` wrote down in another process."""
    kind = getattr(errors, told["class"], QloraHalError)
    error: QloraHalError = kind(
        told["code"],
        told["message"],
        where=told["where"],
        cause=told["cause"],
        fix=told["fix"],
        context=told["context"],
    )
    return error
