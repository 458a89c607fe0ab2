"""The statements of the Metal kernel, translated to C++ word by word, give the bits of the table look-up.

What this cannot show: that Apple's compiler takes the text, and how fast it runs. Metal's `half` conversion is stood in
for by the compiler's own `_Float16`; bfloat16 is rounded by hand, to nearest even, as Metal specifies.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qlora_hal.formats.nf4_codes import NF4_TABLE
from qlora_hal_backends.mlx_lora import nf4_metal
from qlora_hal_backends.mlx_lora.nf4 import quantize_nf4
from tests.mlx_nf4.bitsandbytes_nf4 import Array, bits

METAL_IN_CPP = r"""
#include <cstdint>
#include <cstring>
typedef unsigned int uint;
#define constant static const
#define as_type bit_cast_to
template <typename To> To bit_cast_to(uint bits) { To to; std::memcpy(&to, &bits, 4); return to; }
struct bfloat {
    uint16_t bits;
    explicit bfloat(float value) {
        uint32_t word;
        std::memcpy(&word, &value, 4);
        bits = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    }
};
struct Place { uint x; };
"""

CALL = r"""
template <typename T, int COUNT, int BLOCK_SIZE, int BYTES_PER_THREAD>
void thread(const uint8_t* codes, const float* absmax, T* values, Place thread_position_in_grid) {
%(body)s
}
extern "C" void run(const uint8_t* codes, const float* absmax, void* values, uint threads) {
    for (uint x = 0; x < threads; ++x) {
        thread<%(dtype)s, %(count)d, %(block)d, %(bytes)d>(codes, absmax, (%(dtype)s*)values, Place{x});
    }
}
"""

CPP_DTYPES = {mx.float32: "float", mx.float16: "_Float16", mx.bfloat16: "bfloat"}


def run_translated(packed: Array, absmax: Array, count: int, block: int, dtype: mx.Dtype, folder: Path) -> Array:
    """The kernel's output on the CPU, one call per thread of its grid."""
    names = {"dtype": CPP_DTYPES[dtype], "count": count, "block": block, "bytes": nf4_metal.BYTES_PER_THREAD}
    text = METAL_IN_CPP + nf4_metal.kernel_header() + CALL % {**names, "body": nf4_metal.kernel_body()}
    (folder / "kernel.cpp").write_text(text)
    build = ["g++", "-std=c++14", "-O1", "-msse2", "-fsanitize=undefined", "-fno-sanitize-recover", "-shared", "-fPIC"]
    built = subprocess.run(
        [*build, "-o", folder / "kernel.so", folder / "kernel.cpp"], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    item = np.uint32 if dtype == mx.float32 else np.uint16
    guard = 16
    values = np.full(count + guard, 0x1234, dtype=item)
    threads = -(-packed.size // nf4_metal.BYTES_PER_THREAD)
    run = ctypes.CDLL(str(folder / "kernel.so")).run
    run(packed.ctypes.data_as(ctypes.c_void_p), absmax.ctypes.data_as(ctypes.c_void_p),
        values.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint(threads))  # fmt: skip
    assert (values[count:] == 0x1234).all(), "the kernel wrote beyond its output"
    return values[:count]


@pytest.mark.parametrize("dtype", CPP_DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block"), [((64, 128), 64), ((63, 65), 64), ((10, 96), 128), ((5, 7), 32)])
def test_the_translated_kernel_gives_the_bits_of_the_table_lookup(
    tmp_path: Path, shape: tuple[int, int], block: int, dtype: mx.Dtype
) -> None:
    weight = quantize_nf4(mx.random.normal(shape, key=mx.random.key(5)) * 0.3, block_size=block)
    assert isinstance(weight.absmax, mx.array)
    count = shape[0] * shape[1]
    values = run_translated(np.array(weight.packed), np.array(weight.absmax), count, block, dtype, tmp_path)
    assert np.array_equal(values.reshape(shape), bits(weight.dequantize(dtype)))


def test_the_kernel_holds_the_bits_of_the_table() -> None:
    words = nf4_metal.kernel_header().partition("{")[2].partition("}")[0].split(", ")
    assert np.array_equal(np.array([int(word, 16) for word in words], dtype=np.uint32), NF4_TABLE.view(np.uint32))


def test_the_lookup_names_itself_and_the_kernel_is_taken_on_an_apple_gpu_only() -> None:
    assert not mx.metal.is_available()
    assert nf4_metal.kernel_path() == nf4_metal.TABLE_LOOKUP


def test_without_metal_the_kernel_says_so() -> None:
    weight = quantize_nf4(mx.ones((2, 64)))
    assert isinstance(weight.absmax, mx.array)
    with pytest.raises(RuntimeError, match="No Metal back-end"):
        nf4_metal.decode_in_metal(weight.packed, weight.absmax, 128, 64, mx.float32)
