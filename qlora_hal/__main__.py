"""`python -m qlora_hal`, as torchrun and `mlx.launch` start it: the same as `qlora-hal`."""

import sys

from qlora_hal.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
