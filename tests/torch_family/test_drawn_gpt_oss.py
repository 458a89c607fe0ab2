"""The drawn gpt-oss that `benchmarks/moe_step.py` measures is read as a published one is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

KEPT = Quantization(WeightFormat.MXFP4, 32)


def test_its_experts_are_bytes_that_stand_for_numbers_like_those_of_a_drawn_model(tmp_path: Path) -> None:
    from drawn_gpt_oss import GPT_OSS_SHAPES, drawn_source, load_drawn

    source = drawn_source(tmp_path, GPT_OSS_SHAPES["gpt-oss-tiny"])
    base = load_drawn(source, KEPT, Compute(), torch.device("cpu"))
    assert base.is_microscaled
    for stack in (base.experts[0].gate, base.experts[1].down):
        assert stack is not None
        assert stack.base is not None
        assert float(stack.base.dense().float().std()) == pytest.approx(0.02, rel=0.25)
