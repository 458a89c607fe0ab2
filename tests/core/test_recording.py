"""What is said of the steps as they are written down."""

from __future__ import annotations

import pytest

from qlora_hal.run.callbacks import loss_jump


@pytest.mark.fault("N16")
def test_loss_that_jumps_is_told_and_one_that_only_varies_is_not() -> None:
    varied = [1.0, 2.0] * 25  # mean 1.5, deviation 0.5: six deviations end at 4.5
    assert loss_jump(varied, 4.4) == ""
    assert loss_jump(varied, 4.6) == "the loss jumped to 4.6000; the 50 steps before had 1.5000 on average"
    assert loss_jump(varied[:49], 100.0) == ""
