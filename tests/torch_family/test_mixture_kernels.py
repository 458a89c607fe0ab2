"""Each operation of a mixture, in plain torch and in Triton, against torch's own in float64, on inputs with strides,
odd widths and equal scores.

On a GPU the kernels run compiled; elsewhere in Triton's interpreter (`TRITON_INTERPRET=1 pytest -m needs_triton`).
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal_backends.torch_family.base_weights import quantize
from qlora_hal_backends.torch_family.experts import TiesByNumber
from qlora_hal_backends.torch_family.experts.stacked_weights import Blockwise4BitStack, stacked
from qlora_hal_backends.torch_family.fused.families import Activation
from qlora_hal_backends.torch_family.fused.mixture.kernel_trial import differing, differing_products
from qlora_hal_backends.torch_family.fused.mixture.operations import MixtureOperations, Router, Scores
from qlora_hal_backends.torch_family.fused.mixture.reference import ReferenceMixture
from qlora_hal_backends.torch_family.streamed_base import StreamedBase

pytestmark = pytest.mark.filterwarnings(
    # Triton's interpreter on NumPy 2.
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENS, EACH, WIDTH = 5, 3, 24
NF4 = Quantization(WeightFormat.NF4, 64, True)
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
"""As in `test_fused_kernels`: float32 sums in another order, exponentials."""


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.needs_triton)])
def operations(request: pytest.FixtureRequest) -> MixtureOperations:
    if request.param == "torch":
        return ReferenceMixture()
    assert DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1", "without a GPU, set TRITON_INTERPRET=1"
    from qlora_hal_backends.torch_family.fused.mixture.triton_operations import TritonMixture

    return TritonMixture()


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def poisoned(*size: int, extra: int = 8) -> torch.Tensor:
    """A view of a wider buffer, filled with NaN: an element that is not written shows."""
    return torch.full((*size[:-1], size[-1] + extra), float("nan"), device=DEVICE)[..., : size[-1]]


def shuffled(places: int) -> torch.Tensor:
    return torch.randperm(places, generator=torch.Generator().manual_seed(4)).to(DEVICE)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(12, 64), (40, 512), (6, 96)])
def test_stacks_are_decoded_where_they_are_wanted(
    double_quant: bool, shape: tuple[int, int], operations: MixtureOperations
) -> None:
    """Also where an expert has no whole block of scales, or a block goes on in the next row."""
    packing = Quantization(WeightFormat.NF4, 64, double_quant)
    layers = [quantize(random(*shape, seed=seed) * (seed + 1), packing, torch.float32) for seed in range(3)]
    out = poisoned(3, shape[0] + 2, shape[1])
    operations.dequantize_stack(stacked(layers), out[:, 1:-1])
    assert out[:, [0, -1]].isnan().all()
    for expert, layer in enumerate(layers):
        torch.testing.assert_close(out[expert, 1:-1], layer.dense(), rtol=2.0**-22, atol=1e-7)


def test_a_stack_that_is_streamed_is_decoded_where_it_is_wanted(
    operations: MixtureOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel, where there is one, and not by bitsandbytes into a copy of all experts."""
    layers = [
        [quantize(random(8, 128, seed=seed + place), NF4, torch.float32) for seed in (0, 9)] for place in range(3)
    ]
    expected = [stacked(layer).dense() for layer in layers]
    base = StreamedBase(DEVICE, 3 * 2 * 8 * 128)
    in_slots: list[Any] = [base.add([stacked(layer)])[0] for layer in layers]
    base.finish()
    if not isinstance(operations, ReferenceMixture):
        monkeypatch.setattr(Blockwise4BitStack, "dense", None)
    for number in (2, 0, 1):
        out = poisoned(2, 8, 128)
        operations.dequantize_stack(in_slots[number], out)
        torch.testing.assert_close(out, expected[number], rtol=2.0**-22, atol=1e-7)


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize("experts", [3, 5, 16])
def test_the_best_experts_are_chosen_and_of_equals_the_lower(
    experts: int, normalizes: bool, operations: MixtureOperations
) -> None:
    logits = random(TOKENS, experts) * 3
    logits[1] = 2.0  # all are equal
    logits[2, 1:3] = logits[2].max()
    weights, chosen = operations.route(logits, None, Router(EACH, normalizes, torch.float32))
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :EACH]
    assert torch.equal(chosen.long(), order)
    assert chosen[1].tolist() == [0, 1, 2]
    expected = torch.softmax(logits.double(), dim=1).gather(1, order)
    if normalizes:
        expected = expected / expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(weights, expected.float(), **CLOSE)
    rounded, _ = operations.route(logits, None, Router(EACH, normalizes, torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), weights, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("scores", Scores)
@pytest.mark.parametrize("normalizes", [True, False])
def test_the_gradient_of_a_router_is_that_of_float64(
    normalizes: bool, scores: Scores, operations: MixtureOperations
) -> None:
    logits, gradient = random(TOKENS, 5) * 2, random(TOKENS, EACH, seed=1)
    router = Router(EACH, normalizes, torch.float32, scores, factor=2.5)
    _, chosen = operations.route(logits, None, router)
    out = torch.full_like(logits, float("nan"))
    operations.route_backward(logits, chosen, gradient, router, out)
    x = logits.double().requires_grad_()
    weights = (torch.softmax(x, dim=1) if scores is Scores.SOFTMAX else torch.sigmoid(x)).gather(1, chosen.long())
    if normalizes:
        weights = weights / weights.sum(dim=1, keepdim=True)
    (expected,) = torch.autograd.grad(2.5 * weights, x, gradient.double())
    torch.testing.assert_close(out, expected.float(), **CLOSE)
    rounded = torch.full_like(out, float("nan"), dtype=torch.bfloat16)
    operations.route_backward(logits, chosen, gradient, router, rounded)
    torch.testing.assert_close(rounded.float(), out, rtol=2.0**-7, atol=0)


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (3, 1), (4, 4)])
def test_experts_are_chosen_by_corrected_scores_within_the_best_groups(
    groups: int, kept: int, normalizes: bool, operations: MixtureOperations
) -> None:
    """As GLM-4 MoE and DeepSeek-V3 write it; the weights are of the scores themselves."""
    tokens, experts = 24, 12
    logits, correction = random(tokens, experts), random(experts, seed=1)
    logits[1], logits[2, ::2] = 2.0, 1.0  # some are equal, but for their correction
    correction[6:9] = correction[0:3]  # two groups, too
    router = Router(EACH, normalizes, torch.float32, Scores.SIGMOID, 2.5, groups, kept)
    weights, chosen = operations.route(logits, correction, router)
    scores = torch.sigmoid(logits)
    with TiesByNumber():
        corrected = (scores + correction).view(tokens, groups, -1)
        best = torch.topk(torch.topk(corrected, 2)[0].sum(dim=-1), kept)[1]
        inside = torch.zeros(tokens, groups, dtype=torch.bool, device=DEVICE).scatter_(1, best, True)
        expected = torch.topk(corrected.masked_fill(~inside[..., None], float("-inf")).flatten(1), EACH)[1]
    assert torch.equal(chosen.long(), expected)
    of_chosen = scores.double().gather(1, expected)
    if normalizes:
        of_chosen = of_chosen / of_chosen.sum(dim=1, keepdim=True)
    torch.testing.assert_close(weights, (2.5 * of_chosen).float(), **CLOSE)


@pytest.mark.parametrize(("experts", "tokens"), [(3, 1), (5, 40), (128, 100), (300, 7)])
def test_places_are_sorted_by_expert_and_stay_in_their_order(
    experts: int, tokens: int, operations: MixtureOperations
) -> None:
    """Over several blocks of places, the last of them not full, with experts that nobody chose."""
    random_choices = torch.randint(0, experts, (tokens, EACH), generator=torch.Generator().manual_seed(5))
    random_choices[random_choices == 1] = 0
    chosen = random_choices.to(DEVICE, torch.int16)
    order, back, ends = operations.sort(chosen, experts)
    flat = chosen.view(-1).long()
    assert torch.equal(order, torch.argsort(flat, stable=True))
    assert torch.equal(order[back], torch.arange(tokens * EACH, device=DEVICE))
    assert ends.dtype == torch.int32
    assert torch.equal(ends.long(), torch.bincount(flat, minlength=experts).cumsum(0))


@pytest.mark.parametrize("ranks", [8, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_scaled_stands_in_two_places(dtype: torch.dtype, ranks: int, operations: MixtureOperations) -> None:
    thin = random(700, ranks).to(dtype)
    expected = thin * 0.75
    whole = torch.full((700, ranks + 4), float("nan"), dtype=dtype, device=DEVICE)
    copy = whole[:, 2:-2]
    operations.scale(thin, 0.75, copy)
    # Triton's interpreter cuts off where a device rounds.
    torch.testing.assert_close(thin, expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(copy, thin)
    assert whole[:, [0, 1, -2, -1]].isnan().all()


def test_rows_go_to_their_experts_and_come_back_as_a_sum(operations: MixtureOperations) -> None:
    order, tokens = shuffled(TOKENS * EACH), random(TOKENS, WIDTH + 8)[:, :WIDTH]
    rows, back = poisoned(TOKENS * EACH, WIDTH), torch.argsort(order)
    operations.send(tokens, back, rows)
    assert torch.equal(rows, tokens[order // EACH])
    rows.copy_(random(TOKENS * EACH, WIDTH, seed=2))
    expected = rows[back].double().unflatten(0, (TOKENS, EACH)).sum(dim=1)
    for addend in (None, random(TOKENS, WIDTH, seed=3)):
        out = torch.full((TOKENS, WIDTH), float("nan"), device=DEVICE)
        operations.collect(rows, back, addend, out)
        torch.testing.assert_close(out, (expected if addend is None else expected + addend).float(), **CLOSE)


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("width", [WIDTH, 2050])
def test_weighted_products_and_their_gradients_are_those_of_float64(
    activation: Activation, width: int, operations: MixtureOperations
) -> None:
    operations = type(operations)(activation)  # type: ignore[call-arg]
    order = shuffled(TOKENS * EACH)
    gate_up = random(TOKENS * EACH, 2 * width + 8)[:, : 2 * width] * 3
    weights, upstream = random(TOKENS, EACH, seed=1), random(TOKENS * EACH, width, seed=2)
    out = poisoned(TOKENS * EACH, width)
    operations.weighted_swiglu(gate_up, weights, order, out)
    x, w = gate_up.double().requires_grad_(), weights.double().requires_grad_()
    gate, up = x.chunk(2, dim=-1)
    gelu = torch.nn.functional.gelu(gate, approximate="tanh")
    activated = torch.nn.functional.silu(gate) if activation is Activation.SILU else gelu
    y = activated * up * w.view(-1)[order][:, None]
    expected, of_weights = torch.autograd.grad(y, (x, w), upstream.double())
    torch.testing.assert_close(out, y.detach().float(), **CLOSE)
    found, weight_gradient = poisoned(TOKENS * EACH, 2 * width), torch.full_like(weights, float("nan"))
    product = poisoned(TOKENS * EACH, width).copy_(upstream)
    operations.weighted_swiglu_backward(gate_up, product, weights, order, found, product, weight_gradient)  # in place
    # Where a GELU is almost flat its slope is a difference of ones, times up to a hundred: 2^-24 of that.
    torch.testing.assert_close(found, expected.float(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(product, y.detach().float(), **CLOSE)
    # Sums of up to two thousand terms of size 10.
    torch.testing.assert_close(weight_gradient, of_weights.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 7, 16), (3, 90, 70)])
def test_what_stands_for_an_expert_without_rows_is_not_read(
    shape: tuple[int, int, int], operations: MixtureOperations
) -> None:
    """Gradients lie with room behind each expert's, products within wider ones."""
    experts, rows, columns = shape
    room = torch.zeros(experts, rows * columns + 24, device=DEVICE)
    gradient = room[:, : rows * columns].unflatten(1, (rows, columns))
    gradient.copy_(random(*shape))
    products = random(experts, rows + 3, columns + 8, seed=1).bfloat16()
    products[1] = float("nan")
    part = products[:, 2 : 2 + rows, :columns]
    expected = gradient.clone()
    expected[[0, 2]] += part[[0, 2]].float()
    operations.add_to_experts(gradient, part, torch.tensor([4, 4, 6], dtype=torch.int32, device=DEVICE))
    assert torch.equal(gradient, expected)
    assert not room[:, rows * columns :].any()


def test_all_operations_pass_the_trial_that_a_device_is_given(operations: MixtureOperations) -> None:
    assert differing(operations, ReferenceMixture(), DEVICE) == []


def test_the_trial_also_asks_what_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of grouped products of views, and of a sort of small integers."""
    assert differing_products(DEVICE) == []
    multiply = torch.nn.functional.grouped_mm
    monkeypatch.setattr(
        torch.nn.functional,
        "grouped_mm",
        lambda left, right, offs: multiply(left, right, offs=offs) if left.dim() == right.dim() else left @ right[0],
    )
    assert differing_products(DEVICE) == ["product", "input_gradient", "low_rank", "low_rank_gradient"]


def test_the_trial_names_each_operation_that_computes_something_else() -> None:
    class Wrong(ReferenceMixture):
        def route(
            self, logits: torch.Tensor, correction: torch.Tensor | None, router: Router
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Of equals the higher wins."""
            weights, chosen = super().route(logits.flip(1), correction, router)
            return weights, (logits.shape[1] - 1 - chosen).to(chosen.dtype)

        def add_to_experts(self, gradient: torch.Tensor, products: torch.Tensor, ends: torch.Tensor) -> None:
            gradient += products

    found = differing(Wrong(), ReferenceMixture(), DEVICE)
    assert {"route", "route and normalize", "add_to_experts"} <= set(found)
    assert not {"send", "collect", "weighted_swiglu", "dequantize_stack"} & set(found)
