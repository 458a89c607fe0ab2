"""Feed hostile inputs to every reader of strangers' files: `python benchmarks/fuzz_readers.py --inputs 300000`.

Input number N of a seed is always the same, so a finding is repeated by `--only N`. Each input must be read or refused
by a typed error, in at most 2 seconds of processor time and 300 MB of memory. Inputs run in a child process, so that
one that aborts or hangs is a finding, too; what is done is kept in `--state`, and a second call goes on from there.
`--record` writes what was counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
from fuzzed_readers import ROOT, Reader, readers

from qlora_hal.errors import QloraHalError

SECONDS, MEMORY_BYTES = 2.0, 300 * 10**6
INPUTS_OF_CHILD, INPUTS_BETWEEN_SAVES = 20_000, 500
_SECONDS_WITHOUT_A_WORD = 600.0
_ADDRESS_SPACE = 12 * 2**30


@dataclass(frozen=True)
class Outcome:
    """What became of one input. `ending` is `read`, a code, or `untyped`."""

    number: int
    reader: str
    ending: str
    seconds: float
    memory_bytes: int
    problem: str = ""


def chosen(number: int, found: Sequence[Reader]) -> Reader:
    """The reader of an input: each has its share, and what is cheap three times as much."""
    shares = [reader.share * (3 if reader.cheap else 1) for reader in found]
    place = number % sum(shares)
    return next(reader for reader, end in zip(found, accumulate(shares), strict=True) if place < end)


def fed(seed: int, number: int, reader: Reader) -> Outcome:
    """Write the input and have it read."""
    data = reader.input(random.Random(f"{seed}:{number}:{reader.name}"))
    reader.file.write_bytes(data)
    process = psutil.Process()
    memory = process.memory_info().rss
    started, child = time.process_time(), _of_children(process, reader)
    ending, problem = "read", ""
    try:
        reader.read(reader.file)
    except QloraHalError as error:
        ending = error.code
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        ending = "untyped"
        problem = "".join(traceback.format_exception(error))[-1500:]
    seconds = time.process_time() - started + max(0.0, _of_children(process, reader) - child)
    grown = max(0, _peak_bytes() - memory) if _peak_bytes() > memory else 0
    if not problem and seconds > SECONDS + 0.5 * reader.has_child:
        problem = f"{seconds:.1f} seconds"
    return Outcome(number, reader.name, ending, seconds, grown, problem)


def _of_children(process: psutil.Process, reader: Reader) -> float:
    if not reader.has_child:
        return 0.0
    return sum(sum(child.cpu_times()[:2]) for child in process.children())


def _peak_bytes() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def outcomes(seed: int, numbers: Sequence[int], found: Sequence[Reader]) -> Iterator[Outcome]:
    """Feed inputs one after the other in this process."""
    peak = _peak_bytes()
    for number in numbers:
        outcome = fed(seed, number, chosen(number, found))
        # The peak of a process never falls: only what raises it is told of this input.
        grown = outcome.memory_bytes if _peak_bytes() > peak else 0
        peak = max(peak, _peak_bytes())
        problem = outcome.problem or (f"{grown / 1e6:.0f} MB" if grown > MEMORY_BYTES else "")
        yield Outcome(number, outcome.reader, outcome.ending, outcome.seconds, grown, problem)


# Many inputs, in child processes -----------------------------------------------------------------------------------


def worker(seed: int, first: int, last: int) -> None:
    """In the child: one JSON line when an input begins to take long enough to matter, one for each outcome."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        found = readers(Path(scratch))
        for outcome in outcomes(seed, range(first, last), found):
            print(json.dumps(asdict(outcome)), file=said, flush=True)


def of_child(seed: int, first: int, last: int) -> Iterator[dict[str, Any]]:
    """Outcomes of a child that was given these inputs; the last is the input at which it ended too early."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", f"{seed}:{first}:{last}"]
    environment = {**os.environ, "RUST_BACKTRACE": "0", "COLUMNS": "120"}
    reached = first
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    ) as child:
        heard = _killed_when_silent(child)
        assert child.stdout is not None
        try:
            for line in child.stdout:
                heard()
                reached += 1
                yield json.loads(line)
        finally:
            heard(ended=True)
            child.kill()
    if reached < last:
        yield asdict(Outcome(reached, "", "ended the process", 0.0, 0, f"the process ended with {child.returncode}"))


def _killed_when_silent(child: subprocess.Popen[str]) -> Any:
    import threading

    spoke = [time.monotonic(), False]

    def watch() -> None:
        while not spoke[1] and child.poll() is None:
            if time.monotonic() - spoke[0] > _SECONDS_WITHOUT_A_WORD:
                child.kill()
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()

    def said(*, ended: bool = False) -> None:
        spoke[0], spoke[1] = time.monotonic(), ended

    return said


@dataclass
class Counts:
    """What was counted so far; the content of the state file and of the record."""

    seed: int
    inputs: int
    readers: dict[str, dict[str, Any]]
    findings: list[dict[str, Any]]

    def add(self, outcome: dict[str, Any]) -> None:
        self.inputs = outcome["number"] + 1
        reader = self.readers.setdefault(
            outcome["reader"], {"inputs": 0, "endings": {}, "seconds": 0.0, "most_seconds": 0.0, "most_megabytes": 0}
        )
        reader["inputs"] += 1
        endings = Counter(reader["endings"])
        endings[outcome["ending"]] += 1
        reader["endings"] = dict(sorted(endings.items()))
        reader["seconds"] = round(reader["seconds"] + outcome["seconds"], 3)
        reader["most_seconds"] = max(reader["most_seconds"], round(outcome["seconds"], 3))
        reader["most_megabytes"] = max(reader["most_megabytes"], round(outcome["memory_bytes"] / 1e6))
        if outcome["problem"]:
            self.findings.append(outcome)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, default=ROOT / ".scratch" / "fuzz_readers.json")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--only", type=int, help="Feed one input here and keep it beside the state.")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(*map(int, given.worker.split(":")))
        return 0
    given.state.parent.mkdir(parents=True, exist_ok=True)
    if given.only is not None:
        return alone(given.seed, given.only, given.state.parent)
    counts = Counts(given.seed, 0, {}, [])
    if given.state.exists():
        counts = Counts(**json.loads(given.state.read_text("utf-8")))
    while counts.inputs < given.inputs:
        last = min(given.inputs, counts.inputs + INPUTS_OF_CHILD)
        for outcome in of_child(counts.seed, counts.inputs, last):
            counts.add(outcome)
            if outcome["problem"]:
                print(f"{outcome['number']} {outcome['reader']}: {outcome['problem']}", flush=True)
            if counts.inputs % INPUTS_BETWEEN_SAVES == 0:
                given.state.write_text(json.dumps(asdict(counts), indent=1), "utf-8")
        given.state.write_text(json.dumps(asdict(counts), indent=1), "utf-8")
    if given.record:
        given.record.write_text(json.dumps(record_of(counts), indent=2) + "\n", "utf-8")
    print(f"{counts.inputs} inputs, {len(counts.findings)} findings")
    return 1 if counts.findings else 0


def record_of(counts: Counts) -> dict[str, object]:
    """The counts with their totals, as docs/runs keeps them."""
    endings: Counter[str] = Counter()
    for reader in counts.readers.values():
        endings.update(reader["endings"])
    return {
        "command": f"python benchmarks/fuzz_readers.py --inputs {counts.inputs} --seed {counts.seed}",
        "limits": {"seconds": SECONDS, "megabytes": MEMORY_BYTES // 10**6},
        "inputs": counts.inputs,
        "read": endings["read"],
        "refused_by_a_typed_error": sum(count for ending, count in endings.items() if ending.startswith("QH-")),
        "untyped": endings["untyped"],
        "ended_the_process": endings["ended the process"],
        "most_seconds": max(reader["most_seconds"] for reader in counts.readers.values()),
        "most_megabytes": max(reader["most_megabytes"] for reader in counts.readers.values()),
        "findings": counts.findings,
        "readers": dict(sorted(counts.readers.items())),
    }


def alone(seed: int, number: int, kept: Path) -> int:
    """One input in this process."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        reader = chosen(number, readers(Path(scratch)))
        outcome = fed(seed, number, reader)
        copy = kept / f"{seed}-{number}-{reader.file.name}"
        copy.write_bytes(reader.input(random.Random(f"{seed}:{number}:{reader.name}")))
    print(f"{outcome.reader}: {outcome.ending}, {outcome.seconds:.2f} s; the input is {copy}\n{outcome.problem}")
    return 1 if outcome.problem else 0


if __name__ == "__main__":
    sys.exit(main())
