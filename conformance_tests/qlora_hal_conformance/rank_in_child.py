"""One rank of section 85, in a process of its own: `python -m qlora_hal_conformance.rank_in_child FOLDER`.

Started by the backend's launcher (`BackendSpec.launcher`), or by `worlds` with the variables that torchrun gives. It
answers all that `asked_of_ranks` has inputs for, in the same order on every rank, and leaves `rank-N.json` and
`rank-N.npz` in the folder.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qlora_hal.contract.backend import Compute, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Adapter, Float32, OptimizerSnapshot, StepSettings
from qlora_hal.contract.world import World
from qlora_hal.errors import QloraHalError, UnsupportedFeatureError
from qlora_hal.model.source import ModelSource
from qlora_hal.processes import child_process
from qlora_hal.processes.child_errors import told_of
from qlora_hal.ranks.identity import world_here
from qlora_hal_conformance.asked_of_ranks import (
    DROP,
    DROPOUT_KEY,
    EVERY_BYTE,
    NEXT_STEP,
    SPREAD,
    STEPS,
    WEIGHTED_DENOMINATOR,
    WHOLE,
    Dealt,
    Inputs,
    overflowing_denominator,
    refused_question,
    spread_question,
)
from qlora_hal_conformance.fixtures import Models
from qlora_hal_conformance.subject import Reference, import_subject
from qlora_hal_conformance.tolerances import UpdateSettings

REQUEST_FILE = "request.json"
MEETING_SECONDS = 90.0
"""How long a rank waits for another: the first import of a library, on a busy machine. Less than a case may take, so
that ranks that never meet are asked once and not by every case."""


@dataclass(slots=True)
class Answers:
    """What one rank leaves: by question, facts as JSON and named arrays."""

    folder: Path
    rank: int
    facts: dict[str, object] = field(default_factory=dict)
    arrays: dict[str, Float32] = field(default_factory=dict)

    def put(self, question: str, facts: Mapping[str, object], **arrays: Mapping[str, Any]) -> None:
        self.facts[question] = dict(facts)
        for kind, named in arrays.items():
            self.arrays.update({f"{question}|{kind}|{name}": array for name, array in named.items()})

    def write(self, ending: Mapping[str, object]) -> None:
        np.savez(self.folder / f"rank-{self.rank}.npz", **self.arrays)  # type: ignore[arg-type]
        record = {"facts": self.facts, **ending}
        (self.folder / f"rank-{self.rank}.json").write_text(json.dumps(record), encoding="utf-8")


@dataclass(slots=True)
class Rank:
    """This process while it is asked in one compute dtype."""

    trainer: QuantizedLoRATrainer
    world: World
    inputs: Inputs
    answers: Answers
    dtype: str = ""

    def load(self, base: Mapping[str, Any], dtype: str, *, spread: bool = False) -> None:
        weight_format, block_size, double_quant = base["format"]
        quantization = Quantization(WeightFormat(weight_format), block_size, double_quant)
        compute = Compute(dtype, world=self.world, shard_base=spread)  # type: ignore[arg-type]
        self.trainer.load(ModelSource.in_folder(Path(base["folder"])), quantization, compute)
        self.dtype = dtype

    def attach(self, dropout: float = 0.0) -> None:
        self.trainer.attach(self.inputs.adapter(dropout))

    def step(self, name: str, dealt: Dealt, given: UpdateSettings, **settings: Any) -> None:
        denominator = settings.pop("denominator", float(dealt.tokens))
        made = StepSettings(denominator=denominator, **asdict(given), **settings)
        stats = self.trainer.train_step(list(dealt.shares[self.world.rank]), made).resolve()
        self.tell_state(name, stats=asdict(stats), denominator=denominator)

    def gradient_of_step(self, name: str, dealt: Dealt, **settings: Any) -> None:
        """With beta1 = 0 the first moment is the gradient that the step used; with a rate of 0 nothing else moves."""
        self.step(name, dealt, UpdateSettings(0.0, max_grad_norm=None, beta1=0.0), **settings)

    def tell_state(self, name: str, **facts: object) -> None:
        snapshot = self.trainer.export_optimizer()
        held = {"adapter": self.trainer.export_adapter().tensors, "moments": snapshot.moments}
        self.answers.put(f"{self.dtype}/{name}", {**facts, "step": snapshot.step}, **held)

    def base_weights(self) -> dict[str, Float32]:
        return {module: self.trainer.dequantized_weight(module) for module in self.trainer.linear_modules()}


def ask_everything(rank: Rank, request: Mapping[str, Any]) -> None:
    """All questions; those that need a feature only where it is declared."""
    _ask_votes(rank, "votes_before_load")
    for dtype in request["dtypes"]:
        try:
            rank.load(request["base"], dtype)
        except UnsupportedFeatureError as refusal:  # declared, and not proved on this device
            rank.answers.put(refused_question(dtype), told_of(refusal))
            continue
        _ask_views(rank)
        _ask_steps(rank)
        _ask_uneven(rank)
        if request["dropout"]:
            rank.attach(DROP)
            rank.gradient_of_step("dropout", rank.inputs.window("first"), dropout_key=DROPOUT_KEY)
        if request["weights"]:
            _ask_weights(rank)
        _ask_refused(rank)
        if request["state"] is not None:
            _ask_to_continue(rank, np.load(request["state"]))
    _ask_votes(rank, "votes")
    for base in request["spread"]:
        _ask_spread(rank, base, request["main_dtype"])


def _ask_votes(rank: Rank, name: str) -> None:
    """As they fall, and with each rank's vote cast by its neighbour."""
    turned = (rank.world.rank + 1) % rank.world.size
    found = {
        how: rank.trainer.sum_over_ranks(rank.inputs.votes(who))
        for how, who in (("own", rank.world.rank), ("turned", turned))
    }
    rank.answers.put(name, {}, sums=found)


def _ask_views(rank: Rank) -> None:
    """The base as each rank has it; gradients of the whole window; figures of a rank's own rows."""
    rank.attach()
    dealt, own = rank.inputs.window("first"), rank.inputs.window("first").shares[rank.world.rank]
    rank.answers.put(f"{rank.dtype}/base", {}, weights=rank.base_weights())
    rank.answers.put(f"{rank.dtype}/gradients", {}, gradients=rank.trainer.gradients(list(own)))
    sums, nothing = rank.trainer.evaluate(list(own)), rank.trainer.evaluate([])
    facts = {"evaluated": asdict(sums), "of_nothing": asdict(nothing)}
    rank.answers.put(f"{rank.dtype}/own", facts, logits={"first": rank.trainer.logits(own[0])})
    # The views of one rank leave the others where they are: the next step is as if nobody had looked.
    rank.gradient_of_step("trained", dealt)


def _ask_steps(rank: Rank) -> None:
    rank.attach()
    rank.tell_state("step-0")
    for number, given in enumerate(STEPS, start=1):
        rank.step(f"step-{number}", rank.inputs.window(f"step-{number}"), given)


def _ask_uneven(rank: Rank) -> None:
    last = rank.world.size - 1
    for name, dealt in (
        ("silent", rank.inputs.with_silent_rank(last)),
        ("row_for_first", rank.inputs.with_row_for_one(0)),
        ("row_for_last", rank.inputs.with_row_for_one(last)),
        ("equal", rank.inputs.equal_shares()),
        ("equal_alone", rank.inputs.equal_shares().changed(last, ()) if last == 1 else None),
    ):
        if dealt is not None:
            rank.attach()
            rank.gradient_of_step(name, dealt)


def _ask_weights(rank: Rank) -> None:
    for name, ranks in (("weights", range(rank.world.size)), ("weights_of_last", [rank.world.size - 1])):
        rank.attach()
        rank.gradient_of_step(name, rank.inputs.weighted(*ranks), denominator=WEIGHTED_DENOMINATOR)


def _ask_refused(rank: Rank) -> None:
    """On one rank alone no gradient is finite: every other one has none."""
    rank.attach()
    rank.step("before_refused", rank.inputs.window("first"), NEXT_STEP)
    for name, culprit in (("refused_by_first", 0), ("refused_by_last", rank.world.size - 1)):
        dealt = rank.inputs.with_tokens_for_one(culprit)
        mean = rank.trainer.gradients(list(dealt.shares[rank.world.rank]))
        sizes = [float(np.abs(gradient).max()) for gradient in mean.values()]
        rank.step(name, dealt, NEXT_STEP, denominator=overflowing_denominator(sizes, dealt.tokens))
    rank.step("after_refused", rank.inputs.window("second"), NEXT_STEP)


def _ask_to_continue(rank: Rank, held: Mapping[str, Float32]) -> None:
    """From what other ranks exported."""
    adapter, moments = (
        {name.split("|")[2]: held[name] for name in held if name.startswith(f"{rank.dtype}/step-{len(STEPS)}|{kind}|")}
        for kind in ("adapter", "moments")
    )
    rank.trainer.attach(Adapter(adapter, rank.inputs.adapter().config))
    rank.trainer.import_optimizer(OptimizerSnapshot(len(STEPS), moments))
    rank.step("continued", rank.inputs.window("continued"), NEXT_STEP)


def _ask_spread(rank: Rank, base: Mapping[str, Any], dtype: str) -> None:
    """The same of a base that every rank has and of one that is spread over them: what each gives is told by its
    hash, for it has to be the same bits."""
    for how in (WHOLE, SPREAD):
        rank.load(base, dtype, spread=how == SPREAD)
        found = {"weights": rank.base_weights()}
        if base["name"] != EVERY_BYTE:
            rank.attach()
            dealt = rank.inputs.window("first")
            own = list(dealt.shares[rank.world.rank])
            found["logits"] = {"": rank.trainer.logits(own[0])}
            found["gradients"] = dict(rank.trainer.gradients(own))
            rank.step(f"{how} {base['name']}", dealt, NEXT_STEP)
            found["adapter"] = dict(rank.trainer.export_adapter().tensors)
        hashes = {kind: {name: hash_of(array) for name, array in named.items()} for kind, named in found.items()}
        rank.answers.put(spread_question(how, base["name"], base["format"][0], base["format"][2]), hashes)


def hash_of(array: Float32) -> str:
    """Of its bits."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def main(arguments: Sequence[str]) -> int:
    """0 where all was answered; 1 where anything went wrong, so that whoever started the ranks ends the others."""
    child_process.end_with_starter()
    child_process.end_with_parent()
    folder = Path(arguments[0])
    request = json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))
    world = world_here()
    answers, ending = Answers(folder, world.rank), dict[str, object]()
    try:
        shape, _ = Models(folder, request["seed"]).drawn("main")
        with import_subject(Reference(**request["reference"])).open() as trainer:
            trainer.join_ranks(world, MEETING_SECONDS)
            rank = Rank(trainer, world, Inputs(request["seed"], shape, world.size), answers)
            ask_everything(rank, request)
    except QloraHalError as error:
        ending["error"] = told_of(error)
    except Exception as error:  # whatever a backend raises is judged in the process of the suite
        trace = "".join(traceback.format_exception(error))
        ending["defect"] = {"summary": f"{type(error).__name__}: {error}", "trace": trace}
    answers.write(ending)
    return 1 if ending else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
