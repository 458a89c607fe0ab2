"""A run of a mixture of experts that goes on elsewhere, with the adapters and moments of every expert."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hand_over.test_numbers import STEPS, WINDOWS, losses_of, rate

from qlora_hal_conformance.fixtures import Models, make_oracle, oracle_step
from qlora_hal_conformance.random_inputs import draw_adapter, stream, total_tokens, with_zero
from qlora_hal_conformance.routed_inputs import draw_routed
from qlora_hal_conformance.tolerances import LOSS_CURVE_RUNS, loss_curve_bound
from qlora_hal_oracle import UNIT_ROUNDOFF, LoraScale, OracleTrainer, loss_curve_envelope, read_shape
from qlora_hal_oracle.arithmetic import Arithmetic
from qlora_hal_oracle.families import draw_config
from qlora_hal_oracle.random_models import draw_tensors

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "legs",
    [
        pytest.param(["cpu_torch", "mlx_lora"], id="cpu to mlx"),
        pytest.param(["mlx_lora", "cpu_torch"], id="mlx to cpu", marks=pytest.mark.long),
    ],
)
def test_a_mixture_goes_on_where_rounding_alone_can_take_it(
    legs: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As `test_numbers` judges a plain Llama. Windows are drawn so that no rounding decides where a token goes at the
    start; few tokens in a window leave experts idle, which have to stand still on both backends."""
    random = stream(33, "hand over")
    config = draw_config("qwen3_moe", random)
    shape = read_shape(config)
    tensors = draw_tensors(shape, random)
    models = Models(tmp_path_factory.mktemp("models"), seed=33)
    models.define("main", shape, tensors, config)
    adapter = with_zero(draw_adapter(random, shape, rank=4), "B")
    start = make_oracle(shape, tensors, adapter)
    windows = [[draw_routed(random, start, "float32", lengths=lengths)] for lengths in ((9, 7), (14,), (6, 5), (3,))]
    assert len(windows) == WINDOWS

    def trained(arithmetic: Arithmetic) -> list[float]:
        scale = LoraScale(adapter.config.alpha, adapter.config.r)
        oracle = OracleTrainer(shape, tensors, adapter.tensors, scale, arithmetic)
        steps = (oracle_step(oracle, windows[n % WINDOWS], rate(n), weight_decay=0.01) for n in range(STEPS))
        return [step.loss_sum / step.token_count for step in steps]

    envelope = loss_curve_envelope(trained, unit_roundoff=UNIT_ROUNDOFF["float32"], runs=LOSS_CURVE_RUNS)
    allowed = loss_curve_bound(envelope, max(total_tokens(window) for window in windows)).value
    apart = np.abs(np.array(losses_of(legs, models, adapter, windows)) - envelope.exact)
    assert np.all(apart <= allowed), f"largest part of the bound {np.max(apart / allowed):.3g}"
