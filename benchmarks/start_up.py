"""What starting costs, beyond the bare interpreter's own start.

    python benchmarks/start_up.py [--runs 15]

Bounds of the project: `import qlora_hal` 0.15 s, `qlora-hal --help` 0.4 s, `qlora-hal backends` 1 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

PROGRAMS = {
    "import qlora_hal": ["-c", "import qlora_hal"],
    "from qlora_hal import train": ["-c", "from qlora_hal import train"],
    "qlora-hal --help": ["-m", "qlora_hal.cli", "--help"],
    "qlora-hal backends": ["-m", "qlora_hal.cli", "backends"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    bare = median_seconds(["-c", "pass"], runs)
    beyond = {name: round(median_seconds(program, runs) - bare, 3) for name, program in PROGRAMS.items()}
    print(json.dumps({"bare interpreter": round(bare, 3), "seconds beyond it": beyond}, indent=2))


def median_seconds(arguments: list[str], runs: int) -> float:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
