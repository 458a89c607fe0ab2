"""A backend's views beside the oracle's, and refusals that must be ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from qlora_hal.contract.values import Adapter, Batch, Float32, Int32
from qlora_hal.errors import QloraHalError
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.fixtures import Opened, Opener
from qlora_hal_conformance.random_inputs import at_real_tokens, total_tokens
from qlora_hal_conformance.tolerances import (
    gradient_bounds,
    gradient_noise,
    is_coarse,
    logits_bound,
    logits_noise,
    loss_bound,
)
from qlora_hal_conformance.verdicts import described
from qlora_hal_oracle import DropoutMasks, OracleTrainer

Given = TypeVar("Given")
Kinds = type[QloraHalError] | tuple[type[QloraHalError], ...]


def judge_logits(ready: Opened, reference: OracleTrainer, batch: Batch, judging: Judge) -> Float32:
    """Logits at every token that is not padding, within the rounding bound; they are given back."""
    found = at_real_tokens(ready.trainer.logits(batch), batch)
    expected = at_real_tokens(reference.logits(batch), batch)
    judging.within("logits", found, expected, logits_bound(reference, batch, ready.dtype))
    if is_coarse(ready.dtype):
        judging.whole("logits", found, expected, logits_noise(reference, batch, ready.dtype))
    return found


def judge_evaluation(ready: Opened, reference: OracleTrainer, window: Sequence[Batch], judging: Judge) -> None:
    """The loss that `evaluate` sums over all counted tokens of all batches, in nats, and their number."""
    found = ready.trainer.evaluate(window)
    assert found.token_count == total_tokens(window), f"{found.token_count} tokens of {total_tokens(window)}"
    expected, bound = reference.evaluate(window)[0], loss_bound(reference, window, ready.dtype)
    judging.within("loss sum", np.array(found.loss_sum), np.array(expected), bound)


def judge_change(
    what: str, found: Float32, other: Float32, reference: OracleTrainer, batch: Batch, ready: Opened, judging: Judge
) -> None:
    """Two arrays of logits must differ by more than rounding makes them: at one place, in a coarse dtype as a whole."""
    if is_coarse(ready.dtype):
        judging.apart_as_a_whole(what, found, other, logits_noise(reference, batch, ready.dtype))
    else:
        judging.apart(what, found, other, logits_bound(reference, batch, ready.dtype))


def judge_gradients(
    found: Mapping[str, Float32],
    reference: OracleTrainer,
    window: Sequence[Batch],
    ready: Opened,
    judging: Judge,
    *,
    masks: Sequence[DropoutMasks] | None = None,
    denominator: float | None = None,
    ranks: int = 1,
) -> None:
    """Every adapter tensor's gradient, within the rounding bound. `masks`, one mapping to each micro-batch, are those
    of LoRA dropout; `denominator` is what the window's loss is divided by, by default its counted tokens; so many
    `ranks` share the window."""
    expected = reference.window_gradients(window, masks=masks, denominator=denominator).gradients
    bounds = gradient_bounds(reference, window, ready.dtype, ranks=ranks)
    if masks is not None:
        # Kept inputs are larger by 1 / (1 - p): so may errors be, once on the way forward and once back.
        bounds = {name: bound.times(_largest(masks) ** 2, "kept inputs, twice") for name, bound in bounds.items()}
    if denominator is not None:
        share = total_tokens(window) / denominator
        bounds = {name: bound.times(share, "denominator") for name, bound in bounds.items()}
    judging.all_within("gradients", found, expected, bounds)
    if is_coarse(ready.dtype):
        noise = gradient_noise(reference, window, ready.dtype, masks=masks, denominator=denominator)
        judging.all_whole("gradients", found, expected, noise)


def _largest(masks: Sequence[DropoutMasks]) -> float:
    return max((float(mask.max()) for of_batch in masks for mask in of_batch.values()), default=1.0)


def judge_greedy(ready: Opened, prompt: Int32, tokens: Int32, judging: Judge) -> None:
    """Each token has the largest logit after all tokens before it, up to what rounding may decide in a tie."""
    whole = np.concatenate([prompt, tokens])[None].astype(np.int32)
    places = np.arange(whole.shape[1], dtype=np.int32)[None]
    batch = Batch(whole, whole.copy(), places, np.ones_like(whole))
    logits = ready.trainer.logits(batch)[0, len(prompt) - 1 : -1]
    bound = logits_bound(ready.oracle(), batch, ready.dtype).times(4, "two logits, twice computed")
    behind = logits.max(axis=-1) - logits[np.arange(len(tokens)), tokens]
    judging.within("distance from the largest logit", behind, np.zeros_like(behind), bound)


def must_refuse(call: Callable[[], object], what: str, kind: Kinds = QloraHalError) -> None:
    """The call raises one of our errors, of the kind that is due, with a message and one thing to do."""
    names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
    try:
        call()
    except kind as error:
        _require_remedy(error)
        return
    except Exception as error:
        raise AssertionError(f"{what}: {names} is due; it raised {described(error)}") from error
    raise AssertionError(f"{what}: {names} is due; nothing was raised")


def unless_refused(call: Callable[[], Given]) -> Given | None:
    """What the call gives; None when it is refused by one of our errors, which is as good here."""
    try:
        return call()
    except QloraHalError as error:
        _require_remedy(error)
        return None


def opened_unless_refused(opened: Opener, model: str, adapter: Adapter) -> Opened | None:
    """The model with its adapter; None when a backend refuses it by one of our errors. In a compute dtype that is not
    declared the refusal is the verdict."""
    open_model = partial(opened, model, adapter=adapter)
    return unless_refused(open_model) if opened.subject.declares(opened.main_dtype) else open_model()


def _require_remedy(error: QloraHalError) -> None:
    assert error.message.strip(), f"{error.code}: the error has no message"
    assert error.fix.strip(), f"{error.code}: the error does not say what to do"
