"""Runs of several ranks on this machine's CPU, started as a user starts them. Tests only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from small_runs import SMALL, merged

from qlora_hal.demo import data_path

SEQUENCES = 6
"""In a step: one, two and three ranks can share them."""
QUICK: dict[str, Any] = {
    "data.max_seq_length": 64,
    "lora.r": 4,
    "lora.target_modules": ["q_proj"],
    "lora.dropout": 0.1,
    "training.max_steps": 16,
    "training.per_device_train_batch_size": 1,
    "training.gradient_accumulation_steps": 1,
    "training.global_batch_size": SEQUENCES,
    "checkpoint.save_steps": 2,
}
PATIENCE = 240.0


def quick(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a quick run into `folder`, whose step is the same with one, two and three ranks."""
    rows = folder.parent / "forty_rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(data_path("train").read_text(encoding="utf-8").splitlines(keepends=True)[:40]))
    return merged(SMALL, {**QUICK, "data.path": str(rows), "output_dir": str(folder), **changes})


def settings_file(settings: Mapping[str, Any], name: str = "settings.json") -> Path:
    file = Path(settings["output_dir"]).with_suffix(f".{name}")
    file.write_text(json.dumps(settings))
    return file


class Command:
    """A command that runs, with what it has said so far on both streams."""

    def __init__(self, words: list[str], **environment: str) -> None:
        known = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**known, "CI": "1", "OMP_NUM_THREADS": "1", **environment},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def said(self) -> str:
        return " ".join("".join(self.lines).split())

    def ended(self) -> int:
        """Its exit status."""
        status = self.process.wait(PATIENCE)
        self._reader.join(10)
        return status

    def until(self, words: str) -> None:
        """Wait until it has said so."""
        wait_for(lambda: words in self.said or self.process.poll() is not None)
        assert words in self.said, self.said


@contextmanager
def running(words: list[str], **environment: str) -> Iterator[Command]:
    command = Command(words, **environment)
    try:
        yield command
    finally:
        for process in below(command.process.pid):
            process.kill()
        command.process.kill()
        command.process.wait()
        command._reader.join(10)
        assert command.process.stdout is not None
        command.process.stdout.close()


def qlora_hal(*words: str) -> list[str]:
    return [sys.executable, "-m", "qlora_hal", *words]


def torchrun(*words: str, options: tuple[str, ...] = ("--standalone", "--nproc-per-node", "2")) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "qlora_hal", *words]


def below(process: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process).children(recursive=True)
    except psutil.Error:
        return []


def rank_process(command: Command, rank: int) -> psutil.Process:
    """The process of a rank that the command started."""

    process = wait_for(lambda: rank_below(command, rank))
    assert isinstance(process, psutil.Process)
    return process


def rank_below(command: Command, rank: int) -> psutil.Process | None:
    """The same where it is there now."""
    for process in below(command.process.pid):
        try:
            words, given = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if given.get("RANK") == str(rank) and {"qlora_hal", "qlora_hal.ranks.child"} & set(words):
            return process
    return None


def wait_for(ready: Callable[[], Any]) -> Any:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if found := ready():
            return found
        time.sleep(0.02)
    raise AssertionError("waited too long")


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that are of steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in steps_of(run)]


def windows(run: Path) -> list[tuple[int, int, int, float]]:
    """What of each step tells which rows it had."""
    return [(line["step"], line["token_count"], line["tokens_seen"], line["learning_rate"]) for line in steps_of(run)]


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def record(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "run.json").read_text())
    return content
