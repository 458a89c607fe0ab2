"""What NF4 costs on MLX beside MLX's own affine 4 bits: a linear layer of MLP size, forward and backward.

    python benchmarks/mlx_nf4.py [--tokens 128] [--rounds 7]

Same Gaussian weight, same input, same process, turn by turn; medians and their ratio are printed as one JSON line, with
the bytes each keeps, the bytes each needs at its peak, and its relative error. `affine decoded` decodes the affine
weight for each product as NF4 must; MLX's fused `quantized_matmul` is a scalar loop on a CPU and a kernel on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from qlora_hal_backends.mlx_lora.nf4 import kernel_path, quantize_nf4

GROUP = 64


@dataclass(frozen=True)
class Subject:
    """One way to hold the weight: the product x W^T, what it decodes to, and the arrays it keeps."""

    product: Callable[[mx.array], mx.array]
    decoded: mx.array
    arrays: tuple[mx.array, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out-features", type=int, default=2816)
    parser.add_argument("--in-features", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments = parser.parse_args()
    dtype = getattr(mx, arguments.dtype)
    weight = mx.random.normal((arguments.out_features, arguments.in_features), key=mx.random.key(0)).astype(dtype)
    x = mx.random.normal((arguments.tokens, arguments.in_features), key=mx.random.key(1)).astype(dtype)
    found = subjects(weight)
    steps = {name: mx.compile(mx.value_and_grad(loss_of(subject))) for name, subject in found.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(arguments.rounds + 1):  # the first warms up
        for name, step in steps.items():
            start = time.perf_counter()
            mx.eval(step(x))
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(json.dumps(results(arguments, weight, x, found, steps, medians)))


def subjects(weight: mx.array) -> dict[str, Subject]:
    plain, nested = quantize_nf4(weight), quantize_nf4(weight, double_quant=True)
    codes, scales, biases = mx.quantize(weight, group_size=GROUP, bits=4)
    affine = mx.dequantize(codes, scales, biases, group_size=GROUP, bits=4)
    kept = (codes, scales, biases)
    mx.eval(*plain.arrays, *nested.arrays, *kept)

    def fused(x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, codes, scales, biases, transpose=True, group_size=GROUP, bits=4)

    def decoding(x: mx.array) -> mx.array:
        return x @ mx.dequantize(codes, scales, biases, group_size=GROUP, bits=4).T

    return {
        "nf4": Subject(plain.product, plain.dequantize(mx.float32), plain.arrays),
        "nf4 double": Subject(nested.product, nested.dequantize(mx.float32), nested.arrays),
        "affine fused": Subject(fused, affine, kept),
        "affine decoded": Subject(decoding, affine, kept),
    }


def loss_of(subject: Subject) -> Callable[[mx.array], mx.array]:
    return lambda x: (subject.product(x) ** 2).sum()


def results(
    arguments: argparse.Namespace,
    weight: mx.array,
    x: mx.array,
    found: dict[str, Subject],
    steps: dict[str, Callable[[mx.array], mx.array]],
    medians: dict[str, float],
) -> dict[str, object]:
    rows = {
        name: {
            "milliseconds": round(1000 * medians[name], 2),
            "bits_per_parameter": round(8 * sum(array.nbytes for array in subject.arrays) / weight.size, 3),
            "peak_mib": round(peak_bytes(steps[name], x) / 2**20, 2),
            "relative_error": round(relative_error(subject.decoded, weight), 4),
        }
        for name, subject in found.items()
    }
    return {
        "device": str(mx.default_device()),
        "mlx": mx.__version__,
        "kernel_path": kernel_path(),
        "weight": list(weight.shape),
        "tokens": arguments.tokens,
        "dtype": arguments.dtype,
        "nf4_over_affine_time": round(medians["nf4"] / medians["affine fused"], 3),
        "nf4_over_decoded_affine_time": round(medians["nf4"] / medians["affine decoded"], 3),
        "formats": rows,
    }


def peak_bytes(step: Callable[[mx.array], mx.array], x: mx.array) -> int:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(step(x))
    return int(mx.get_peak_memory() - before)


def relative_error(decoded: mx.array, weight: mx.array) -> float:
    exact = weight.astype(mx.float32)
    return float(mx.linalg.norm(decoded.astype(mx.float32) - exact) / mx.linalg.norm(exact))


if __name__ == "__main__":
    main()
