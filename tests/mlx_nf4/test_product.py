"""Products with an NF4 weight: exact, differentiable in the input, packed in memory."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from qlora_hal_backends.mlx_lora.nf4 import NF4Weight, quantize_nf4

Wrap = Callable[[Callable[[mx.array], mx.array]], Callable[[mx.array], mx.array]]


def weight(rows: int = 48, columns: int = 96, **choices: bool) -> NF4Weight:
    return quantize_nf4(mx.random.normal((rows, columns), key=mx.random.key(1)) * 0.1, **choices)


def gradient(function: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    return mx.grad(lambda x: (function(x) * mx.sin(mx.arange(48.0))).sum())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("wrap", [lambda f: f, mx.compile, mx.checkpoint], ids=["plain", "compiled", "checkpointed"])
def test_product_and_gradient_are_those_of_the_decoded_weight(wrap: Wrap, double_quant: bool) -> None:
    packed = weight(double_quant=double_quant)
    dense = packed.dequantize(mx.float32)
    x = mx.random.normal((2, 5, 96), key=mx.random.key(2))
    # The same product of the same numbers: nothing may differ.
    assert mx.array_equal(wrap(packed.product)(x), x @ dense.T)
    assert mx.array_equal(gradient(wrap(packed.product))(x), gradient(lambda x: x @ dense.T)(x))


def test_a_gradient_compiled_as_a_whole_is_the_same() -> None:
    packed = weight(double_quant=True)
    x = mx.random.normal((5, 96), key=mx.random.key(2))
    assert mx.array_equal(mx.compile(gradient(packed.product))(x), gradient(packed.product)(x))


def test_doubly_quantized_scales_decode_to_the_same_bits_in_a_compiled_function() -> None:
    nested = weight(512, 512, double_quant=True)
    compiled = mx.compile(lambda: nested.dequantize(mx.float32))
    assert mx.array_equal(compiled(), nested.dequantize(mx.float32))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_a_product_computes_in_the_dtype_of_its_input(dtype: mx.Dtype) -> None:
    packed = weight()
    x = mx.random.normal((3, 96)).astype(dtype)
    assert packed.product(x).dtype == dtype
    assert mx.array_equal(packed.product(x), x @ packed.dequantize(dtype).T)


def test_a_float32_product_can_see_the_weight_of_a_bfloat16_model() -> None:
    packed = weight()
    x = mx.random.normal((3, 96))
    rounded = packed.dequantize(mx.bfloat16).astype(mx.float32)
    assert not mx.array_equal(rounded, packed.dequantize(mx.float32))
    assert mx.array_equal(packed.product(x, dtype=mx.bfloat16), x @ rounded.T)
    through = gradient(lambda x: packed.product(x, dtype=mx.bfloat16))(x)
    assert mx.array_equal(through, gradient(lambda x: x @ rounded.T)(x))


def test_arrays_can_be_inputs_of_a_compiled_function() -> None:
    packed, other = weight(), quantize_nf4(mx.random.normal((48, 96), key=mx.random.key(9)))
    x = mx.random.normal((3, 96))

    @mx.compile
    def product(codes: mx.array, absmax: mx.array) -> mx.array:
        return NF4Weight(codes, absmax, (48, 96), 64).product(x)

    assert mx.array_equal(product(*packed.arrays), packed.product(x))
    assert mx.array_equal(product(*other.arrays), other.product(x))


@pytest.mark.parametrize(("double_quant", "bits"), [(False, 4.5), (True, 4.13)])
def test_a_weight_stays_within_its_bits_in_memory(double_quant: bool, bits: float) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    packed = weight(1024, 4096, double_quant=double_quant)
    mx.eval(packed.arrays)
    packed.product(mx.ones((1, 4096))).tolist()
    kept = mx.get_active_memory() - before
    assert packed.nbytes == sum(array.nbytes for array in packed.arrays)
    assert packed.nbytes * 8 <= (bits + 0.01) * 1024 * 4096
    assert kept <= packed.nbytes * 1.01  # allocations are rounded up to a page each


def peak_of_backward(layers: list[NF4Weight], product: Callable[[NF4Weight, mx.array], mx.array]) -> int:
    def loss(x: mx.array) -> mx.array:
        for layer in layers:
            x = mx.tanh(product(layer, x))
        return x.sum()

    step = mx.compile(mx.value_and_grad(loss))
    x = mx.ones((2, 512))
    mx.eval(step(x))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(step(x))
    return int(mx.get_peak_memory() - before)


def test_nothing_decoded_is_kept_between_forward_and_backward() -> None:
    layers = [weight(512, 512) for _ in range(40)]
    mx.eval([layer.arrays for layer in layers])
    dense = 512 * 512 * 4
    kept = peak_of_backward(layers, lambda layer, x: x @ layer.dequantize(mx.float32).T)
    ours = peak_of_backward(layers, lambda layer, x: layer.product(x))
    assert kept >= 40 * dense  # the measurement can see it
    # MLX lets ten tasks wait on a CPU; each may hold one decoded weight, and the one at work two copies of it.
    assert ours <= 13 * dense


def test_many_products_leave_nothing_behind() -> None:
    packed = weight()
    x = mx.ones((2, 96))

    def train() -> None:
        for _ in range(50):
            mx.eval(mx.grad(lambda x: packed.product(x).sum())(x))

    train()
    before = mx.get_active_memory()
    train()
    assert mx.get_active_memory() == before


def test_shape_and_sizes_are_reported() -> None:
    packed = weight(double_quant=True)
    assert packed.shape == (48, 96)
    assert packed.block_size == 64
    assert np.array(packed.packed).dtype == np.uint8
