"""The kernels of a fused mixture one by one, in the shape of Qwen3-30B-A3B with 4 x 2048 tokens: how long each takes on
an NVIDIA GPU, and how much of the device's copy speed that is.

    PYTHONPATH=.:backends python benchmarks/moe_kernels.py

Each is launched twenty times between two events, on buffers that no cache of the device holds; the best of five such
rounds counts. `--tune` also tries how many numbers a program decodes, and with how many warps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal_backends.torch_family.base_weights import quantize
from qlora_hal_backends.torch_family.experts.stacked_weights import stacked
from qlora_hal_backends.torch_family.fused.mixture import triton_operations
from qlora_hal_backends.torch_family.fused.mixture.operations import Router
from qlora_hal_backends.torch_family.fused.mixture.reference import ReferenceMixture

TOKENS, EXPERTS, EACH, HIDDEN, INNER, RANKS = 8192, 128, 8, 2048, 768, 32
LAUNCHES, ROUNDS = 20, 5
DEVICE = torch.device("cuda")


def milliseconds(launch: Callable[[], object]) -> float:
    launch()
    found = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(LAUNCHES):
            launch()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / LAUNCHES)
    return min(found)


def stack_of(rows: int, columns: int) -> tuple[object, int]:
    """A stack of experts in NF4 with double quantization, and its bytes."""
    packing = Quantization(WeightFormat.NF4, 64, True)
    weight = torch.randn(rows, columns, device=DEVICE)
    base = stacked([quantize(weight, packing, torch.bfloat16) for _ in range(EXPERTS)])
    return base, base.packed.numel() + base.absmax.numel()  # type: ignore[attr-defined]


def told(name: str, launch: Callable[[], object], moved: int, copied: float) -> None:
    taken = milliseconds(launch)
    speed = moved / taken / 1e9
    print(f"{name:44} {taken * 1e3:8.1f} us {speed:6.2f} TB/s {speed / copied:6.0%} of copying")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    mixture = triton_operations.TritonMixture()
    rows = TOKENS * EACH

    def empty(*size: int) -> Tensor:
        return torch.zeros(*size, dtype=torch.bfloat16, device=DEVICE)

    large, other = empty(EXPERTS, INNER, HIDDEN), empty(EXPERTS, INNER, HIDDEN)
    copied = 2 * large.nbytes / milliseconds(lambda: other.copy_(large)) / 1e9
    print(f"copying {copied:.2f} TB/s")

    logits = torch.randn(TOKENS, EXPERTS, device=DEVICE).bfloat16()
    router = Router(EACH, True, torch.bfloat16)
    weights, chosen = mixture.route(logits, router)
    order, back, ends = mixture.sort(chosen, EXPERTS)
    x, wide, gate_up = empty(TOKENS, HIDDEN), empty(rows, HIDDEN + RANKS), empty(rows, 2 * INNER)
    product = empty(rows, INNER)
    of_weights = torch.zeros(TOKENS, EACH, device=DEVICE)
    gradient = torch.zeros(EXPERTS, RANKS // 2, HIDDEN, device=DEVICE)
    products = empty(EXPERTS, RANKS, HIDDEN)
    thin = empty(rows, RANKS)

    for name, sides in (("gate or up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
        base, size = stack_of(*sides)
        out = empty(EXPERTS, sides[0] + RANKS, sides[1] + RANKS)[:, : sides[0], : sides[1]]
        moved = size + 2 * out.numel()
        told(f"decode {name}", lambda b=base, o=out: mixture.dequantize_stack(b, o), moved, copied)  # type: ignore[misc]
        for elements in (1024, 2048, 4096, 8192) if options.tune else ():
            for warps in (1, 2, 4, 8):
                triton_operations.DEQUANTIZED_ELEMENTS, triton_operations.DEQUANTIZE_WARPS = elements, warps
                title = f"  {elements} numbers, {warps} warps"
                told(title, lambda b=base, o=out: mixture.dequantize_stack(b, o), moved, copied)  # type: ignore[misc]
        triton_operations.DEQUANTIZED_ELEMENTS, triton_operations.DEQUANTIZE_WARPS = 2048, 2
    told("route", lambda: mixture.route(logits, router), logits.nbytes, copied)
    told("sort", lambda: mixture.sort(chosen, EXPERTS), 18 * rows, copied)
    told("sort by torch", lambda: ReferenceMixture().sort(chosen, EXPERTS), 18 * rows, copied)
    told("send", lambda: mixture.send(x, back, wide[:, :HIDDEN]), x.nbytes + 2 * rows * HIDDEN, copied)
    told("collect", lambda: mixture.collect(wide[:, :HIDDEN], back, x, x), 2 * x.nbytes + 2 * rows * HIDDEN, copied)
    told("gated product", lambda: mixture.weighted_swiglu(gate_up, weights, order, product), 3 * product.nbytes, copied)
    told(
        "its gradient",
        lambda: mixture.weighted_swiglu_backward(gate_up, product, weights, order, gate_up, product, of_weights),
        6 * product.nbytes,
        copied,
    )
    told("scale", lambda: mixture.scale(thin, 0.5, wide[:, HIDDEN:]), 3 * thin.nbytes, copied)
    half = products[:, : RANKS // 2]
    told("add to experts", lambda: mixture.add_to_experts(gradient, half, ends), 10 * gradient.numel(), copied)


if __name__ == "__main__":
    main()
