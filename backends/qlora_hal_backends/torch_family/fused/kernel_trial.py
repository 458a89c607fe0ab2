"""Whether the kernels compute on this device what torch does, asked once for each device before a model uses them.

A compiler that is new to a device may be wrong without an error: each kernel runs on a few rows beside its reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal_backends.torch_family.attention.causal import HeadCounts
from qlora_hal_backends.torch_family.base_weights import quantize
from qlora_hal_backends.torch_family.fused.families import Activation
from qlora_hal_backends.torch_family.fused.operations import (
    Dropout,
    HeadNorm,
    Masks,
    Operations,
    Placements,
    Rotary,
)
from qlora_hal_backends.torch_family.fused.reference import ReferenceOperations

ROWS, WIDTH, HEADS = 6, 192, HeadCounts(query=9, key_value=3, size=16)
EPSILON = 1e-6
CLOSE = 1e-4
"""Of float32 results of size 1: sums of up to two hundred terms in another order (1e-6), exponentials of the device's
own (1e-6 each), what bitsandbytes' decoder may round otherwise. A wrong index or a lost term differs by 1e-2."""


@cache
def proved_kernels(device: torch.device, activation: Activation) -> Operations:
    """Triton's operations. Raises whatever Triton raises, and ArithmeticError with the names of those that differ."""
    from qlora_hal_backends.torch_family.fused.triton_operations import TritonOperations

    operations = TritonOperations(activation)
    wrong = differing(operations, ReferenceOperations(activation), device)
    if wrong:
        raise ArithmeticError(f"{', '.join(wrong)}: not what torch computes")
    return operations


def differing(operations: Operations, reference: Operations, device: torch.device) -> list[str]:
    """The operations whose results are not those of the reference."""
    return differing_results(*(_results(each, device) for each in (operations, reference)))


def differing_results(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    return [name for name in expected if not torch.allclose(found[name], expected[name], rtol=CLOSE, atol=CLOSE)]


def _results(operations: Operations, device: torch.device) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    def room(columns: int) -> Tensor:
        return torch.zeros(ROWS, columns, device=device)

    results: dict[str, Tensor] = {}
    # Blocks of 128: bitsandbytes has none of 64 for AMD's wide wavefronts.
    packed = quantize(drawn(8, 384), Quantization(WeightFormat.NF4, 128, True), torch.float32)
    results["dequantize"] = torch.zeros(8, 384, device=device)
    operations.dequantize(packed, results["dequantize"])

    x, y, weight = drawn(ROWS, WIDTH), drawn(ROWS, WIDTH), drawn(WIDTH)
    entries = [(0, 5, 4, 6, 10), (-1, 60, 3, 5, 9)]
    results["place"] = torch.ones(200, device=device)
    operations.place(x.flatten(), results["place"], Placements(entries, torch.tensor(entries, device=device)))
    results["copy_rows"] = room(WIDTH)
    operations.copy_rows(x, results["copy_rows"])
    normed = room(WIDTH)
    results["add_norm"] = torch.cat((operations.add_norm(x, y, weight, EPSILON, normed), normed))
    gradient, exact, again = room(WIDTH), room(WIDTH), room(WIDTH)
    operations.norm_backward(x, y, weight, EPSILON, x, gradient, exact, again)
    results["norm_backward"] = torch.cat((gradient, exact, again))
    results["norms of columns"] = x.clone()
    inner = results["norms of columns"][:, 16:-32]
    operations.norm_backward(inner, y[:, 16:-32], weight[16:-32], EPSILON, None, inner, None, None)
    operations.add_norm(inner, None, weight[16:-32], EPSILON, inner)

    gate_up = drawn(ROWS, 2 * WIDTH)
    results["swiglu"] = room(WIDTH)
    operations.swiglu(gate_up, results["swiglu"])
    gradient, product = room(2 * WIDTH), room(WIDTH)
    operations.swiglu_backward(gate_up, x, gradient, product)
    results["swiglu_backward"] = torch.cat((gradient, product), dim=1)

    columns, head_norm = HEADS.query_columns + HEADS.key_columns, HeadNorm(drawn(2, HEADS.size), EPSILON)
    for name, norm, pairs in (
        ("", None, HEADS.size // 2),
        (" of normed heads", head_norm, HEADS.size // 2),
        (" of parts of heads", head_norm, HEADS.size // 4),
    ):
        angles = drawn(8, pairs)
        rotary = Rotary(angles.cos(), angles.sin(), torch.arange(ROWS, device=device))
        results[f"rotate{name}"] = room(columns)
        operations.rotate(x, results[f"rotate{name}"], HEADS, rotary, norm)
        upstream = drawn(ROWS, HEADS.query_columns).unflatten(1, (HEADS.query, HEADS.size)).transpose(0, 1)[None]
        results[f"rotate_backward{name}"] = room(HEADS.query_columns)
        source = x[:, : HEADS.query_columns]
        operations.rotate_backward(upstream, results[f"rotate_backward{name}"], rotary, norm, source, False)

    words = torch.arange(ROWS * 7919, device=device).to(torch.int32).view(7919, ROWS)[::911] * 40503
    masks = Masks(Dropout(words[0].contiguous(), 0.3), words[1:3].repeat(1, WIDTH // ROWS).contiguous(), rank=5)
    results["drop"] = room(WIDTH)
    operations.drop(x, masks, 1, results["drop"])
    results["add_dropped"] = room(WIDTH)
    operations.add_dropped(x, drawn(ROWS, 16), drawn(16, WIDTH), masks, results["add_dropped"])

    logits = drawn(ROWS, 300) * 3
    losses = operations.cross_entropy(logits, torch.arange(ROWS, device=device), 0.5, True)
    results["cross_entropy"] = torch.cat((losses[:, None], logits), dim=1)
    return results
