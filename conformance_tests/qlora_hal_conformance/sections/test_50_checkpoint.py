"""L3: K steps and M more are K + M steps, in another trainer and in another process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from qlora_hal.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from qlora_hal.contract.capabilities import OPTIMIZER_FEATURE, Feature
from qlora_hal.contract.values import Batch, OptimizerSnapshot
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import must_refuse
from qlora_hal_conformance.fixtures import Opened, Opener
from qlora_hal_conformance.parameters import in_each_dtype
from qlora_hal_conformance.random_inputs import draw_adapter, draw_window
from qlora_hal_conformance.request import Request
from qlora_hal_conformance.resume_in_child import Continuation, continue_in_child
from qlora_hal_conformance.tolerances import UpdateSettings, eight_bit_drift, resumed_bounds
from qlora_hal_conformance.updating import drawn_moments, judge_step, oracle_at_state_of

RATE = 1e-2
K, M = 3, 3
DROP = 0.25
OPTIMIZERS = [
    pytest.param(name, id=name, marks=[pytest.mark.needs(feature)] if feature else [])
    for name, feature in OPTIMIZER_FEATURE.items()
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@in_each_dtype
def test_resumed_run_equals_the_uninterrupted_one(
    optimizer: str, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """With every optimizer, 8-bit ones included: bit for bit where that is declared."""
    shape, _ = opened.models.drawn("main")
    adapter, windows = draw_adapter(seeded, shape, rank=8), [draw_window(seeded, shape) for _ in range(K + M)]
    through, stopped = (opened(adapter=adapter, optimizer=optimizer) for _ in range(2))
    _train(through, windows, 0)
    _train(stopped, windows[:K], 0)
    resumed = opened(adapter=stopped.trainer.export_adapter(), optimizer=optimizer)
    resumed.trainer.import_optimizer(stopped.trainer.export_optimizer())
    if optimizer.endswith("8bit") and not opened.subject.declares(Feature.BITWISE_DETERMINISM):
        _judge_drift(resumed, through, windows[K:], judging)
    else:
        _judge_continuation(resumed, through, windows[K:], opened, judging)


@pytest.mark.needs(Feature.LORA_DROPOUT)
@in_each_dtype
def test_dropout_goes_on_after_a_resume(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Masks are a function of the step's key: a resumed run draws those of steps 4 to 6, not of 1 to 3 again."""
    shape, _ = opened.models.drawn("main")
    adapter, windows = draw_adapter(seeded, shape, dropout=DROP), [draw_window(seeded, shape) for _ in range(K + M)]
    through, stopped = opened(adapter=adapter), opened(adapter=adapter)
    _train(through, windows, 0)
    _train(stopped, windows[:K], 0)
    resumed = opened(adapter=stopped.trainer.export_adapter())
    resumed.trainer.import_optimizer(stopped.trainer.export_optimizer())
    _judge_continuation(resumed, through, windows[K:], opened, judging)


@in_each_dtype
def test_resume_through_files_in_another_process(
    opened: Opener, seeded: np.random.Generator, judging: Judge, scratch: Path, run_request: Request
) -> None:
    """The core's checkpoint is written, read by a fresh process that has no test running, and trained on there."""
    shape, _ = opened.models.drawn("main")
    adapter, windows = draw_adapter(seeded, shape), [draw_window(seeded, shape) for _ in range(K + M)]
    through, stopped = opened(adapter=adapter), opened(adapter=adapter)
    _train(through, windows, 0)
    _train(stopped, windows[:K], 0)
    state = TrainingState(K, 0.5, 100, stopped.trainer.export_adapter(), stopped.trainer.export_optimizer())
    (scratch / "run").mkdir()
    checkpoint = save_checkpoint(scratch / "run", state, keep=2)
    work = Continuation(
        run_request.reference,
        stopped.model.folder,
        stopped.quantization,
        stopped.dtype,
        checkpoint,
        RATE,
        checkpointing=stopped.compute.gradient_checkpointing,
        options=stopped.compute.options,
    )
    after, logits = continue_in_child(work, windows[K:])
    expected, exact = through.trainer.export_adapter().tensors, opened.subject.declares(Feature.BITWISE_DETERMINISM)
    if exact:
        judging.equal("adapter", after.adapter.tensors, expected)
        judging.equal("moments", after.optimizer.moments, through.trainer.export_optimizer().moments)
        judging.equal("logits", {"": logits}, {"": through.trainer.logits(windows[K][0])})
    else:
        given = UpdateSettings(RATE, weight_decay=0.1)
        bounds = resumed_bounds(oracle_at_state_of(stopped), windows[K:], stopped.dtype, given)
        judging.all_within("adapter", after.adapter.tensors, expected, bounds)
    assert after.optimizer.step == K + M


def test_checkpoint_files_keep_every_bit(
    opened: Opener, seeded: np.random.Generator, scratch: Path, judging: Judge
) -> None:
    """What a backend exports can be stored: names, dtypes and values survive the core's files."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    _train(ready, [draw_window(seeded, shape)], 0)
    adapter, snapshot = ready.trainer.export_adapter(), ready.trainer.export_optimizer()
    read = load_checkpoint(save_checkpoint(scratch, TrainingState(1, 0.1, 9, adapter, snapshot), keep=2))
    judging.equal("adapter", read.adapter.tensors, adapter.tensors)
    judging.equal("moments", read.optimizer.moments, snapshot.moments)
    assert (read.optimizer.step, read.optimizer.native_kind) == (snapshot.step, snapshot.native_kind)
    assert read.adapter.config == adapter.config


@pytest.mark.parametrize("step", [17, 1000])
@in_each_dtype
def test_import_takes_effect(step: int, opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """A trainer that has trained on, given older state, continues from that: a stale optimizer would show at once."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    _train(ready, [draw_window(seeded, shape) for _ in range(2)], 0)
    given = drawn_moments(ready, window, step, seeded)
    ready.trainer.import_optimizer(given)
    exported = ready.trainer.export_optimizer()
    assert exported.step == step, f"step {exported.step} after importing step {step}"
    judging.equal("moments", exported.moments, given.moments)
    judge_step(ready, oracle_at_state_of(ready), window, UpdateSettings(RATE), judging)


@in_each_dtype
def test_attach_starts_with_a_fresh_optimizer(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """A second attach replaces the adapter and forgets all moments."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    _train(ready, [draw_window(seeded, shape) for _ in range(2)], 0)
    ready.attach(draw_adapter(seeded, shape))
    assert ready.trainer.export_optimizer().step == 0
    judge_step(ready, oracle_at_state_of(ready), window, UpdateSettings(RATE), judging)


@in_each_dtype
def test_windows_are_trained_in_the_order_given(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """The core owns the order. After a resume too, every step's figures are those of the window it was given."""
    shape, _ = opened.models.drawn("main")
    ready, windows = opened(adapter=draw_adapter(seeded, shape)), [draw_window(seeded, shape) for _ in range(4)]
    for window in windows[:2]:
        judge_step(ready, oracle_at_state_of(ready), window, UpdateSettings(RATE), judging)
    adapter, snapshot = ready.trainer.export_adapter(), ready.trainer.export_optimizer()
    resumed = opened(adapter=adapter)
    resumed.trainer.import_optimizer(snapshot)
    for window in windows[2:]:
        judge_step(resumed, oracle_at_state_of(resumed), window, UpdateSettings(RATE), judging)


def test_exporting_does_not_disturb(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Saving between two steps changes no later step."""
    shape, _ = opened.models.drawn("main")
    adapter, windows = draw_adapter(seeded, shape), [draw_window(seeded, shape) for _ in range(2)]
    quiet, saving = opened(adapter=adapter), opened(adapter=adapter)
    for ready in (quiet, saving):
        ready.step(windows[0], RATE)
    saving.trainer.export_adapter()
    saving.trainer.export_optimizer()
    _judge_continuation(saving, quiet, windows[1:], opened, judging, continue_other=True)


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_moments_that_do_not_fit_are_refused(damage: str, opened: Opener, seeded: np.random.Generator) -> None:
    """By our error, and the optimizer is as it was."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    ready.step(window, RATE)
    before = ready.trainer.export_optimizer()
    moments = dict(before.moments)
    name = sorted(moments)[int(seeded.integers(len(moments)))]
    if damage == "missing":
        del moments[name]
    else:
        moments[name] = moments[name][:, :-1].copy()
    snapshot = OptimizerSnapshot(5, moments)
    must_refuse(lambda: ready.trainer.import_optimizer(snapshot), f"a snapshot with {name} {damage}")
    after = ready.trainer.export_optimizer()
    assert after.step == before.step, "the step changed"
    assert all(np.array_equal(after.moments[n], before.moments[n]) for n in before.moments), "the moments changed"


def _judge_drift(resumed: Opened, through: Opened, windows: Sequence[Sequence[Batch]], judging: Judge) -> None:
    """Where a last bit of a gradient can turn an 8-bit code: the two runs part by little of the way they went."""
    start = resumed.trainer.export_adapter().tensors
    _train(resumed, windows, K)
    found, expected = (ready.trainer.export_adapter().tensors for ready in (resumed, through))
    way = np.concatenate([(expected[name] - start[name]).ravel() for name in start])
    apart = np.concatenate([(expected[name] - found[name]).ravel() for name in start])
    share = float(np.linalg.norm(apart) / np.linalg.norm(way))
    judging.at_most("distance of the two runs / way they went", share, eight_bit_drift())


def _train(ready: Opened, windows: Sequence[Sequence[Batch]], first_step: int) -> list[float]:
    return [
        ready.step(window, RATE, weight_decay=0.1, dropout_key=1000 + first_step + n).loss_sum
        for n, window in enumerate(windows)
    ]


def _judge_continuation(
    resumed: Opened,
    through: Opened,
    windows: Sequence[Sequence[Batch]],
    opened: Opener,
    judging: Judge,
    *,
    continue_other: bool = False,
) -> None:
    """Train `resumed` on and compare with `through`, which has the same steps behind it already (or takes them now)."""
    given = UpdateSettings(RATE, weight_decay=0.1)
    start = oracle_at_state_of(resumed)
    first = 1 if continue_other else K
    _train(resumed, windows, first)
    if continue_other:
        _train(through, windows, first)
    found, expected = (ready.trainer.export_adapter().tensors for ready in (resumed, through))
    if opened.subject.declares(Feature.BITWISE_DETERMINISM):
        judging.equal("adapter", found, expected)
        moments = (ready.trainer.export_optimizer().moments for ready in (resumed, through))
        judging.equal("moments", *moments)
    else:
        judging.all_within("adapter", found, expected, resumed_bounds(start, windows, resumed.dtype, given))
    steps = [ready.trainer.export_optimizer().step for ready in (resumed, through)]
    assert steps[0] == steps[1], f"steps {steps}"
