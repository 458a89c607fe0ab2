"""Compiles every Triton kernel for GPUs that need not be there, as `TritonOperations` launches it. Run as a child:

    python kernels_for_other_gpus.py cuda:90:32 hip:gfx942:64 ...

Prints, for each target, what was made of each kernel as `{target: {kernel: kind of binary}}`; of those of 8-bit floats
where the target has none, the compiler's words. No kernel is started: each is replaced by one that notes its arguments,
from which the types of its parameters are read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.errors import CompilationError
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal_backends.torch_family import adamw_kernel, dropout_kernel, microscaling_kernel
from qlora_hal_backends.torch_family.attention.causal import HeadCounts
from qlora_hal_backends.torch_family.base_weights import quantize
from qlora_hal_backends.torch_family.experts.stacked_weights import stacked
from qlora_hal_backends.torch_family.fused import kernels
from qlora_hal_backends.torch_family.fused.families import Activation
from qlora_hal_backends.torch_family.fused.fp8 import kernels as fp8_kernels
from qlora_hal_backends.torch_family.fused.fp8.operations import E4M3, LowRank
from qlora_hal_backends.torch_family.fused.fp8.triton_operations import ADA, BLACKWELL, HOPPER, Tiles, TritonFp8
from qlora_hal_backends.torch_family.fused.mixture import kernels as mixture_kernels
from qlora_hal_backends.torch_family.fused.mixture.operations import Router, Scores
from qlora_hal_backends.torch_family.fused.mixture.triton_operations import TritonMixture
from qlora_hal_backends.torch_family.fused.operations import Dropout, HeadNorm, Masks, Placements, Rotary
from qlora_hal_backends.torch_family.fused.triton_operations import TritonOperations
from qlora_hal_backends.torch_family.optimizer import update_agrees

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    E4M3: "*fp8e4nv",
}
SHARED_MEMORY = {89: 101_376, 90: 232_448, 100: 232_448}
"""Bytes that a program can have (CUDA C++ Programming Guide, "Compute Capabilities"). The compiler does not mind."""

FP8_TILES = {"cuda:89:32": ADA, "cuda:90:32": HOPPER, "cuda:100:32": BLACKWELL}
ROWS, WIDTH, HEADS = 4, 4096, HeadCounts(32, 8, 128)


@dataclass(frozen=True, slots=True)
class Launch:
    name: str
    kernel: JITFunction
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]


class Noted:
    """Stands for one kernel; a launch of it is noted."""

    def __init__(self, name: str, kernel: JITFunction, launches: list[Launch]) -> None:
        self._name, self._kernel, self._launches = name, kernel, launches

    def __getitem__(self, grid: object) -> Any:
        def launch(*given: Any, **named: Any) -> None:
            parameters = {parameter.name: parameter for parameter in self._kernel.params}
            arguments = dict(zip(parameters, given, strict=False))
            arguments |= {name: value for name, value in named.items() if name in parameters}
            assert arguments.keys() == parameters.keys(), f"{self._name}: {arguments.keys() ^ parameters.keys()}"
            self._launches.append(
                Launch(
                    self._name,
                    self._kernel,
                    {n: "constexpr" if parameters[n].is_constexpr else _type_of(v) for n, v in arguments.items()},
                    {n: v for n, v in arguments.items() if parameters[n].is_constexpr},
                    {n: v for n, v in named.items() if n not in parameters},
                )
            )

        return launch


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
    return "fp32" if isinstance(value, float) else "i32"


def launches() -> list[Launch]:
    """Of every kernel, in bfloat16 and with each choice that changes its code; but of none of 8-bit floats."""
    noted: list[Launch] = []
    found = {
        (module, name): kernel
        for module in (kernels, mixture_kernels, adamw_kernel, microscaling_kernel)
        for name, kernel in _kernels_of(module)
    }
    found[dropout_kernel, "_mask"] = dropout_kernel._mask
    for (module, name), kernel in found.items():
        setattr(module, name, Noted(name, kernel, noted))
    for activation in Activation:
        _launch_all(TritonOperations(activation), torch.bfloat16)
        _launch_all_of_mixtures(TritonMixture(activation), torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        blank = torch.zeros(4, WIDTH // 2, dtype=torch.uint8)
        microscaling_kernel.decoded(blank, blank[:, : WIDTH // 32], dtype)
    update_agrees(adamw_kernel.UpdateByKernel, torch.device("cpu"))
    assert {launch.name for launch in noted} == {name for _, name in found}, "a kernel is never launched"
    return list({repr(launch): launch for launch in noted}.values())


def fp8_launches(tiles: Tiles, found: Mapping[str, JITFunction]) -> list[Launch]:
    noted: list[Launch] = []
    for name, kernel in found.items():
        setattr(fp8_kernels, name, Noted(name, kernel, noted))
    _launch_all_of_fp8(TritonFp8(tiles))
    assert {launch.name for launch in noted} == found.keys(), "a kernel is never launched"
    return list({repr(launch): launch for launch in noted}.values())


def _kernels_of(module: ModuleType) -> list[tuple[str, JITFunction]]:
    return [
        (name, kernel)
        for name, kernel in vars(module).items()
        if isinstance(kernel, JITFunction) and not name.startswith("_") and name != "is_kept"  # parts of others
    ]


def _launch_all_of_fp8(operations: TritonFp8) -> None:
    scales = torch.ones(WIDTH)
    for nested in (True, False):
        packed = quantize(torch.ones(16, WIDTH), Quantization(WeightFormat.NF4, 64, nested), torch.float32)
        operations.row_scales(packed, scales[:16])
        for out in (torch.zeros(16, WIDTH, dtype=E4M3), torch.zeros(WIDTH, 16, dtype=E4M3).t()):
            operations.decode(packed, scales[:16], out)
    x = torch.zeros(ROWS, WIDTH + 192, dtype=torch.bfloat16)
    rows = operations.quantize_rows(x[:, :WIDTH], None)
    operations.quantize_rows(x[:, :WIDTH], scales)
    right = torch.zeros(WIDTH, WIDTH, dtype=E4M3)
    for ranks in (0, 16, 64, 192):
        t, b = x[:, WIDTH : WIDTH + ranks], torch.zeros(WIDTH, ranks, dtype=torch.bfloat16)
        forward, backward = (LowRank(t, of) if ranks else None for of in (b, b.t().contiguous().t()))
        operations.product(rows, right, scales, forward, scales.bfloat16(), x[:, :WIDTH])
        operations.product(rows, right, None, backward, None, x[:, :WIDTH])
        operations.product(rows, right, scales, forward, None, torch.zeros(ROWS, WIDTH))


def _launch_all(operations: TritonOperations, dtype: torch.dtype) -> None:
    wide = torch.zeros(ROWS, WIDTH, dtype=dtype)
    weight, logits = torch.ones(WIDTH, dtype=dtype), torch.zeros(ROWS, 128256, dtype=dtype)
    for nested in (True, False):
        packed = quantize(torch.ones(16, WIDTH, dtype=dtype), Quantization(WeightFormat.NF4, 64, nested), dtype)
        operations.dequantize(packed, torch.zeros(16, WIDTH, dtype=dtype))
    entries = [(0, 0, 4, 8, 8)]
    operations.place(wide.flatten(), wide.flatten(), Placements(entries, torch.tensor(entries)))
    operations.copy_rows(wide, wide)
    for residual in (wide, wide.float()):
        operations.add_norm(residual, wide, weight, 1e-6, wide)
        operations.add_norm(residual, None, weight, 1e-6, wide)
        operations.norm_backward(wide, residual, weight, 1e-6, residual, wide, residual, wide)
    operations.norm_backward(wide, wide, weight, 1e-6, None, wide, None, None)
    double = torch.zeros(ROWS, 2 * WIDTH, dtype=dtype)
    operations.swiglu(double, wide)
    operations.swiglu_backward(double, wide, double, wide)
    query = wide[:, : HEADS.query_columns]
    upstream = query.unflatten(1, (HEADS.query, HEADS.size)).transpose(0, 1)[None]
    for norm in (None, HeadNorm(torch.ones(2, HEADS.size, dtype=dtype), 1e-6)):
        for pairs in (HEADS.size // 2, HEADS.size // 4):
            table = torch.zeros(ROWS, pairs)
            rotary = Rotary(table, table, torch.arange(ROWS))
            operations.rotate(double, double, HEADS, rotary, norm)
            operations.rotate_backward(upstream, query, rotary, norm, query, False)
    for with_gradient in (True, False):
        operations.cross_entropy(logits, torch.zeros(ROWS, dtype=torch.int64), 1.0, with_gradient)
    words = torch.zeros(ROWS, dtype=torch.int32)
    for rank in (16, 256):
        masks = Masks(Dropout(words, 0.1), torch.zeros(3, WIDTH, dtype=torch.int32), rank)
        operations.drop(wide, masks, 0, wide)
        operations.add_dropped(wide.float(), wide[:, : 3 * rank], wide, masks, wide)
    dropout_kernel.mask(words, words, 0.1, dtype)


def _launch_all_of_mixtures(operations: TritonMixture, dtype: torch.dtype) -> None:
    """In the shape of Qwen3-30B-A3B: 128 experts, 8 a token, 768 wide between hidden states of 2048."""
    tokens, each, hidden, inner = 4, 8, 2048, 768
    places = torch.arange(tokens * each)
    for nested in (True, False):
        layer = quantize(torch.ones(16, hidden, dtype=dtype), Quantization(WeightFormat.NF4, 64, nested), dtype)
        operations.dequantize_stack(stacked([layer] * 2), torch.zeros(2, 16, hidden, dtype=dtype))
    weight_gradient = torch.zeros(tokens, each)
    x = torch.zeros(tokens, hidden, dtype=dtype)
    rows = torch.zeros(tokens * each, hidden, dtype=dtype)
    gate_up, product = (torch.zeros(tokens * each, width, dtype=dtype) for width in (2 * inner, inner))
    in_groups = Router(each, True, torch.float32, Scores.SIGMOID, 2.5, groups=8, groups_kept=4, exact_logits=True)
    for router, correction in (
        (Router(each, True, dtype), None),
        (Router(each, False, torch.float32), None),
        (replace(in_groups, groups=1, groups_kept=1, normalizes=False), None),
        (in_groups, torch.zeros(128)),
    ):
        logits = torch.zeros(tokens, 128, dtype=torch.float32 if router.exact_logits else dtype)
        weights, experts = operations.route(logits, correction, router)
        operations.route_backward(logits, experts, weight_gradient, router, logits.to(dtype))
        operations.weighted_swiglu(gate_up, weights, places, product)
        operations.weighted_swiglu_backward(gate_up, product, weights, places, gate_up, product, weight_gradient)
    operations.sort(torch.zeros(tokens, each, dtype=torch.int16), 128)
    operations.send(x, places, rows)
    operations.scale(rows[:, :32].contiguous(), 2.0, rows[:, :32])
    for addend in (x, None):
        operations.collect(rows, places, addend, x)
    matrices = torch.zeros(128, 32, hidden)
    operations.add_to_experts(matrices[:, :16], matrices.to(dtype)[:, :16], torch.zeros(128, dtype=torch.int32))


def compiled(target: GPUTarget, noted: list[Launch]) -> Iterator[tuple[str, str]]:
    for launch in noted:
        source = ASTSource(fn=launch.kernel, signature=dict(launch.signature), constexprs=dict(launch.constants))
        binary = triton.compile(source, target=target, options=dict(launch.options))
        room = SHARED_MEMORY.get(target.arch, binary.metadata.shared)
        assert binary.metadata.shared <= room, f"{launch}: {binary.metadata.shared} bytes of shared memory of {room}"
        yield launch.name, next(kind for kind in ("cubin", "hsaco") if kind in binary.asm)


def fp8_compiled(text: str, target: GPUTarget, found: Mapping[str, JITFunction]) -> dict[str, str]:
    """On targets without E4M3 what the compiler says of the kernel that makes it."""
    if text in FP8_TILES:
        return {f"fp8 {name}": kind for name, kind in compiled(target, fp8_launches(FP8_TILES[text], found))}
    rounding = [launch for launch in fp8_launches(ADA, found) if launch.name == "quantize_rows"]
    try:
        return {f"fp8 {name}": kind for name, kind in compiled(target, rounding)}
    except CompilationError as error:
        return {"fp8": f"{error} {error.__cause__}"}


def main() -> None:
    noted, of_fp8 = launches(), dict(_kernels_of(fp8_kernels))
    made = {}
    for text in sys.argv[1:]:
        backend, arch, lanes = text.split(":")
        target = GPUTarget(backend, int(arch) if arch.isdecimal() else arch, int(lanes))
        made[text] = dict(compiled(target, noted)) | (fp8_compiled(text, target, of_fp8) if backend == "cuda" else {})
    print(json.dumps(made))


if __name__ == "__main__":
    main()
