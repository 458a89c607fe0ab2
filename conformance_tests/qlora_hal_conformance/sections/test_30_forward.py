"""The forward pass: logits and losses against the float64 oracle on the backend's own weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qlora_hal_conformance.drawing import draw_adapter, draw_batch
from qlora_hal_conformance.judging import Judge
from qlora_hal_conformance.opening import Opened, Opener
from qlora_hal_conformance.oracle import OracleTrainer
from qlora_hal_conformance.tolerances import logits_bound

Oracle = Callable[[Opened], OracleTrainer]


def test_logits_equal_the_oracle(opened: Opener, oracle: Oracle, seeded: np.random.Generator, judging: Judge) -> None:
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape))
    batch = draw_batch(seeded, shape)
    found = ready.trainer.logits(batch)
    reference = oracle(ready)
    judging.within("logits", found, reference.logits(batch), logits_bound(reference, batch, ready.dtype))
