"""The fused layers against transformers' own layers on tiny real models: one function, two schedules.

With plain torch in place of the kernels these run anywhere; with the kernels, on a GPU or in Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from fused_models import DEVICE, FAMILIES, SAME_FUNCTION, load, packed, relative
from tiny_models import VOCABULARY
from trainers import random_batch

from qlora_hal.contract import dropout
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Batch
from qlora_hal_backends.torch_family import fused, head_loss, step
from qlora_hal_backends.torch_family.fused import families
from qlora_hal_backends.torch_family.fused.attach import attach_with
from qlora_hal_backends.torch_family.fused.families import activation_of
from qlora_hal_backends.torch_family.fused.head_loss import loss_sum_with
from qlora_hal_backends.torch_family.fused.layer_weights import GroupBuffer, GroupShape, JoinedProducts, Slot
from qlora_hal_backends.torch_family.fused.operations import Operations
from qlora_hal_backends.torch_family.fused.reference import ReferenceOperations
from qlora_hal_backends.torch_family.fused.supported import model_refusal
from qlora_hal_backends.torch_family.fused.tape import Keep
from qlora_hal_backends.torch_family.lora_linear import words_on
from qlora_hal_backends.torch_family.platform import FUSED_ARCHITECTURES, SCORES_CAPPED

pytestmark = pytest.mark.filterwarnings(
    # Triton's interpreter on NumPy 2.
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
)


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.needs_triton)])
def operations(request: pytest.FixtureRequest) -> Operations:
    if request.param == "torch":
        return ReferenceOperations()
    assert DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1", "without a GPU, set TRITON_INTERPRET=1"
    from qlora_hal_backends.torch_family.fused.triton_operations import TritonOperations

    return TritonOperations()


def test_the_planner_counts_those_families_as_fused_that_are() -> None:
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    def layer_of(model_type: str) -> str:
        name = model_type_to_module_name(model_type)
        names = vars(import_module(f"transformers.models.{name}.modeling_{name}"))
        return next(each for each in names if each.endswith("DecoderLayer"))

    found = {layer_of(each) for each in FUSED_ARCHITECTURES | SCORES_CAPPED}
    # Capped scores are refused by `fused.supported`; the layers' schedule could be had.
    assert found == set(families.FAMILIES)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            name,
            marks=()
            if name in ("qwen3", "llama with the window of others", "smollm3 of kinds alone", "mistral", "gemma3_text")
            else pytest.mark.long,
        )
        for name in FAMILIES
    ],
)
@pytest.mark.parametrize("arrange", [lambda batch: batch, packed], ids=["one sample a row", "packed"])
def test_loss_and_gradients_equal_those_of_the_plain_layers(
    family: str, arrange: Callable[[Batch], Batch], operations: Operations, tmp_path: Path
) -> None:
    model = load(tmp_path, family)
    assert model_refusal(model.base, model.flat, model.compute) is None
    of_the_model = type(operations)(activation_of(model.base))  # type: ignore[call-arg]
    batch = arrange(random_batch(3))
    expected_loss, expected = model.gradient(model.plain, batch)
    for keep in Keep:
        body = attach_with(of_the_model, model.base, model.flat, model.compute, keep=keep)
        loss, found = model.gradient(body.batch_loss, batch)
        assert loss == pytest.approx(expected_loss, rel=SAME_FUNCTION)
        assert relative(found, expected) < SAME_FUNCTION, keep


@pytest.mark.parametrize(
    "targets",
    [
        lambda module: "q_proj" in module or "v_proj" in module,
        lambda module: "down_proj" in module,
        lambda module: "layers.1." in module and "up_proj" in module,  # layer 0 has ranks of zeros
        lambda module: "layers.0." in module or "o_proj" in module,
    ],
    ids=["query and value", "down", "one layer", "uneven"],
)
def test_any_choice_of_projections_can_be_adapted(
    targets: Callable[[str], bool], operations: Operations, tmp_path: Path
) -> None:
    model = load(tmp_path, targets=targets, r=3)  # three ranks: padded to eight
    body = attach_with(operations, model.base, model.flat, model.compute)
    _, expected = model.gradient(model.plain, random_batch(3))
    _, found = model.gradient(body.batch_loss, random_batch(3))
    assert relative(found, expected) < SAME_FUNCTION


@pytest.mark.parametrize("weight_format", [WeightFormat.NONE, WeightFormat.INT8])
def test_other_weight_formats_are_served_too(
    weight_format: WeightFormat, operations: Operations, tmp_path: Path
) -> None:
    model = load(tmp_path, weight_format=weight_format)
    body = attach_with(operations, model.base, model.flat, model.compute)
    _, expected = model.gradient(model.plain, random_batch(3))
    _, found = model.gradient(body.batch_loss, random_batch(3))
    assert relative(found, expected) < SAME_FUNCTION


@pytest.mark.parametrize("recompute", ["selective", "full", "offload"])
@pytest.mark.parametrize("family", ["qwen3", "llama with biases"])
def test_recomputing_in_tiles_and_shared_buffers_equals_keeping_everything(
    family: str, recompute: str, operations: Operations, tmp_path: Path
) -> None:
    model = load(tmp_path, family, targets=lambda module: "layers.0." in module or "o_proj" in module, r=3)
    rows = random_batch(3).input_ids.size
    whole = attach_with(operations, model.base, model.flat, model.compute)
    expected_loss, expected = model.gradient(whole.batch_loss, random_batch(3), random_batch(4))
    compute = replace(model.compute, gradient_checkpointing=True, recompute=recompute)  # type: ignore[arg-type]
    for tile_rows in (rows, rows // 3):  # in one piece; in four, the last shorter
        body = attach_with(operations, model.base, model.flat, compute, tile_rows=tile_rows)
        for _ in range(2):  # what one pass leaves in shared memory must not reach the next
            loss, found = model.gradient(body.batch_loss, random_batch(3), random_batch(4))
            # The rows' products are the same sums. The adapter's gradients are sums over rows, taken in parts: float32
            # additions in another order.
            assert loss == pytest.approx(expected_loss, rel=SAME_FUNCTION)
            assert relative(found, expected) < SAME_FUNCTION
    assert not torch.equal(expected, torch.zeros_like(expected))


@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dropout_is_that_of_the_plain_layers(
    rate: float, recompute: str | None, operations: Operations, tmp_path: Path
) -> None:
    """Of every projection, of layers that adapt some of them, and tile by tile."""
    model = load(
        tmp_path, "llama with biases", targets=lambda module: "layers.0." in module or "v_proj" in module, dropout=rate
    )
    assert model_refusal(model.base, model.flat, model.compute) is None
    compute = replace(model.compute, gradient_checkpointing=recompute is not None, recompute=recompute or "full")
    body = attach_with(operations, model.base, model.flat, compute, tile_rows=15)
    without_loss, without = model.gradient(model.plain, random_batch(3))
    words = dropout.token_words(2**40 + 3, np.arange(2, dtype=np.int32), 20)
    model.flat.switches.token_words = words_on(words.reshape(-1), DEVICE)
    expected_loss, expected = model.gradient(model.plain, random_batch(3))
    loss, found = model.gradient(body.batch_loss, random_batch(3))
    assert loss == pytest.approx(expected_loss, rel=SAME_FUNCTION)
    assert relative(found, expected) < SAME_FUNCTION
    assert relative(without, expected) > 1000 * SAME_FUNCTION
    assert without_loss != expected_loss


def test_gradients_of_the_micro_batches_of_a_window_add_up(tmp_path: Path) -> None:
    model = load(tmp_path)
    body = attach_with(ReferenceOperations(), model.base, model.flat, model.compute)
    window: Sequence[Batch] = (random_batch(1), packed(random_batch(2)))
    separate = [model.gradient(body.batch_loss, batch)[1] for batch in window]
    _, together = model.gradient(body.batch_loss, *window)
    assert torch.equal(together, separate[0] + separate[1])


def test_updated_adapter_is_used_at_the_next_forward(tmp_path: Path) -> None:
    model = load(tmp_path)
    body = attach_with(ReferenceOperations(), model.base, model.flat, model.compute)
    model.gradient(body.batch_loss, random_batch(1))
    model.flat.parameters.mul_(1.5)
    model.flat.refresh_compute()
    _, expected = model.gradient(model.plain, random_batch(1))
    _, found = model.gradient(body.batch_loss, random_batch(1))
    assert relative(found, expected) < SAME_FUNCTION


def test_evaluation_gives_the_same_loss_and_touches_no_gradient(tmp_path: Path) -> None:
    model = load(tmp_path)
    body = attach_with(ReferenceOperations(), model.base, model.flat, model.compute)
    loss, gradient = model.gradient(body.batch_loss, random_batch(1))
    with torch.no_grad():
        evaluated = body.batch_loss(step.to_device(random_batch(1), DEVICE), 1.0)
    assert evaluated.item() == loss
    assert not evaluated.requires_grad
    assert torch.equal(model.flat.gradients, gradient)


def test_bfloat16_gradients_are_no_worse_than_those_of_the_plain_layers(tmp_path: Path) -> None:
    exact = load(tmp_path / "exact", weight_format=WeightFormat.NONE)
    rounded = load(tmp_path / "rounded", weight_format=WeightFormat.NONE, dtype="bfloat16")
    for parameter, source in zip(exact.base.causal.parameters(), rounded.base.causal.parameters(), strict=True):
        parameter.data.copy_(source.data)
    for name, linear in exact.base.linears.items():
        linear.base.weight.copy_(rounded.base.linears[name].base.weight)  # type: ignore[union-attr]
    exact.flat.parameters.copy_(rounded.flat.compute)
    body = attach_with(ReferenceOperations(), rounded.base, rounded.flat, rounded.compute)
    batches = [random_batch(seed) for seed in range(4)]
    _, expected = exact.gradient(exact.plain, *batches)
    _, plain = rounded.gradient(rounded.plain, *batches)
    _, found = rounded.gradient(body.batch_loss, *batches)
    # Both errors are draws of rounding noise; the fused one rounds less often, and half as much again is a bound on
    # the draw, not on the method.
    assert relative(found, expected) < 1.5 * relative(plain, expected)
    assert relative(found, expected) < 0.1


def test_adapter_is_added_before_the_sum_is_rounded() -> None:
    rows, columns, r = 64, 128, 8
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(rows + r, columns + r, generator=generator).bfloat16().to(DEVICE)
    shape = GroupShape([Slot("only", slice(0, rows), slice(0, r))], columns, r)
    buffer = GroupBuffer(shape, 2.0, JoinedProducts(shape, memory, ReferenceOperations()), ReferenceOperations())
    buffer.b.mul_(0.002)  # a young adapter: its product is below the spacing of bfloat16 at the base product
    extended = torch.randn(32, columns + r, generator=generator).bfloat16().to(DEVICE)
    low_rank = buffer.low_rank(extended[:, :columns], extended[:, columns:])
    assert low_rank is not None
    exact = (
        extended[:, :columns].double() @ memory[:rows, :columns].double().t()
        + low_rank.double() @ buffer.b.double().t()
    )
    found = buffer.product(extended, None).double()
    # One rounding of the sum, 2^-8 of it at most, and float32 accumulation of 136 terms of size 1. Added to a rounded
    # product it would err by another 2^-8 of the whole.
    assert ((found - exact).abs() <= 2.0**-8 * exact.abs() + 136 * 2.0**-24 * 8).all()


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
@pytest.mark.parametrize("arrange", [lambda batch: batch, packed], ids=["one sample a row", "packed"])
def test_sliding_windows_hide_what_they_hide_in_the_plain_layers(
    family: str, arrange: Callable[[Batch], Batch], tmp_path: Path
) -> None:
    """Of Mistral in each layer, of this Qwen 2 in the second alone."""
    uneven = {"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {}
    model = load(tmp_path, family, changes={"sliding_window": 4, **uneven})
    body = attach_with(ReferenceOperations(), model.base, model.flat, model.compute)
    assert [layer.window for layer in body.layers] == ([None, 4] if family == "qwen2" else [4, 4])
    expected_loss, expected = model.gradient(model.plain, arrange(random_batch(3)))
    loss, found = model.gradient(body.batch_loss, arrange(random_batch(3)))
    assert loss == pytest.approx(expected_loss, rel=SAME_FUNCTION)
    assert relative(found, expected) < SAME_FUNCTION


def test_adapter_that_is_switched_off_leaves_the_base_alone(tmp_path: Path) -> None:
    model = load(tmp_path)
    body = attach_with(ReferenceOperations(), model.base, model.flat, model.compute)
    batch = step.to_device(random_batch(1), DEVICE)
    with torch.no_grad():
        adapted = body.hidden_states(batch)
        model.flat.switches.enabled = False
        alone = body.hidden_states(batch)
    model.flat.detach_from(model.base.linears)
    with torch.no_grad():
        assert torch.equal(alone, step.hidden_states(model.base, batch))
    assert relative(adapted, alone) > 0.01


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_head_loss_equals_the_plain_one(softcap: float | None, operations: Operations) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 16, generator=generator), torch.randn(VOCABULARY, 16, generator=generator)
    targets = torch.arange(9, device=DEVICE) * 7
    head = head_loss.Head(weight.to(DEVICE), softcap=softcap)
    results = []
    for function in (head_loss.loss_sum, lambda *given: loss_sum_with(operations, *given)):
        leaf = hidden.to(DEVICE).requires_grad_()
        loss = function(leaf, targets, head, 0.5)
        loss.backward()
        results.append((loss.item(), leaf.grad))
    assert results[1][0] == pytest.approx(results[0][0], rel=SAME_FUNCTION)
    assert relative(results[1][1], results[0][1]) < SAME_FUNCTION


def test_refusals_name_their_reason(tmp_path: Path) -> None:
    cases = [
        ("layers of type CohereDecoderLayer are not", load(tmp_path / "1", "cohere")),
        ("capped at 50.0", load(tmp_path / "5", "gemma2", changes={"head_dim": 32, "attn_logit_softcapping": 50.0})),
        ("attention is eager", load(tmp_path / "3", attention="eager")),
        ("layers is plain", load(tmp_path / "4", layers="plain")),
    ]
    for words, model in cases:
        assert words in str(model_refusal(model.base, model.flat, model.compute))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"intermediate_size": 104}, "a width that is not a multiple of 16"),
        ({"head_dim": 24}, "head size 24 is not a multiple of 16"),
    ],
    ids=["feed-forward", "heads"],
)
def test_widths_whose_rows_start_anywhere_are_refused(
    changes: Mapping[str, object], reason: str, tmp_path: Path
) -> None:
    model = load(tmp_path, changes=changes, weight_format=WeightFormat.NONE)
    assert model_refusal(model.base, model.flat, model.compute) == reason


def test_layers_of_different_shapes_are_refused(tmp_path: Path) -> None:
    model = load(tmp_path)
    model.base.layers[1].mlp.gate_proj = model.base.layers[1].self_attn.q_proj
    assert model_refusal(model.base, model.flat, model.compute) == "layers of different shapes"


def test_a_cpu_keeps_the_plain_layers(tmp_path: Path) -> None:
    model = load(tmp_path)
    refusal = fused.try_attach(model.base, model.flat, model.compute, torch.device("cpu"))
    assert refusal == fused.Refusal("no Triton kernels on cpu")
