"""One rank of a run that `--devices` started: `python -m qlora_hal.ranks.child FOLDER`, by the backend's launcher."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from qlora_hal.errors import StoppedError
from qlora_hal.errors.foreign_output import foreign_output_visible
from qlora_hal.processes import child_process
from qlora_hal.processes.child_errors import answer_of
from qlora_hal.processes.signals import ended_by_signals
from qlora_hal.ranks.identity import world_here
from qlora_hal.ranks.launching import PROCESS_FILE, REQUEST_FILE, answer_file
from qlora_hal.run.supervisor import carried_out


def main(folder: Path) -> int:
    """0 where the run ended well or was asked to stop; 1 where anything went wrong, so that the launcher ends the other
    ranks."""
    child_process.end_with_starter()
    given = json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))
    file = folder / answer_file(world_here().rank)
    file.unlink(missing_ok=True)  # of the ranks before a restart
    with ended_by_signals(), foreign_output_visible():
        if world_here().rank == 0:  # a request to save waits from here on, and ends nothing
            (folder / PROCESS_FILE).write_text(str(os.getpid()), encoding="utf-8")
        answer = answer_of(lambda: carried_out(given["verb"], given["request"], given["console"]))
        (folder / PROCESS_FILE).unlink(missing_ok=True)
    with suppress(FileNotFoundError):  # who would read it is gone, and the folder with it
        whole = file.with_suffix(".whole")
        whole.write_text(json.dumps(answer, default=str), encoding="utf-8")
        whole.replace(file)
    return 0 if answer.keys() & {"result", "ended"} or is_stop(answer.get("error")) else 1


def is_stop(error: object) -> bool:
    """Whether it is the end that was asked for: the state is saved, and the run can be resumed."""
    return isinstance(error, dict) and error["exit_status"] == StoppedError.exit_status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
