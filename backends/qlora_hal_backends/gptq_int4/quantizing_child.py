"""The child process in which an engine quantizes: `python -m qlora_hal_backends.gptq_int4.quantizing_child JOB`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TextIO, cast

from qlora_hal.errors import QloraHalError
from qlora_hal.processes.child_errors import told_of
from qlora_hal.processes.child_process import end_with_parent
from qlora_hal_backends.gptq_int4.engines import Quantize, installed_engine, load_function
from qlora_hal_backends.gptq_int4.quantizing import job_from_json

SECONDS_BETWEEN_REPORTS = 2.0


def main(path: Path) -> int:
    """Do the job; the exit status."""
    end_with_parent()
    said = _own_output()
    name, job = job_from_json(json.loads(path.read_text(encoding="utf-8")))
    last = 0.0

    def report(done: int, total: int, what: str) -> None:
        nonlocal last
        if done in (0, total) or time.monotonic() - last > SECONDS_BETWEEN_REPORTS:
            last = time.monotonic()
            print(json.dumps({"done": done, "total": total, "what": what}), file=said, flush=True)

    try:
        cast(Quantize, load_function(installed_engine(name).quantize))(job, report)
    except QloraHalError as error:
        print(json.dumps({"refusal": told_of(error)}), file=said, flush=True)
        return 1
    except Exception as error:
        import traceback

        traceback.print_exc()
        message = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        failure = {"kind": type(error).__name__, "message": message}
        print(json.dumps({"failure": failure}), file=said, flush=True)
        return 1
    return 0


def _own_output() -> TextIO:
    """The standard output, kept for this module: what libraries print goes to the standard error."""
    said = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return said


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(status)  # worker threads of an engine do not keep a finished process
