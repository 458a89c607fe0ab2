"""L3: the adapter: in, out, through files, and twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qlora_hal.adapter.naming import lora_a_key, lora_b_key
from qlora_hal.adapter.peft_files import read_adapter, write_adapter
from qlora_hal.contract.values import Adapter
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_logits
from qlora_hal_conformance.fixtures import Opener
from qlora_hal_conformance.parameters import OracleOf, each_dtype
from qlora_hal_conformance.random_inputs import at_real_tokens, draw_adapter, draw_batch, draw_window
from qlora_hal_conformance.tolerances import logits_bound
from qlora_hal_oracle.random_models import linear_shapes

RATE = 1e-2


@pytest.mark.parametrize("dtype", each_dtype())
def test_adapter_comes_out_as_it_went_in(
    dtype: str, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """Float32 bits, whatever the compute dtype."""
    shape, _ = opened.models.drawn("main")
    adapter = draw_adapter(seeded, shape)
    judging.equal("tensors", opened(dtype=dtype, adapter=adapter).trainer.export_adapter().tensors, adapter.tensors)


def test_trained_adapter_round_trips(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    shape, _ = opened.models.drawn("main")
    first, second = opened(adapter=draw_adapter(seeded, shape)), opened()
    first.step(draw_window(seeded, shape), RATE)
    exported = first.trainer.export_adapter()
    second.attach(exported)
    judging.equal("tensors", second.trainer.export_adapter().tensors, exported.tensors)
    batch = draw_batch(seeded, shape)
    bound = logits_bound(first.oracle(exported), batch, first.dtype).times(2, "two results")
    found, expected = (at_real_tokens(ready.trainer.logits(batch), batch) for ready in (second, first))
    judging.within("logits", found, expected, bound)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha_over_r", "alpha_over_root_r"])
def test_adapter_through_peft_files(
    use_rslora: bool, opened: Opener, seeded: np.random.Generator, judging: Judge, scratch: Path
) -> None:
    """Written and read in PEFT's layout it means the same: tensors bit for bit, scale, and so the logits."""
    shape, _ = opened.models.drawn("main")
    ready = opened(adapter=draw_adapter(seeded, shape, use_rslora=use_rslora, rank=8))
    ready.step(draw_window(seeded, shape), RATE)
    exported = ready.trainer.export_adapter()
    write_adapter(scratch / "adapter", exported, base_name="tiny", base_revision=None, provenance={})
    read = read_adapter(scratch / "adapter")
    judging.equal("tensors", read.tensors, exported.tensors)
    assert read.config.scale == exported.config.scale
    other, batch = opened(adapter=read), draw_batch(seeded, shape)
    reference = other.oracle(exported)
    judge_logits(other, reference, batch, judging)


def test_layout_of_a_and_b(opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    """A is [r, in] and B is [out, r]. With r = in = out a transposed reading has the same shape and another meaning."""
    shape, _ = opened.models.drawn("main")
    square = [
        module
        for module, linear in linear_shapes(shape).items()
        if linear.outputs == linear.inputs == shape.hidden_size
    ]
    targets = square or [module for module in linear_shapes(shape) if module.endswith("q_proj")]
    adapter = draw_adapter(seeded, shape, targets=targets, rank=shape.hidden_size)
    for module in targets:
        linear = linear_shapes(shape)[module]
        assert adapter.tensors[lora_a_key(module)].shape == (shape.hidden_size, linear.inputs)
        assert adapter.tensors[lora_b_key(module)].shape == (linear.outputs, shape.hidden_size)
    ready, batch = opened(adapter=adapter), draw_batch(seeded, shape)
    reference = oracle(ready)
    judge_logits(ready, reference, batch, judging)
    exported = ready.trainer.export_adapter().tensors
    judging.equal("tensors", exported, adapter.tensors)


def test_second_attach_replaces_the_first(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Other targets, another rank, another scale: nothing of the first adapter is left."""
    shape, _ = opened.models.drawn("main")
    modules = sorted(linear_shapes(shape))
    ready = opened(adapter=draw_adapter(seeded, shape, targets=modules[:9], rank=8))
    ready.step(draw_window(seeded, shape), RATE)
    ready.attach(draw_adapter(seeded, shape, targets=modules[5:], rank=2))
    assert ready.adapter is not None
    judging.equal("tensors", ready.trainer.export_adapter().tensors, ready.adapter.tensors)
    batch, reference = draw_batch(seeded, shape), oracle(ready)
    judge_logits(ready, reference, batch, judging)


def test_scale_is_that_of_the_settings(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """The same tensors under twice the alpha act twice as strongly: alpha is read, and read once."""
    shape, _ = opened.models.drawn("main")
    once = draw_adapter(seeded, shape, rank=4)
    twice = Adapter(once.tensors, replace(once.config, alpha=2 * once.config.alpha))
    ready, batch = opened(adapter=once), draw_batch(seeded, shape)
    for adapter in (once, twice):
        ready.attach(adapter)
        judge_logits(ready, oracle(ready), batch, judging)


@pytest.mark.parametrize("rank", [1, 3, 16, 64])
def test_any_rank(rank: int, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge) -> None:
    shape, _ = opened.models.drawn("main")
    ready, batch = opened(adapter=draw_adapter(seeded, shape, rank=rank)), draw_batch(seeded, shape)
    reference = oracle(ready)
    judge_logits(ready, reference, batch, judging)
    exported = ready.trainer.export_adapter().tensors
    assert ready.adapter is not None
    judging.equal("tensors", exported, ready.adapter.tensors)
