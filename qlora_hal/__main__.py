"""`python -m qlora_hal` is `qlora-hal`, and so `torchrun --nproc-per-node 2 -m qlora_hal train run.yaml`."""

from __future__ import annotations

import sys

from qlora_hal.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
