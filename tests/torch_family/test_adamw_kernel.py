"""The update of the flat adapter in one kernel, against the plain one, which `test_step` has beside torch's AdamW.

On a GPU the kernel runs compiled; elsewhere in Triton's interpreter (`TRITON_INTERPRET=1 pytest -m needs_triton`).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qlora_hal.contract.values import StepSettings
from qlora_hal_backends.torch_family.flat_adapter import FlatAdapter
from qlora_hal_backends.torch_family.optimizer import Update, UpdateInParts, proved_update, update_agrees

pytestmark = pytest.mark.filterwarnings(
    # Triton's interpreter on NumPy 2.
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MakeUpdate = Callable[[FlatAdapter], Update]


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.needs_triton)])
def make_update(request: pytest.FixtureRequest) -> MakeUpdate:
    if request.param == "torch":
        return UpdateInParts
    assert DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1", "without a GPU, set TRITON_INTERPRET=1"
    from qlora_hal_backends.torch_family.adamw_kernel import UpdateByKernel

    return UpdateByKernel


def test_it_passes_the_trial_that_a_device_is_given(make_update: MakeUpdate) -> None:
    assert update_agrees(make_update, DEVICE)


class Wrong(UpdateInParts):
    """One thing is done otherwise."""

    def __init__(self, flat: FlatAdapter, kind: str) -> None:
        super().__init__(flat)
        self.kind = kind

    def __call__(self, first: Tensor, second: Tensor, figures: Tensor, settings: StepSettings) -> None:
        flat = self._flat
        stacks, compute = flat.stacks, flat.compute.clone()
        if self.kind == "idle experts decay":
            flat.stacks = ()
        if self.kind == "a refused step decays":
            flat.parameters.mul_(1.0 - (1.0 - figures[0]) * settings.learning_rate * settings.weight_decay)
        if self.kind == "gradients are not clipped":
            figures = torch.stack((figures[0], figures[0], figures[2], figures[3]))
        super().__call__(first, second, figures, settings)
        if self.kind == "the copy stays behind":
            flat.compute.copy_(compute)
        flat.stacks = stacks


@pytest.mark.parametrize(
    "kind", ["idle experts decay", "a refused step decays", "gradients are not clipped", "the copy stays behind"]
)
def test_the_trial_sees_what_is_computed_otherwise(kind: str) -> None:
    assert update_agrees(lambda flat: Wrong(flat, "nothing"), DEVICE)
    assert not update_agrees(lambda flat: Wrong(flat, kind), DEVICE)


def test_a_cpu_has_no_kernel_and_says_nothing_of_it() -> None:
    assert proved_update(torch.device("cpu")) is UpdateInParts


@pytest.mark.needs_cuda
def test_a_gpu_takes_the_kernel() -> None:
    assert proved_update(torch.device("cuda")) is not UpdateInParts
    assert "many passes" not in proved_update(torch.device("cuda")).__name__
