"""Whether the kernels of a mixture compute on this device what torch does; see `fused.kernel_trial`. Asked where a
model has experts: a dense one needs none of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal_backends.torch_family.base_weights import quantize
from qlora_hal_backends.torch_family.experts.stacked_weights import stacked
from qlora_hal_backends.torch_family.fused.families import Activation
from qlora_hal_backends.torch_family.fused.kernel_trial import differing_results
from qlora_hal_backends.torch_family.fused.layer_weights import GroupShape, Slot
from qlora_hal_backends.torch_family.fused.mixture.operations import MixtureOperations, Router, Scores
from qlora_hal_backends.torch_family.fused.mixture.reference import ReferenceMixture
from qlora_hal_backends.torch_family.fused.mixture.weights import StackBuffer, grouped

TOKENS, EXPERTS, EACH, WIDTH = 6, 5, 3, 48


@cache
def proved_mixture_kernels(device: torch.device, activation: Activation) -> MixtureOperations:
    """Triton's operations. Raises whatever Triton raises, and ArithmeticError with the names of those that differ."""
    from qlora_hal_backends.torch_family.fused.mixture.triton_operations import TritonMixture

    operations = TritonMixture(activation)
    wrong = [*differing(operations, ReferenceMixture(activation), device), *differing_products(device)]
    if wrong:
        raise ArithmeticError(f"{', '.join(wrong)}: not what torch computes")
    return operations


def differing(operations: MixtureOperations, reference: MixtureOperations, device: torch.device) -> list[str]:
    """The operations whose results are not those of the reference."""
    return differing_results(*(_results(each, device) for each in (operations, reference)))


def differing_products(device: torch.device) -> list[str]:
    """What torch computes otherwise than a loop over experts would, of grouped products of views as `StackBuffer` has
    them, an expert without rows among them. Small integers and their sums are exact in bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randint(-1, 2, size, generator=generator).to(device, torch.bfloat16)

    shape = GroupShape([Slot("up", slice(0, 32), slice(0, 8))], columns=16, ranks=8)
    buffer = StackBuffer(shape, 2.0, drawn(3, *shape.size), ReferenceMixture())
    ends = torch.tensor([11, 11, 24], dtype=torch.int32, device=device)
    x, dy = drawn(24, 24), drawn(24, 40)
    found = {
        "product": buffer.product(x, ends),
        "input_gradient": buffer.input_gradient(dy, ends),
        "low_rank": _some(buffer.low_rank(x[:, :16], ends)),
        "low_rank_gradient": _some(buffer.low_rank_gradient(dy.clone(), ends)),
        "sums over rows": grouped(dy[:, :32].t(), x[:, :16], ends)[[0, 2]],
    }
    parts = [(0, slice(0, 11)), (2, slice(11, 24))]  # nothing goes to the second

    def looped(rows: Tensor, matrices: Tensor) -> Tensor:
        return torch.cat([rows[part].float() @ matrices[expert].float() for expert, part in parts])

    expected = {
        "product": looped(x, buffer.memory[:, :32].transpose(1, 2)),
        "input_gradient": looped(dy, buffer.memory[:, :, :16]),
        "low_rank": 2 * looped(x[:, :16], buffer.a.transpose(1, 2)),
        "low_rank_gradient": 2 * looped(dy[:, :32], buffer.b),
        "sums over rows": torch.stack([dy[part, :32].t().float() @ x[part, :16].float() for _, part in parts]),
    }
    return differing_results({name: result.float() for name, result in found.items()}, expected)


def _some(thin: Tensor | None) -> Tensor:
    assert thin is not None, "the group has ranks"
    return thin


def _results(operations: MixtureOperations, device: torch.device) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    results: dict[str, Tensor] = {}
    # Blocks of 128: bitsandbytes has none of 64 for AMD's wide wavefronts.
    packing = Quantization(WeightFormat.NF4, 128, True)
    base = stacked([quantize(drawn(8, 384), packing, torch.float32) for _ in range(3)])
    results["dequantize_stack"] = torch.zeros(3, 10, 400, device=device)
    operations.dequantize_stack(base, results["dequantize_stack"][:, 1:9, :384])

    logits = drawn(TOKENS, EXPERTS)
    logits[0, 1:3] = logits[0].max()  # two that are equal
    wider, correction = drawn(TOKENS, 3 * EXPERTS), drawn(3 * EXPERTS)
    in_groups = Router(EACH, True, torch.float32, Scores.SIGMOID, factor=2.5, groups=3, groups_kept=2)
    for name, of, router in (
        (" and normalize", logits, Router(EACH, True, torch.float32)),
        ("", logits, Router(EACH, False, torch.float32)),
        (" by sigmoids", logits, Router(EACH, False, torch.float32, Scores.SIGMOID)),
        (" in groups", wider, in_groups),
    ):
        weights, experts = operations.route(of, correction if router is in_groups else None, router)
        gradient = torch.zeros_like(of)
        operations.route_backward(of, experts, drawn(TOKENS, EACH), router, gradient)
        results[f"route{name}"] = torch.cat((weights, experts.float()), dim=1)
        results[f"route_backward{name}"] = gradient

    chosen = torch.randint(0, EXPERTS - 1, (700, 1), generator=generator).to(device, torch.int16)  # none to the last
    results["sort"] = torch.cat([part.float() for part in operations.sort(chosen, EXPERTS)])

    places = torch.randperm(TOKENS * EACH, generator=generator).to(device)
    back, tokens = torch.argsort(places), drawn(TOKENS, WIDTH)
    sent, collected = torch.zeros(TOKENS * EACH, WIDTH, device=device), torch.zeros(TOKENS, WIDTH, device=device)
    operations.send(tokens, back, sent)
    results["send"] = sent
    operations.collect(drawn(TOKENS * EACH, WIDTH), back, tokens, collected)
    results["collect"] = collected

    gate_up, weights = drawn(TOKENS * EACH, 2 * WIDTH), drawn(TOKENS, EACH)
    product, upstream = torch.zeros_like(sent), drawn(TOKENS * EACH, WIDTH)
    operations.weighted_swiglu(gate_up, weights, places, product)
    results["weighted_swiglu"] = product
    gradient, again, of_weights = torch.zeros_like(gate_up), torch.zeros_like(sent), torch.zeros_like(weights)
    operations.weighted_swiglu_backward(gate_up, upstream, weights, places, gradient, again, of_weights)
    results["weighted_swiglu_backward"] = torch.cat((gradient, again, of_weights.view(-1, 1)), dim=1)

    thin, copy = drawn(TOKENS, EACH), torch.zeros(TOKENS, EACH + 2, device=device)
    operations.scale(thin, 1.5, copy[:, 1:-1])
    results["scale"] = torch.cat((thin, copy), dim=1)

    ends = torch.tensor([4, 4, 7], dtype=torch.int32, device=device)
    results["add_to_experts"] = drawn(3, 6, 20)
    operations.add_to_experts(results["add_to_experts"], drawn(3, 9, 24)[:, 2:8, :20], ends)
    return results
