"""A process that saves steps 1, 2 and 3, then step 3 again with other content; a fault is armed from step 3 on.

Usage: python saving_child.py RUN_DIR FAULT. Prints `saved STEP VARIANT` when `save_checkpoint` has returned.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from qlora_hal.checkpoint import save_checkpoint
from tests.checkpoint.small_states import small_state

SAVES = ((1, 0), (2, 0), (3, 0), (3, 1))


def main() -> None:
    run_dir, fault = Path(sys.argv[1]), sys.argv[2]
    for step, variant in SAVES:
        if step == 3:
            os.environ["QLORA_HAL_FAULTS"] = fault
        save_checkpoint(run_dir, small_state(step, variant), keep=2)
        print("saved", step, variant, flush=True)


if __name__ == "__main__":
    main()
