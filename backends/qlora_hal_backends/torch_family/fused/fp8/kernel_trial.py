"""The proof of `kernel_trial` for products in 8-bit floats, asked once for each device before a model uses them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal_backends.torch_family.base_weights import quantize
from qlora_hal_backends.torch_family.fused.fp8.operations import E4M3, Fp8Operations, LowRank, ScaledRows
from qlora_hal_backends.torch_family.fused.fp8.reference import ReferenceFp8

ROWS, COLUMNS, INNER = 150, 288, 384
"""More than one tile each way, and parts of one."""

SUM_ERROR = 2.0**-5
"""Of results, beside their root mean square: a tensor core may sum 8-bit products with 14 bits, and bfloat16 rounds by
2^-9 of the largest, which are five times as large. A wrong row, scale or element is off by as much as the sum itself, a
bias or an adapter that is lost by a quarter of it."""

FEW = 1e-3
"""The share of rounded elements that may be neighbours in E4M3: where decoders differ in a weight's last bit."""


@cache
def proved_fp8_kernels(device: torch.device) -> Fp8Operations:
    """Triton's operations. Raises whatever Triton raises, and ArithmeticError with the names of those that differ."""
    from qlora_hal_backends.torch_family.fused.fp8.triton_operations import TritonFp8

    operations = TritonFp8()
    wrong = differing(operations, ReferenceFp8(), device)
    if wrong:
        raise ArithmeticError(f"fp8 {', '.join(wrong)}: not what torch computes")
    return operations


def differing(operations: Fp8Operations, reference: Fp8Operations, device: torch.device) -> list[str]:
    """The operations whose results are not those of the reference."""
    found, expected = (_results(each, reference, device) for each in (operations, reference))
    return [name for name in expected if not _is_close(found[name], expected[name])]


def _is_close(found: Tensor, expected: Tensor) -> bool:
    if found.dtype == E4M3:
        return are_neighbours(found.float(), expected.float())
    error = (found.float() - expected.float()).abs().max()
    return bool(error <= SUM_ERROR * expected.float().square().mean().sqrt())


def are_neighbours(found: Tensor, expected: Tensor) -> bool:
    """Whether values of E4M3, given in float32, are the same but for few that are one step away."""
    differs = found != expected
    step = (expected.abs() / 8).clamp_min(2.0**-9)
    return bool(differs.float().mean() <= FEW and ((found - expected).abs() <= step).all())


def _results(operations: Fp8Operations, reference: Fp8Operations, device: torch.device) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    results: dict[str, Tensor] = {}
    base = quantize(drawn(COLUMNS, INNER).bfloat16(), Quantization(WeightFormat.NF4, 128, True), torch.bfloat16)
    scales, exact_scales = (torch.zeros(COLUMNS, device=device) for _ in range(2))
    operations.row_scales(base, scales)
    reference.row_scales(base, exact_scales)
    results["row_scales"] = scales
    e, transposed = (torch.zeros(size, dtype=E4M3, device=device) for size in ((COLUMNS, INNER), (INNER, COLUMNS)))
    operations.decode(base, exact_scales, e)
    operations.decode(base, exact_scales, transposed.t())
    results |= {"decode": e.clone(), "decode transposed": transposed.clone()}

    x, dy = drawn(ROWS, INNER + 24).bfloat16(), drawn(ROWS, COLUMNS + 24).bfloat16()
    x[3], dy[5] = 0.0, 0.0
    for name, wide, width, columns in (("rows", x, INNER, None), ("scaled rows", dy, COLUMNS, exact_scales)):
        quantized = operations.quantize_rows(wide[:, :width], columns)
        results |= {f"quantize_rows of {name}": quantized.values, f"scales of {name}": quantized.scales}

    reference.decode(base, exact_scales, e)
    reference.decode(base, exact_scales, transposed.t())
    forward, backward = (reference.quantize_rows(*of) for of in ((x[:, :INNER], None), (dy[:, :COLUMNS], exact_scales)))
    a, b, bias = (drawn(*size).bfloat16() for size in ((24, INNER), (COLUMNS, 24), (COLUMNS,)))
    products: dict[str, tuple[ScaledRows, Tensor, Tensor | None, LowRank | None, Tensor | None]] = {
        "product": (forward, e, exact_scales, LowRank(x[:, INNER:], b), bias),
        "product backward": (backward, transposed, None, LowRank(dy[:, COLUMNS:], a.t()), None),
        "product of the base alone": (backward, transposed, None, None, None),
    }
    for name, given in products.items():
        # In float32, where the sum shows, and one in the compute dtype.
        results[name] = torch.zeros(ROWS, given[1].shape[0], device=device)
        operations.product(*given, results[name])
    results["product, rounded"] = torch.zeros(ROWS, COLUMNS + 8, dtype=torch.bfloat16, device=device)[:, :COLUMNS]
    operations.product(*products["product"], results["product, rounded"])
    return results
