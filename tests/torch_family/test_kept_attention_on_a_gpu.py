"""cuDNN's attention called by name: it is the one that torch takes, and what it gave may leave the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fused_models import DEVICE, load, relative
from tiny_models import HEADS, HIDDEN, KV_HEADS
from trainers import random_batch

from qlora_hal_backends.torch_family.attention.causal import HeadCounts
from qlora_hal_backends.torch_family.attention.rectangles import CudnnRectangles, proved_rectangles
from qlora_hal_backends.torch_family.attention.varlen import LARGEST_ERROR
from qlora_hal_backends.torch_family.fused import body as fused_body
from qlora_hal_backends.torch_family.fused.attach import attach_with
from qlora_hal_backends.torch_family.fused.reference import ReferenceOperations

pytestmark = pytest.mark.needs_cuda


def torch_takes_cudnn(heads: HeadCounts, dtype: torch.dtype) -> bool:
    query = torch.zeros(2, heads.query, 130, heads.size, device=DEVICE, dtype=dtype)
    key = torch.zeros(2, heads.key_value, 130, heads.size, device=DEVICE, dtype=dtype)
    return CudnnRectangles().serve(query, key, key, 0.1)


@pytest.mark.parametrize("heads", [HeadCounts(32, 8, 128), HeadCounts(8, 8, 64)], ids=["grouped", "each its own"])
def test_it_proves_itself_where_torch_takes_it(heads: HeadCounts) -> None:
    if not torch_takes_cudnn(heads, torch.bfloat16):
        pytest.skip("torch takes another kernel on this GPU")
    assert proved_rectangles(DEVICE, heads, torch.bfloat16) is not None


def test_gradients_do_not_change_where_its_output_waits_on_the_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = load(tmp_path, dtype="bfloat16")
    heads = HeadCounts(HEADS, KV_HEADS, HIDDEN // HEADS)
    if not torch_takes_cudnn(heads, torch.bfloat16):
        pytest.skip("torch takes another kernel on this GPU")
    compute = replace(model.compute, gradient_checkpointing=True, recompute="offload")

    def gradient(long_sample: int) -> tuple[float, torch.Tensor]:
        monkeypatch.setattr(fused_body, "LONG_SAMPLE", long_sample)
        kernels = proved_rectangles(DEVICE, heads, torch.bfloat16)
        assert kernels is not None
        body = attach_with(ReferenceOperations(), model.base, model.flat, compute, rectangles=kernels)
        return model.gradient(body.batch_loss, random_batch(3), random_batch(4))

    loss, kept = gradient(long_sample=2)
    expected_loss, computed_again = gradient(long_sample=2**20)
    assert loss == expected_loss
    # Attention's backward adds in an order of its own.
    assert relative(kept, computed_again) < LARGEST_ERROR
