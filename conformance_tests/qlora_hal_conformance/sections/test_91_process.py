"""L4: the process around a trainer: threads, trainers side by side, figures read late, and the caller's arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest

from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.values import Adapter, Batch, OptimizerSnapshot, StepSettings
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_logits
from qlora_hal_conformance.fixtures import Opener, placed
from qlora_hal_conformance.hostile_inputs import overflow_everywhere
from qlora_hal_conformance.parameters import in_each_dtype
from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch, draw_window, total_tokens, with_field
from qlora_hal_conformance.tolerances import UpdateSettings, gradient_bounds, loss_bound, norm_bound
from qlora_hal_conformance.updating import drawn_moments, judge_step, oracle_at_state_of
from qlora_hal_oracle.adamw import global_norm

RATE = 1e-2
PAIRS = [
    pytest.param(*pair, id="-".join(pair), marks=pytest.mark.needs(*pair))
    for pair in (("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float16"))
]
FIELDS = ("input_ids", "labels", "position_ids", "segment_ids", "rows")
Given = TypeVar("Given")
AnyArray = npt.NDArray[Any]


@in_each_dtype
def test_used_in_another_thread_than_it_was_loaded_in(
    opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """There and back again: a server's worker, a notebook's background cell."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    for run in (_in_a_thread, _in_a_thread, _here):
        run(lambda: judge_step(ready, oracle_at_state_of(ready), draw_window(seeded, shape), _settings(), judging))
        run(lambda: judge_logits(ready, oracle_at_state_of(ready), draw_batch(seeded, shape), judging))


@in_each_dtype
def test_loaded_in_another_thread_than_it_is_used_in(
    opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """The thread that loaded it has ended."""
    shape, _ = opened.models.drawn("main")
    ready = _in_a_thread(lambda: opened(adapter=draw_adapter(seeded, shape)))
    judge_logits(ready, oracle_at_state_of(ready), draw_batch(seeded, shape), judging)
    judge_step(ready, oracle_at_state_of(ready), draw_window(seeded, shape), _settings(), judging)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_dtypes_at_once(one: str, other: str, opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """By turns; the second is loaded when the first has already trained."""
    shape, _ = opened.models.drawn("main")
    readies = []
    for dtype in (one, other):
        readies.append(opened(dtype=dtype, adapter=draw_adapter(seeded, shape)))
        for ready in readies:
            window = draw_window(seeded, shape)
            judge_step(ready, oracle_at_state_of(ready), window, _settings(), judging)
            judge_logits(ready, oracle_at_state_of(ready), window[0], judging)


@in_each_dtype
def test_figures_read_late_are_those_of_their_own_step(
    opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """Three steps queued, then read: the first and the last ordinary, the second one that must be refused. At a rate
    of 0 nothing moves, so each has figures of its own window alone. What was handed over is overwritten before."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    reference = ready.oracle()
    windows = [placed([draw_batch(seeded, shape, lengths=lengths)]) for lengths in ((24, 17), (9,), (13, 6, 20))]
    denominators = [float(total_tokens(window)) for window in windows]
    denominators[1] = overflow_everywhere(reference, windows[1]).denominator
    handed = [_copies(window) for window in windows]
    pending = []
    for window, denominator in zip(handed, denominators, strict=True):
        pending.append(ready.trainer.train_step(window, StepSettings(0.0, denominator)))
        _overwrite({f"{n}/{name}": getattr(batch, name) for n, batch in enumerate(window) for name in FIELDS})
    for place, (step, window) in enumerate(zip(pending, windows, strict=True)):
        stats = step.resolve()
        loss, gradients = reference.evaluate(window)[0], reference.gradients(window)
        bound = norm_bound(gradient_bounds(reference, window, ready.dtype), gradients)
        judging.within("loss sum", np.array(stats.loss_sum), np.array(loss), loss_bound(reference, window, ready.dtype))
        assert stats.token_count == total_tokens(window), f"{stats.token_count} tokens of {total_tokens(window)}"
        assert stats.applied == (place != 1), f"step {place} says applied={stats.applied}"
        if stats.applied:
            judging.within("gradient norm", np.array(stats.grad_norm), np.array(global_norm(gradients)), bound)
        else:
            assert not np.isfinite(stats.grad_norm), f"the refused step tells a norm of {stats.grad_norm}"
    assert ready.trainer.export_optimizer().step == 2, "two of three steps were ordinary"


@in_each_dtype
def test_arrays_of_the_caller_are_left_alone(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Adapter, moments, batches and prompt are bit for bit what they were, after every verb that was given them."""
    shape, _ = opened.models.drawn("main")
    adapter, window = draw_adapter(seeded, shape), placed(draw_window(seeded, shape))
    ready = opened(adapter=adapter)
    moments = drawn_moments(ready, window, 5, seeded)
    prompt = draw_batch(seeded, shape, lengths=(9,)).input_ids[0]
    given: dict[str, AnyArray] = {**adapter.tensors, **moments.moments, "prompt": prompt}
    given |= {f"{n}/{name}": getattr(batch, name) for n, batch in enumerate(window) for name in FIELDS}
    before = {name: array.copy() for name, array in given.items()}
    ready.attach(adapter)
    ready.trainer.import_optimizer(moments)
    for _ in range(2):
        ready.step(window, RATE, weight_decay=0.1)
        ready.trainer.evaluate(window)
        ready.trainer.gradients(window)
        ready.trainer.logits(window[0])
    if opened.subject.declares(Feature.GENERATE):
        ready.trainer.generate(prompt, max_new_tokens=3, stop_tokens=[2])
    if opened.subject.declares(Feature.TOKEN_WEIGHTS):
        ready.trainer.token_losses(window[0])
    changed = [name for name, array in given.items() if not np.array_equal(array, before[name])]
    assert not changed, f"{len(changed)} arrays of the caller were changed: {changed[:3]}"


@in_each_dtype
def test_later_changes_of_the_callers_arrays_have_no_effect(
    opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """What was attached and imported is the backend's own: the caller may use the memory again."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(), draw_window(seeded, shape)
    adapter = draw_adapter(seeded, shape)
    ready.attach(Adapter({name: tensor.copy() for name, tensor in adapter.tensors.items()}, adapter.config))
    assert ready.adapter is not None
    _overwrite(ready.adapter.tensors)
    ready.adapter = adapter
    judge_logits(ready, ready.oracle(), window[0], judging)
    moments = drawn_moments(ready, window, 5, seeded)
    handed = OptimizerSnapshot(5, {name: moment.copy() for name, moment in moments.moments.items()})
    ready.trainer.import_optimizer(handed)
    _overwrite(handed.moments)
    judging.equal("moments", ready.trainer.export_optimizer().moments, moments.moments)
    reference = ready.oracle()
    reference.import_optimizer(5, moments.moments)
    judge_step(ready, reference, window, _settings(), judging)


@in_each_dtype
def test_a_batch_whose_arrays_have_changed_is_another_batch(
    opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """The same object with other tokens in it: nothing is remembered by who an array is."""
    shape, _ = opened.models.drawn("main")
    ready, batch = opened(adapter=draw_adapter(seeded, shape)), draw_batch(seeded, shape)
    reference = ready.oracle()
    for _ in range(2):
        judge_logits(ready, reference, batch, judging)
        found, bounds = ready.trainer.gradients([batch]), gradient_bounds(reference, [batch], ready.dtype)
        judging.all_within("gradients", found, reference.gradients([batch]), bounds)
        loss = np.array(ready.trainer.evaluate([batch]).loss_sum)
        judging.within(
            "loss sum", loss, np.array(reference.evaluate([batch])[0]), loss_bound(reference, [batch], ready.dtype)
        )
        other = draw_batch(seeded, shape)
        for name in FIELDS[:4]:
            np.copyto(getattr(batch, name), getattr(other, name))


def _settings() -> UpdateSettings:
    return UpdateSettings(RATE)


def _here(call: Callable[[], Given]) -> Given:
    return call()


def _in_a_thread(call: Callable[[], Given]) -> Given:
    """In a thread of its own, which ends with it."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(call).result()


def _copies(window: list[Batch]) -> list[Batch]:
    return [replace(with_field(batch), rows=None if batch.rows is None else batch.rows.copy()) for batch in window]


def _overwrite(arrays: Mapping[str, AnyArray]) -> None:
    """With what would be noticed, and is no error of its own."""
    for array in arrays.values():
        array[...] = np.roll(array, 1, axis=-1) + array.dtype.type(1)
