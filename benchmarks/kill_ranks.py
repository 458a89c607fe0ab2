"""Kill a random rank of a run on several devices at a random moment, let it start anew, and compare the end with a run
of as many ranks that nobody disturbed, bit for bit.

    python benchmarks/kill_ranks.py --kills 20 --out docs/runs/kills_ranks_cpu.jsonl

Every case is `qlora-hal train ... --devices 2 --max-restarts 1` on the demo with `cpu_torch`. A third of the kills
(SIGKILL) come at a random time after the rank was started, up to the time an undisturbed run takes; the others up to
half a second after a random step. Cases are a function of their number and the seed. FILE gets one line a case, as each
ends: started again with the same FILE, the command goes on after the last of them. The exit status is 1 when a run was
lost or a bit differed.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from qlora_hal.demo import data_path, model_path

STEPS, SAVE_EVERY, ROWS = 24, 4, 200
CHILD = "qlora_hal.ranks.child"
PATIENCE = 600.0
"""Seconds after which a run that has not ended counts as hung."""
POLL = 0.02
AFTER_A_STEP = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="one JSON line a case")
    chosen = parser.parse_args(argv)
    head = {"backend": "cpu_torch", "ranks": chosen.ranks, "seed": chosen.seed, "steps": STEPS, "save": SAVE_EVERY}
    lines = read_record(chosen.out, head)
    with tempfile.TemporaryDirectory(prefix="kill-ranks-") as scratch:
        work = Path(scratch)
        settings = write_settings(work)
        undisturbed, seconds = reference_run(settings, work / "undisturbed", chosen.ranks)
        while sum(line["killed"] for line in lines) < chosen.kills:
            number = len(lines)
            drawn = draw(random.Random(f"{chosen.seed}/{number}"), chosen.ranks, seconds)
            line = {"case": number, **killed_run(settings, work / f"case-{number}", chosen.ranks, drawn, undisturbed)}
            lines.append(line)
            with chosen.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    return summed_up(lines)


def read_record(file: Path, head: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cases that FILE has; a new one gets its head. Raises SystemExit for the record of something else."""
    if not file.exists():
        file.write_text(json.dumps(head) + "\n", encoding="utf-8")
    found, *cases = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if found != head:
        raise SystemExit(f"{file} is the record of {found}, not of {head}; name another file")
    return cases


def write_settings(work: Path) -> Path:
    """The demo's model on some of its rows, as a settings file."""
    rows = work / "rows.jsonl"
    rows.write_text("".join(data_path("train").read_text(encoding="utf-8").splitlines(keepends=True)[:ROWS]))
    tree = {
        "model": {"name_or_path": str(model_path())},
        "data": {"path": str(rows), "max_seq_length": 128, "truncation": "drop"},
        "lora": {"r": 8, "dropout": 0.1},
        "training": {"max_steps": STEPS, "per_device_train_batch_size": 2, "seed": 5, "learning_rate": 2e-3},
        "checkpoint": {"save_steps": SAVE_EVERY},
        "backend": {"name": "cpu_torch"},
    }
    settings = work / "run.json"
    settings.write_text(json.dumps(tree))
    return settings


def draw(source: random.Random, ranks: int, seconds: float) -> dict[str, Any]:
    """Whom to kill, and when."""
    rank = source.randrange(ranks)
    if source.random() < 1 / 3:
        return {"rank": rank, "after_start_s": round(source.uniform(0.0, seconds), 3)}
    return {"rank": rank, "step": source.randint(1, STEPS - 1), "delay_s": round(source.uniform(0, AFTER_A_STEP), 3)}


def started(settings: Path, folder: Path, ranks: int, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qlora_hal", "train", str(settings), "--output_dir", str(folder)]
    command += ["--devices", str(ranks), *more]
    log = folder.with_suffix(".log").open("wb")
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "CI": "1", "OMP_NUM_THREADS": "1"})


def reference_run(settings: Path, folder: Path, ranks: int) -> tuple[Mapping[str, Any], float]:
    """The adapter of a run that nobody disturbed, and the seconds that its ranks took."""
    child = started(settings, folder, ranks)
    wait_for(lambda: process_of(child.pid, 0) is not None or child.poll() is not None)
    began = time.monotonic()
    if child.wait(PATIENCE):
        raise SystemExit(f"the undisturbed run failed: {folder.with_suffix('.log').read_text()[-2000:]}")
    return adapter_of(folder), time.monotonic() - began


def killed_run(
    settings: Path, folder: Path, ranks: int, drawn: Mapping[str, Any], undisturbed: Mapping[str, Any]
) -> dict[str, Any]:
    """One run that is killed once, and how it ended."""
    began = time.monotonic()
    child = started(settings, folder, ranks, "--max-restarts", "1")
    try:
        found = wait_for(lambda: process_of(child.pid, drawn["rank"]) or (child.poll() is not None and "ended"))
        if "step" in drawn:
            wait_for(lambda: steps_in(folder) >= drawn["step"] or child.poll() is not None)
        time.sleep(drawn.get("after_start_s", drawn.get("delay_s", 0.0)))
        reached = steps_in(folder)
        was_there = isinstance(found, psutil.Process) and found.is_running()
        if was_there:
            found.kill()
        status = child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        status, was_there, reached = -1, True, steps_in(folder)
    finally:
        child.kill()
    told = {**drawn, "killed": was_there, "steps_before": reached, "status": status}
    told["seconds"] = round(time.monotonic() - began, 1)
    if status:
        return {**told, "verdict": "lost", "said": folder.with_suffix(".log").read_text(errors="replace")[-1500:]}
    bits = differing_bits(undisturbed, adapter_of(folder))
    return {**told, "differing_bits": bits, "verdict": "equal" if bits == 0 else "differs"}


def process_of(parent: int, rank: int) -> psutil.Process | None:
    """The process of a rank below `parent`, once it is there."""
    try:
        for process in psutil.Process(parent).children(recursive=True):
            if CHILD in process.cmdline() and process.environ().get("RANK") == str(rank):
                return process
    except psutil.Error:  # it is being started, or is gone
        return None
    return None


def steps_in(folder: Path) -> int:
    """Steps that the log of a run has."""
    try:
        return sum(b'"loss"' in line for line in (folder / "metrics.jsonl").read_bytes().splitlines())
    except OSError:
        return 0


def wait_for(ready: Any) -> Any:
    """What `ready` gives as soon as it is true."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if found := ready():
            return found
        time.sleep(POLL)
    raise SystemExit("waited too long for a run to begin")


def adapter_of(folder: Path) -> Mapping[str, Any]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def differing_bits(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Bits that differ; all of a tensor that only one has."""
    if one.keys() != other.keys():
        return sum(tensor.nbytes * 8 for tensor in one.values())
    return sum(
        int(np.unpackbits(np.bitwise_xor(one[name].view(np.uint8), other[name].view(np.uint8))).sum()) for name in one
    )


def summed_up(lines: Sequence[Mapping[str, Any]]) -> int:
    killed = [line for line in lines if line["killed"]]
    lost = sum(line["verdict"] == "lost" for line in lines)
    bits = sum(line.get("differing_bits", 0) for line in lines)
    print(f"{len(killed)} kills in {len(lines)} runs: {lost} lost runs, {bits} differing bits")
    return int(lost > 0 or bits > 0)


if __name__ == "__main__":
    sys.exit(main())
