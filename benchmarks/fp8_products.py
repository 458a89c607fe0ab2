"""What products in 8-bit floats cost on one GPU: each product of an 8B-shaped layer, forward and backward.

    PYTHONPATH=.:backends python benchmarks/fp8_products.py [--tiles] [--rows 8192] [--json result.json]

Needs an NVIDIA GPU with E4M3 (Ada, Hopper or later), and bitsandbytes and Triton beside torch. Beside each product
with its adapter's terms (r = 16 on each projection) stand its parts, the rounding of the rows and the decoding of the
weight, torch's product in bfloat16 of the joined operands (`fused.layer_weights`) and `torch._scaled_mm`, which rounds
before anything could be added. `--tiles` measures other tiles too. Times are of many launches back to back, so at the
clock that the card sustains; results are compared with the reference in plain torch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal_backends.torch_family.base_weights import BaseWeight, quantize
from qlora_hal_backends.torch_family.fused.fp8.operations import E4M3, Fp8Operations, LowRank, ScaledRows
from qlora_hal_backends.torch_family.fused.fp8.reference import ReferenceFp8
from qlora_hal_backends.torch_family.fused.fp8.triton_operations import Tiles, TritonFp8, tiles_for

GROUPS = {
    "attention_in": (6144, 4096, 48),
    "attention_out": (4096, 4096, 16),
    "feed_forward_in": (28672, 4096, 32),
    "feed_forward_out": (4096, 14336, 16),
}
"""Rows and columns of the weight, and ranks: of a Llama 3 8B with r = 16."""

TILES = (
    Tiles(128, 256, 128, warps=8, stages=3, parts=2, joined=True),
    Tiles(128, 256, 128, warps=8, stages=3, parts=2, joined=True, group=16),
    Tiles(128, 256, 128, warps=8, stages=3, parts=2),
    Tiles(128, 256, 128, warps=8, stages=4, parts=2),
    Tiles(256, 128, 128, warps=8, stages=3, parts=2, joined=True),
    Tiles(256, 128, 128, warps=8, stages=4, parts=2),
    Tiles(128, 256, 64, warps=8, stages=5, parts=2, joined=True),
    Tiles(128, 128, 128, warps=8, stages=4, joined=True),
    Tiles(128, 128, 128, warps=4, stages=3, resident=2),
    Tiles(128, 128, 128, warps=8, stages=4, joined=True, exact=True),
    Tiles(128, 128, 128, warps=8, stages=3, resident=2, exact=True),
    Tiles(128, 256, 128, warps=8, stages=3, parts=2, exact=True),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One product: its operands in either form."""

    name: str
    base: BaseWeight
    scales: Tensor
    extended: Tensor  # [x | t] or [dy | v]
    width: int  # of x or dy
    right: Tensor  # E, or its transpose
    adapter: Tensor  # [n, R]: B, or the transpose of A
    out: Tensor

    @property
    def is_forward(self) -> bool:
        return self.name.endswith("forward")

    @property
    def flops(self) -> int:
        return 2 * self.extended.shape[0] * self.right.numel()

    def quantized(self, operations: Fp8Operations) -> ScaledRows:
        return operations.quantize_rows(self.extended[:, : self.width], None if self.is_forward else self.scales)

    def multiply(self, operations: Fp8Operations, rows: ScaledRows, out: Tensor) -> None:
        low_rank = LowRank(self.extended[:, self.width :], self.adapter)
        operations.product(rows, self.right, self.scales if self.is_forward else None, low_rank, None, out)

    def decode(self, operations: Fp8Operations) -> None:
        operations.decode(self.base, self.scales, self.right if self.is_forward else self.right.t())


def cases(rows: int, device: torch.device) -> list[Case]:
    generator = torch.Generator(device).manual_seed(0)
    operations = ReferenceFp8()

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    found = []
    for group, (n, k, r) in GROUPS.items():
        weight = (drawn(n, k) * k**-0.5).bfloat16()
        base = quantize(weight, Quantization(WeightFormat.NF4, 64, True), torch.bfloat16)
        scales = torch.empty(n, device=device)
        operations.row_scales(base, scales)
        for direction, width, columns in (("forward", k, n), ("backward", n, k)):
            right = torch.empty(columns, width, dtype=E4M3, device=device)
            operations.decode(base, scales, right if direction == "forward" else right.t())
            extended = drawn(rows, width + r).bfloat16()
            extended[:, width:] *= 2.0**-6
            b, a = (drawn(n, r) * 2.0**-6).bfloat16(), (drawn(r, k) * 2.0**-6).bfloat16()
            adapter = b if direction == "forward" else a.t()
            out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
            name = f"{group} {direction}"
            found.append(Case(name, base, scales, extended, width, right, adapter, out))
    return found


def milliseconds(work: Callable[[], object], seconds: float = 0.3) -> float:
    """Of one call, in a row of calls that takes about `seconds`."""

    def timed(times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / times

    work()
    timed(3)
    return timed(max(5, int(1e3 * seconds / timed(5))))


def check(case: Case, operations: Fp8Operations) -> dict[str, float]:
    """Beside the reference: elements of the rounded rows that differ; the error of the product relative to its root
    mean square, at its largest; and that of the adapter's own part, which has to survive beside the base's."""
    some = slice(0, 512)
    small = Case(
        case.name, case.base, case.scales, case.extended[some], case.width, case.right, case.adapter, case.out[some]
    )
    reference = ReferenceFp8()
    expected_rows, rows = small.quantized(reference), small.quantized(operations)
    different = (expected_rows.values.view(torch.uint8) != rows.values.view(torch.uint8)).sum()
    expected, found, alone = (torch.empty(small.out.shape, device=case.out.device) for _ in range(3))
    small.multiply(reference, expected_rows, expected)
    small.multiply(operations, expected_rows, found)
    operations.product(expected_rows, case.right, case.scales if case.is_forward else None, None, None, alone)
    joined = small.extended[:, case.width :].float() @ case.adapter.float().t()
    right = case.right.clone()
    case.right.zero_()
    case.decode(operations)
    decoded = (right.view(torch.uint8) != case.right.view(torch.uint8)).sum()
    case.right.copy_(right)
    return {
        "rounded elements that differ": int(different),
        "decoded elements that differ": int(decoded),
        "largest error": float((found - expected).abs().max() / expected.square().mean().sqrt()),
        "mean error": float((found - expected).abs().mean() / expected.square().mean().sqrt()),
        "adapter's error": float((found - alone - joined).abs().max() / joined.square().mean().sqrt()),
    }


def measured(case: Case, operations: TritonFp8) -> dict[str, float]:
    rows = case.quantized(operations)
    joined = torch.cat((case.base.dense() if case.is_forward else case.base.dense().t(), case.adapter), dim=1)
    joined = joined if case.is_forward else joined.t().contiguous().t()
    wide = case.scales if case.is_forward else torch.ones(case.right.shape[0], device=case.out.device)
    works: dict[str, Callable[[], object]] = {
        "bfloat16": lambda: torch.mm(case.extended, joined.t(), out=case.out),
        "_scaled_mm": lambda: torch._scaled_mm(
            rows.values, case.right.t(), rows.scales[:, None], wide[None, :], out_dtype=torch.bfloat16
        ),
        "_scaled_mm, fast": lambda: torch._scaled_mm(
            rows.values,
            case.right.t(),
            rows.scales[:, None],
            wide[None, :],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ),
        "product": lambda: case.multiply(operations, rows, case.out),
        "rows": lambda: case.quantized(operations),
        "decode": lambda: case.decode(operations),
    }
    found: dict[str, float] = {}
    for name, work in works.items():
        ms = attempted(lambda w=work: milliseconds(w))  # type: ignore[misc]
        if isinstance(ms, str):
            print(f"# {case.name}, {name}: {ms}", flush=True)
        else:
            found[name] = ms
    return found


Found = TypeVar("Found")


def attempted(work: Callable[[], Found]) -> Found | str:
    """What it gives, or what it fails with: what a torch or a device lacks leaves the rest to be measured."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"


def line_of(case: Case, times: dict[str, float]) -> str:
    rates = {
        name: round(case.flops / ms / 1e9) for name, ms in times.items() if name not in ("rows", "decode") and ms > 0
    }
    if "product" in times and "rows" in times:
        rates["product with rows"] = round(case.flops / (times["product"] + times["rows"]) / 1e9)
    parts = {name: round(times[name], 3) for name in ("rows", "decode") if name in times}
    return f"{case.name:26} TFLOP/s: {rates}; ms: {parts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--tiles", action="store_true", help="measure other tiles too")
    parser.add_argument("--json", default="", help="file that receives the results")
    options = parser.parse_args()
    device = torch.device("cuda", 0)
    all_cases, operations = cases(options.rows, device), TritonFp8()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": options.rows}
    report: dict[str, object] = {**about, "tiles": asdict(tiles_for(device))}
    checks: dict[str, object] = {}
    report["checks"] = checks
    for case in all_cases:
        checks[case.name] = attempted(lambda c=case: check(c, operations))  # type: ignore[misc]
        print(f"# {case.name}: {json.dumps(checks[case.name])}", flush=True)
    times = report["milliseconds"] = {case.name: measured(case, operations) for case in all_cases}
    for case in all_cases:
        print(line_of(case, times[case.name]), flush=True)
    flops = sum(case.flops for case in all_cases)
    for name in ("bfloat16", "_scaled_mm", "_scaled_mm, fast", "product"):
        if all(name in of_case for of_case in times.values()):
            spent = sum(of_case[name] for of_case in times.values())
            print(f"a layer, {name}: {spent:.3f} ms, {flops / spent / 1e9:.0f} TFLOP/s", flush=True)
    for name in ("rows", "decode"):
        print(f"a layer, {name}: {sum(of_case.get(name, 0.0) for of_case in times.values()):.3f} ms", flush=True)
    if options.tiles:
        report["other tiles"] = other_tiles(all_cases)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))


def other_tiles(all_cases: list[Case]) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for tiles in TILES:
        operations = TritonFp8(tiles)
        times: dict[str, object] = {}
        for case in all_cases:
            if not case.name.startswith("feed_forward_in"):  # half the work, over the shortest and the longest sum
                continue
            rows = case.quantized(operations)
            ms = attempted(lambda c=case, r=rows, o=operations: milliseconds(partial(c.multiply, o, r, c.out), 0.1))  # type: ignore[misc]
            times[case.name] = ms if isinstance(ms, str) else round(case.flops / ms / 1e9)
            if isinstance(ms, str):
                break
        found.append({**asdict(tiles), "TFLOP/s": times})
        print(f"{tiles}: {times}", flush=True)
    return found


if __name__ == "__main__":
    main()
