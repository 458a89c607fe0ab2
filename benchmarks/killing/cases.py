"""One case: a run that is killed, goes on, is perhaps killed again, and at its end holds the bits of one that never
was."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from killing.forking import Ended, in_fork
from killing.groups import Settings, settings_file
from killing.triggers import PHASES, STARTING, Kill
from qlora_hal.checkpoint import checkpoints
from qlora_hal.checkpoint.faults import FAULT_POINTS

MOST_KILLS = 4
_ONCE_MORE, _TWICE = 0.35, 0.2
_PASSES_OF_A_POINT = 6
_SIGNALS = {"SIGKILL": 60, "SIGTERM": 13, "SIGINT": 10, "SIGHUP": 9, "SIGUSR1": 8}
_WAYS = {"phase": 60, "point": 20, "time": 20}
_TIMING_KEYS = frozenset({"tokens_per_second", "seconds_per_step", "memory_bytes"})
_NOT_COMPARED = frozenset({"run_id", "config_hash", "metrics", "content_sha256"})
"""What tells one run from another: its id, its configuration with its places, a hash of its log with its times, and the
seal on these."""
_RESULT_KEYS = ("status", "stopped_because", "steps", "tokens", "eval_loss_before", "eval_loss_after", "eval_loss_best")
_LEFTOVERS = (".staging", ".pruning", ".replaced", ".tmp-", ".corrupt")


@dataclass(frozen=True)
class Golden:
    """An uninterrupted run: what it left, how long it took, how many calls each phase made."""

    result: Mapping[str, Any]
    seconds: float
    calls: Mapping[str, int]

    @classmethod
    def read(cls, path: Path) -> Golden:
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


@dataclass
class Outcome:
    """`kills` are those that were sent, each with the exit status; `problems` are empty when all is as promised."""

    kills: list[dict[str, object]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        return "equal" if not self.problems else self.problems[0].partition(":")[0]


def golden_run(settings: Settings, inputs: Path, folder: Path, teach: Path | None = None) -> Golden:
    """Train without interruption. Raises RuntimeError when that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    file = settings_file(folder / "settings.json", settings, inputs, folder / "run")
    ended = in_fork(["train", str(file)], folder, teach=teach)
    if ended.status != 0:
        raise RuntimeError(f"a run that nobody killed ended with {ended.status}:\n{ended.said[-3000:]}")
    return Golden(result_of(folder / "run"), ended.seconds, ended.calls)


def drawn_kills(draw: random.Random, golden: Golden) -> list[Kill]:
    """One, or sometimes a few after each other."""
    kills = [drawn_kill(draw, golden)]
    while len(kills) < MOST_KILLS and draw.random() < _ONCE_MORE:
        kills.append(drawn_kill(draw, golden))
    return kills


def planned_kill(text: str, golden: Golden) -> Kill:
    """`SIGTERM@loading:0.5`, where half of that phase is done; `SIGKILL@ckpt.after_rename:2`, at the second pass."""
    name, _, place = text.partition("@")
    where, _, when = place.partition(":")
    if where in FAULT_POINTS:
        return Kill(name, point=where, call=int(when))
    return Kill(name, phase=where, call=max(1, round(float(when) * golden.calls[where])))


def killed_run(kills: Sequence[Kill], settings: Settings, golden: Golden, inputs: Path, folder: Path) -> Outcome:
    """Train, be killed by each of `kills` in turn, go on each time, and compare the end with `golden`."""
    folder.mkdir(parents=True, exist_ok=True)
    run_dir = folder / "run"
    file = settings_file(folder / "settings.json", settings, inputs, run_dir)
    outcome = Outcome()
    for kill in kills:
        ended = _gone_on(file, run_dir, folder, kill)
        outcome.seconds += ended.seconds
        if _was_sent(kill, ended):
            outcome.kills.append({**kill.as_json(), "status": ended.status})
            outcome.problems += _wrong_end(kill, ended, run_dir)
        elif ended.status != 0:
            outcome.problems.append(f"failed: exit status {ended.status} without a signal: {ended.said[-1500:]}")
        if outcome.problems:
            return outcome
    last = _gone_on(file, run_dir, folder, None)
    outcome.seconds += last.seconds
    if last.status != 0:
        outcome.problems.append(f"lost: going on ended with {last.status}: {last.said[-1500:]}")
    else:
        outcome.problems += differences(golden.result, result_of(run_dir))
        outcome.problems += [f"left over: {name}" for name in _left_over(run_dir)]
    return outcome


def drawn_kill(draw: random.Random, golden: Golden) -> Kill:
    """A signal, and where. Points of a save are there for SIGKILL only."""
    name = draw.choices(list(_SIGNALS), list(_SIGNALS.values()))[0]
    way = draw.choices(list(_WAYS), list(_WAYS.values()))[0]
    again = name in ("SIGTERM", "SIGINT", "SIGHUP") and draw.random() < _TWICE
    if way == "point" and name == "SIGKILL":
        return Kill(name, point=draw.choice(FAULT_POINTS), call=draw.randint(1, _PASSES_OF_A_POINT))
    if way == "time":
        return Kill(name, seconds=round(draw.uniform(0.02, 0.95) * golden.seconds, 3), again=again)
    phases = [phase for phase in dict.fromkeys((STARTING, *PHASES.values())) if golden.calls.get(phase)]
    phase = draw.choice(phases)
    return Kill(name, phase=phase, call=draw.randint(1, golden.calls[phase]), again=again)


def _gone_on(file: Path, run_dir: Path, folder: Path, kill: Kill | None) -> Ended:
    """What a user does next: resume where a step was saved, start again where none was."""
    saved = run_dir.is_dir() and checkpoints(run_dir)
    command = ["resume", str(run_dir)] if saved else ["train", str(file)]
    return in_fork(command, folder, kill)


def _was_sent(kill: Kill, ended: Ended) -> bool:
    """Whether the command met its signal. What is only asked to save ends well; its note tells."""
    if kill.signal == "SIGUSR1":
        return ended.status != 0 or "SIGUSR1" in ended.said
    if kill.seconds or ended.status != 0:
        return True
    return kill.signal in ended.said


def _wrong_end(kill: Kill, ended: Ended, run_dir: Path) -> list[str]:
    """What a command that was killed did otherwise than promised."""
    if ended.status is None:
        return [f"hung: {ended.said[-1500:]}"]
    if kill.signal == "SIGKILL":
        return [] if ended.status in (137, 0) else [f"failed: exit status {ended.status}: {ended.said[-1500:]}"]
    if not ended.said and ended.status == 128 + kill.number:
        return []  # the command had not begun to listen, nor done anything
    status = _status_told(run_dir)
    saved = bool(run_dir.is_dir() and checkpoints(run_dir))
    stopped = {75} if saved and not kill.again else {75, 128 + kill.number} if saved else {128 + kill.number}
    if kill.phase == STARTING:
        stopped |= {128 + kill.number}  # a command that has not opened its run has nothing to save or to finish
    # What an earlier kill -9 left in run.json stays there until the run is opened.
    unopened = kill.phase == STARTING and ended.status == 128 + kill.number
    if kill.signal == "SIGUSR1":
        stopped = set()
    problems = []
    if ended.status == 0:
        if status != "finished":
            problems.append(f"wrong end: exit status 0, and run.json says {status}")
    elif ended.status not in stopped:
        problems.append(f"wrong end: exit status {ended.status}, {sorted(stopped)} expected: {ended.said[-1500:]}")
    elif status not in ("stopped", "finished", "no run", "None") and not (unopened and status == "running"):
        problems.append(f"wrong end: run.json says {status}: {ended.said[-1500:]}")
    elif kill.signal not in ended.said:
        problems.append(f"wrong end: {kill.signal} is not named: {ended.said[-1500:]}")
    if "Traceback" in ended.said:
        problems.append(f"wrong end: a traceback: {ended.said[-1500:]}")
    return problems


def _status_told(run_dir: Path) -> str:
    """Of a folder that was just made it is None: the run in it has not begun."""
    file = run_dir / "run.json"
    return str(json.loads(file.read_text()).get("status")) if file.exists() else "no run"


# what a run leaves --------------------------------------------------------------------------------------------------
def result_of(run_dir: Path) -> dict[str, Any]:
    """All of a finished run that must be equal: hashes of files, figures of every step and every evaluation."""
    record = json.loads((run_dir / "run.json").read_text())
    newest = checkpoints(run_dir)[-1][1]
    kept = [run_dir / "adapter", newest, *([run_dir / "best_adapter"] if (run_dir / "best_adapter").is_dir() else [])]
    files = {f"{folder.name}/{name}": value for folder in kept for name, value in _content(folder).items()}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figures = [{key: value for key, value in line.items() if key not in _TIMING_KEYS} for line in lines]
    # A step that is saved and read again is logged before its evaluation; the order among equals is not promised.
    figures.sort(key=lambda line: (line["step"], "eval_loss" in line, str(line.get("label"))))
    shown = {name: (run_dir / name).is_file() for name in ("report.html", "loss.svg")}
    return {"files": files, "figures": figures, "shown": shown, **{key: record.get(key) for key in _RESULT_KEYS}}


def _content(folder: Path) -> dict[str, object]:
    """Hashes of the tensor files, and what the JSON files say but for what every run has of its own."""
    tensors = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))
    }
    told = {
        name: json.loads((folder / name).read_text())
        for name in ("adapter_config.json", "qlora_hal.json", "trainer_state.json")
        if (folder / name).is_file()
    }
    return {**tensors, **{name: _without_identity(value) for name, value in told.items()}}


def _without_identity(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_identity(item) for key, item in value.items() if key not in _NOT_COMPARED}
    return value


def differences(golden: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What is not equal, by name. Both go through JSON, which keeps every bit of a number."""
    found = json.loads(json.dumps(found))
    told = [
        f"different: {key} is {found[key]!r}, was {golden[key]!r}"
        for key in golden
        if key not in ("files", "figures") and found[key] != golden[key]
    ]
    names = sorted({*golden["files"], *found["files"]})
    told += [
        f"different: {name} has {_apart(found['files'].get(name), golden['files'].get(name))}"
        for name in names
        if golden["files"].get(name) != found["files"].get(name)
    ]
    if golden["figures"] != found["figures"]:
        pairs = zip(golden["figures"], found["figures"], strict=False)
        first = next(((a, b) for a, b in pairs if a != b), (len(golden["figures"]), len(found["figures"])))
        told.append(f"different: metrics.jsonl has {first[1]}, had {first[0]}")
    return told


def _apart(found: object, golden: object) -> str:
    if isinstance(found, dict) and isinstance(golden, dict):
        names = sorted(name for name in {*found, *golden} if found.get(name) != golden.get(name))
        return ", ".join(f"{name} {found.get(name)!r} for {golden.get(name)!r}" for name in names)
    return f"{found!r} for {golden!r}"


def _left_over(run_dir: Path) -> list[str]:
    names = [path.name for folder in (run_dir, run_dir / "checkpoints") for path in folder.iterdir()]
    return [name for name in names if name.startswith(_LEFTOVERS) or name == "run.lock.json"]


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
