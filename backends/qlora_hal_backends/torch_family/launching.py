"""The ranks of one machine, started and watched by torchrun's agent: `python -m ... RANKS MAX_RESTARTS MODULE FOLDER`.

The agent brings the meeting place, the restarts, and the end of all when one fails. How they failed is left as JSON,
`[[rank, how], ...]`, the first one first; the agent's own report of it is kept from the terminal.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qlora_hal.processes import child_process

FAILURES_FILE = "failures.json"
HERE = "localhost"
SECONDS_TO_SAVE = 600
"""How long a rank that is asked to stop has to finish its step and to save."""
POLL_SECONDS = 0.1


def main(arguments: Sequence[str]) -> int:
    ranks, restarts, module, folder = int(arguments[0]), int(arguments[1]), arguments[2], Path(arguments[3])
    child_process.end_with_parent(child_process.ask_to_stop)
    logging.disable(logging.CRITICAL)  # torch gives each of its loggers a level of its own
    try:
        interpreter, *rest = child_process.module_command(module, str(folder))
        elastic_launch(_settings(ranks, restarts, folder), interpreter)(*rest)
    except ChildFailedError as failed:
        first_to_last = sorted(failed.failures.items(), key=lambda item: item[1].timestamp)
        told = [
            [rank, failure.signal_name() if failure.exitcode < 0 else f"exit status {failure.exitcode}"]
            for rank, failure in first_to_last
        ]
        (folder / FAILURES_FILE).write_text(json.dumps(told), encoding="utf-8")
        return 1
    except SignalException:
        return 0  # the ranks have had their time to save, and have said how they ended
    return 0


def _settings(ranks: int, restarts: int, folder: Path) -> LaunchConfig:
    known = inspect.signature(LaunchConfig).parameters
    later = {"shutdown_timeout": SECONDS_TO_SAVE} if "shutdown_timeout" in known else {}
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{HERE}:0",
        local_addr=HERE,  # by default the machine's own name, which not every machine can look up
        max_restarts=restarts,
        monitor_interval=POLL_SECONDS,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        **later,  # type: ignore[arg-type]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
