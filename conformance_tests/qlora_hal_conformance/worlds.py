"""Several ranks of the backend, started by the suite and asked once for each number of them: a start costs seconds, so
all cases read the answers of one.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qlora_hal.contract.backend import BackendSpec, Compute, ProbeReport, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.contract.values import Adapter, Float32, OptimizerSnapshot, StepStats
from qlora_hal.contract.world import World
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal.model.source import ModelSource
from qlora_hal.processes import child_process
from qlora_hal.processes.child_errors import defect_from, error_from
from qlora_hal_conformance.asked_of_ranks import EVERY_BYTE, SIZES, STEPS, Inputs, every_byte, refused_question
from qlora_hal_conformance.comparing import must_refuse
from qlora_hal_conformance.fixtures import Models
from qlora_hal_conformance.rank_in_child import REQUEST_FILE
from qlora_hal_conformance.subject import Subject
from qlora_hal_conformance.updating import Held
from qlora_hal_oracle import UNIT_ROUNDOFF
from qlora_hal_oracle.random_models import TinyModel

DOUBLY_QUANTIZED = (WeightFormat.NF4, WeightFormat.FP4)
CHILD = "qlora_hal_conformance.rank_in_child"
OF_ANOTHER = ("QH-R02", "QH-R04")
"""What a rank says of others that are gone, or did not come: the last to be taken for the cause."""
WORLD_SECONDS = 1800.0
"""A last resort, as for other children: the case's own clock knows of busy machines."""
SECONDS_FOR_THE_OTHERS = 10.0
"""Where one rank failed, the others may still write down what they saw."""
POLL_SECONDS = 0.02
FAILURES_FILE = "failures.json"
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Which GPUs NVIDIA's and AMD's drivers show to a process."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What one rank said to one question. `arrays` are by kind and name."""

    facts: Mapping[str, Any]
    arrays: Mapping[str, Mapping[str, Float32]]

    @property
    def stats(self) -> StepStats:
        return StepStats(**self.facts["stats"])

    @property
    def held(self) -> Held:
        return Held(self.arrays["adapter"], OptimizerSnapshot(self.facts["step"], self.arrays["moments"]))

    @property
    def gradients(self) -> dict[str, Float32]:
        """Those that a step of `Rank.gradient_of_step` used."""
        moments = self.arrays["moments"]
        return {n.removesuffix(".exp_avg"): m for n, m in moments.items() if n.endswith(".exp_avg")}


@dataclass(frozen=True, slots=True, eq=False)
class WorldAnswers:
    """Everything that the ranks of one world said."""

    inputs: Inputs
    by_rank: tuple[Mapping[str, Answer], ...]
    failure: BaseException | None = None

    def of_each(self, question: str) -> list[Answer]:
        """One of each rank. Raises what went wrong where it was not answered by all, and what the ranks raised of a
        dtype in which they do not compute."""
        refused = refused_question(question.partition("/")[0])
        if all(refused in answers for answers in self.by_rank):
            raise error_from(self.by_rank[0][refused].facts)
        if any(question not in answers for answers in self.by_rank):
            raise self.failure or AssertionError(f"no rank failed, and {question} was not answered")
        return [answers[question] for answers in self.by_rank]


@dataclass(slots=True)
class Worlds:
    """Starts the ranks of each size when they are first asked for."""

    subject: Subject
    models: Models
    folder: Path
    _asked: dict[int, WorldAnswers] = field(default_factory=dict)
    _undeclared: QuantizedLoRATrainer | None = None

    def __call__(self, size: int) -> WorldAnswers:
        """The answers of so many ranks. Raises what the backend raises where it does not serve several: at the first
        verb, and for a `Compute` that names them."""
        if not self.subject.declares(Feature.DATA_PARALLEL):
            self._refuse(World(0, size, 0))
        if size not in self._asked:
            state = None
            if size != SIZES[0] and not self.subject.is_short_of(size):
                state = self._state_of(SIZES[0])
            self._asked[size] = self._ask(size, state)
        return self._asked[size]

    def spread(self, size: int) -> WorldAnswers:
        """The same, where a base may be spread over them. Raises what the backend raises where it may not."""
        if not self.subject.declares(Feature.SHARDED_BASE):
            self._load(Compute(self.subject.main_dtype, shard_base=True))  # type: ignore[arg-type]
            raise AssertionError("a base that is not declared to be spread was loaded so")
        return self(size)

    def _refuse(self, world: World) -> None:
        """One trainer is asked by all cases; whether it loads for several ranks, once."""
        if self._undeclared is None:
            must_refuse(
                lambda: self._load(Compute(self.subject.main_dtype, world=world)),  # type: ignore[arg-type]
                "a Compute of several ranks, which are not declared",
                UnsupportedFeatureError,
            )
            self._undeclared = self.subject.open()
        self._undeclared.join_ranks(world, 1.0)
        raise AssertionError("ranks that are not declared were joined")

    def close(self) -> None:
        if self._undeclared is not None:
            self._undeclared.close()

    def _load(self, compute: Compute) -> None:
        main = self.subject.main_format
        with self.subject.open() as trainer:
            base = self._base("main", main)
            source = ModelSource.in_folder(Path(str(base["folder"])))
            trainer.load(source, Quantization(main, self.subject.default_block(main)), compute)

    def _state_of(self, size: int) -> str | None:
        """The file with the state that rank 0 of another world exported, where it came so far."""
        answers = self(size)
        told = answers.by_rank[0]
        done = all(f"{d}/step-{len(STEPS)}" in told or refused_question(d) in told for d in self._dtypes())
        return str(self._folder(size) / "rank-0.npz") if done else None

    def _dtypes(self) -> list[str]:
        return [dtype for dtype in UNIT_ROUNDOFF if self.subject.declares(dtype)]

    def _folder(self, size: int) -> Path:
        return self.folder / f"ranks-{size}"

    def _base(self, name: str, weight_format: WeightFormat, *, double_quant: bool = False) -> dict[str, object]:
        """A model in the way that the backend gets it, written."""
        block = self.subject.default_block(weight_format)
        on_load = self.subject.declares(Feature.QUANTIZE_ON_LOAD)
        written: TinyModel
        if weight_format is WeightFormat.NONE or on_load:
            written = self.models.plain(name)
        else:
            written = self.models.quantized(name, Quantization(weight_format, block, double_quant))
        stored = [weight_format.value, block, double_quant]
        return {"name": name, "folder": str(written.folder), "format": stored}

    def spread_bases(self) -> list[dict[str, object]]:
        """The main model in each declared format, doubly quantized too, and one of every byte in the main format."""
        if not self.subject.declares(Feature.SHARDED_BASE):
            return []
        formats = sorted(self.subject.capabilities.weight_formats, key=lambda f: f.value)
        main = self.subject.main_format
        shape, tensors = self.models.drawn("main")
        self.models.define(EVERY_BYTE, shape, every_byte(shape, tensors, main))
        found = [*(self._base("main", f) for f in formats), self._base(EVERY_BYTE, main)]
        if self.subject.declares(Feature.DOUBLE_QUANT):
            found += [self._base("main", f, double_quant=True) for f in formats if f in DOUBLY_QUANTIZED]
        return found

    def _ask(self, size: int, state: str | None) -> WorldAnswers:
        folder, subject = self._folder(size), self.subject
        folder.mkdir(exist_ok=True)
        request = {
            "reference": subject.reference.as_json(),
            "seed": self.models.seed,
            "base": self._base("main", subject.main_format),
            "dtypes": self._dtypes(),
            "main_dtype": subject.main_dtype,
            "dropout": subject.declares(Feature.LORA_DROPOUT),
            "weights": subject.declares(Feature.TOKEN_WEIGHTS),
            "spread": self.spread_bases(),
            "state": state,
        }
        (folder / REQUEST_FILE).write_text(json.dumps(request), encoding="utf-8")
        launcher = subject.spec.launcher
        how = _by_launcher(launcher, size, folder) if launcher else _by_suite(size, folder)
        shape, _ = self.models.drawn("main")
        return read_world(folder, Inputs(self.models.seed, shape, size), how)


def devices_of_ranks(spec: BackendSpec, report: ProbeReport, environment: Mapping[str, str] | None = None) -> int:
    """How many devices the ranks of a backend can have here, one each; 0 where they share one, as on a CPU. A probe
    counts those of the machine, of which the user's variables may hide some."""
    own = spec.uses_accelerator if report.uses_accelerator is None else report.uses_accelerator
    given = os.environ if environment is None else environment
    shown = [len([part for part in given[name].split(",") if part.strip()]) for name in VISIBLE if given.get(name)]
    return min([len(report.devices), *shown]) if own else 0


def adapter_of(answer: Answer, inputs: Inputs) -> Adapter:
    """The adapter that a rank exported."""
    return Adapter(answer.arrays["adapter"], inputs.adapter().config)


def _by_launcher(launcher: str, size: int, folder: Path) -> str:
    """As `--devices` starts them: python -m LAUNCHER RANKS MAX_RESTARTS MODULE FOLDER. Says how it ended."""
    command = [sys.executable, "-m", launcher, str(size), "0", CHILD, str(folder)]
    child = child_process.start(command, stdout=sys.stderr)
    try:
        status = child.wait(WORLD_SECONDS)
    except subprocess.TimeoutExpired:
        return f"the launcher did not end within {WORLD_SECONDS:.0f} s"
    finally:
        child_process.ended(child)
    failures = folder / FAILURES_FILE
    told = failures.read_text(encoding="utf-8") if failures.is_file() else "no failures.json"
    return f"the launcher ended with status {status}, {told}"


def _by_suite(size: int, folder: Path) -> str:
    """With the variables that torchrun gives to each process. Says how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        child_process.start(
            [sys.executable, "-m", CHILD, str(folder)],
            stdout=sys.stderr,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(size)
    ]
    try:
        until = time.monotonic() + WORLD_SECONDS
        while any(child.poll() is None for child in children) and time.monotonic() < until:
            if any(child.poll() for child in children):
                until = min(until, time.monotonic() + SECONDS_FOR_THE_OTHERS)
            time.sleep(POLL_SECONDS)
    finally:
        states = [child.poll() for child in children]
        for child in children:
            child_process.ended(child)
    return f"the ranks ended with status {', '.join('none' if s is None else str(s) for s in states)}"


def read_world(folder: Path, inputs: Inputs, how: str) -> WorldAnswers:
    """What the ranks left. The failure is the cause, not what followed from it: what a rank says of itself comes before
    one that left nothing (which may have been ended because another failed), and both before what ranks say of others.
    """
    found: list[dict[str, Answer]] = []
    causes: list[tuple[int, BaseException]] = []
    for rank in range(inputs.size):
        file = folder / f"rank-{rank}.json"
        if not file.is_file():
            causes.append((1, AssertionError(f"rank {rank} of {inputs.size} left no answer: {how}")))
            found.append({})
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        if "error" in record:
            causes.append((2 * (record["error"]["code"] in OF_ANOTHER), error_from(record["error"])))
        elif "defect" in record:
            causes.append((0, defect_from(record["defect"], f"rank {rank} of {inputs.size}")))
        found.append(_answers(record["facts"], file.with_suffix(".npz")))
    causes.sort(key=lambda cause: cause[0])
    return WorldAnswers(inputs, tuple(found), causes[0][1] if causes else None)


def _answers(facts: Mapping[str, Mapping[str, Any]], file: Path) -> dict[str, Answer]:
    arrays: dict[str, dict[str, dict[str, Float32]]] = {question: {} for question in facts}
    with np.load(file) as held:
        for key in held.files:
            question, kind, name = key.split("|")
            arrays[question].setdefault(kind, {})[name] = held[key]
    return {question: Answer(told, arrays[question]) for question, told in facts.items()}
