"""What the hashes of the token store cost: a million rows of 150 tokens written, opened without them and with them.

Prints JSON; seconds are of the processor, `wall` of the clock. Run: python benchmarks/token_hashes.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qlora_hal.data.tokens.store import TokenWriter, open_store
from qlora_hal.data.tokens.token_rows import TokenRows

CHUNK = 10_000


def timed(work: Callable[[], object]) -> dict[str, float]:
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return {"seconds": round(time.process_time() - processor, 2), "wall": round(time.perf_counter() - clock, 2)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--length", type=int, default=150)
    asked = parser.parse_args()
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 32_768, CHUNK * asked.length).astype(np.int32)
    numbers = np.arange(CHUNK)
    rows = TokenRows(ids, np.ones(len(ids), np.uint8), np.full(CHUNK, asked.length), numbers, numbers.astype(np.uint64))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens" / "rows.safetensors"
        with TokenWriter(path) as writer:
            for _ in range(asked.rows // CHUNK):
                writer.append(rows)
            joined = timed(lambda: writer.finish({"report": "{}"}))
        content = path.read_bytes()
        found = {
            "bytes": len(content),
            "joined_and_hashed": joined,
            "hashing_alone": timed(lambda: hashlib.sha256(content)),
            "opened": timed(lambda: open_store(path, verify=False)),
            "opened_and_verified": timed(lambda: open_store(path)),
        }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
