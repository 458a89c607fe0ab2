"""A backend's views beside the oracle's, and refusals that must be ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from qlora_hal.contract.values import Batch, Float32
from qlora_hal.errors import QloraHalError
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.fixtures import Opened
from qlora_hal_conformance.random_inputs import at_real_tokens
from qlora_hal_conformance.tolerances import gradient_bounds, logits_bound
from qlora_hal_conformance.verdicts import described
from qlora_hal_oracle import OracleTrainer

Given = TypeVar("Given")
Kinds = type[QloraHalError] | tuple[type[QloraHalError], ...]


def judge_logits(ready: Opened, reference: OracleTrainer, batch: Batch, judging: Judge) -> Float32:
    """Logits at every token that is not padding, within the rounding bound; they are given back."""
    found = at_real_tokens(ready.trainer.logits(batch), batch)
    expected = at_real_tokens(reference.logits(batch), batch)
    judging.within("logits", found, expected, logits_bound(reference, batch, ready.dtype))
    return found


def judge_gradients(
    found: Mapping[str, Float32], reference: OracleTrainer, window: Sequence[Batch], ready: Opened, judging: Judge
) -> None:
    """Every adapter tensor's gradient, within the rounding bound."""
    bounds = gradient_bounds(reference, window, ready.dtype)
    judging.all_within("gradients", found, reference.gradients(window), bounds)


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


def _require_remedy(error: QloraHalError) -> None:
    assert error.message.strip(), f"{error.code}: the error has no message"
    assert error.fix.strip(), f"{error.code}: the error does not say what to do"
