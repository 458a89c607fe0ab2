"""The suite's section 35, its gradients read from exact moments.

The gradient that a step trains with is told by the first moments. Of tensors with 4096 numbers and more, which higher
ranks have, an optimizer with 8 bits rounds them, and every honest backend would be found wrong. What it learns, what it
leaves alone and where it resumes are judged with the run's own optimizer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qlora_hal_conformance.combination import Combination
from qlora_hal_conformance.fixtures import Opened, Opener
from qlora_hal_conformance.sections_for_a_run import test_35_combination as section
from qlora_hal_conformance.sections_for_a_run.test_35_combination import (  # noqa: F401
    run,
    test_gradient_that_a_step_trains_with,
    test_gradient_without_dropout,
    test_logits_and_losses,
    test_long_rows,
    test_looking_between_steps_changes_nothing,
    test_run_that_was_stopped_goes_on,
    test_steps_with_the_settings_of_the_run,
    test_weights_are_those_of_the_format,
)

SHOWS_GRADIENTS = "adamw"


@pytest.fixture
def ready(opened: Opener, run: Combination, seeded: np.random.Generator) -> Opened:  # noqa: F811
    """As the section's own, on exact moments."""
    return _opened(opened, replace(run, optimizer=SHOWS_GRADIENTS), seeded)


def test_base_is_the_same_after_steps(opened: Opener, run: Combination, seeded: np.random.Generator) -> None:  # noqa: F811
    section.test_base_is_the_same_after_steps(_opened(opened, run, seeded), run, seeded)


def _opened(opened: Opener, asked: Combination, seeded: np.random.Generator) -> Opened:
    adapter = section._adapter(seeded, section._shape(opened, asked), asked)
    return section._open(opened, asked, adapter)
