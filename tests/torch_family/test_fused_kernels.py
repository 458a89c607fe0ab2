"""Each Triton kernel against the same operation in plain torch, on inputs with strides, odd widths and large values.

On a GPU the kernels run compiled; elsewhere in Triton's interpreter (`TRITON_INTERPRET=1 pytest -m needs_triton`).
Inputs are float32 unless a test says otherwise: the interpreter truncates where a GPU rounds when it stores bfloat16
(Triton 3.6), which would hide an error.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.dropout import channel_words, kept, token_words
from qlora_hal_backends.torch_family.base_weights import quantize
from qlora_hal_backends.torch_family.fused.families import Activation
from qlora_hal_backends.torch_family.fused.kernel_trial import differing
from qlora_hal_backends.torch_family.fused.operations import (
    Dropout,
    HeadCounts,
    HeadNorm,
    Masks,
    Operations,
    Placements,
    Rotary,
)
from qlora_hal_backends.torch_family.fused.reference import ReferenceOperations
from qlora_hal_backends.torch_family.lora_linear import words_on

pytestmark = [
    pytest.mark.needs_triton,
    # Triton's interpreter on NumPy 2.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE = ReferenceOperations()
ROWS, WIDTH = 10, 48
# Sums of up to a few hundred float32 terms in another order: 2^-24 * sqrt(300) is 1e-6; the rest covers exp and rsqrt.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def kernels() -> Operations:
    # Triton reads the variable when it is first imported, and bitsandbytes imports it: a test cannot set it.
    assert DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1", (
        "run with TRITON_INTERPRET=1 without a GPU"
    )
    from qlora_hal_backends.torch_family.fused.triton_operations import TritonOperations

    return TritonOperations()


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def poisoned(rows: int, columns: int, extra: int = 8) -> torch.Tensor:
    """A view of a wider buffer, filled with NaN: an element that is not written shows."""
    return torch.full((rows, columns + extra), float("nan"), device=DEVICE)[:, :columns]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("weight_format", [WeightFormat.NF4, WeightFormat.FP4])
@pytest.mark.parametrize(("block_size", "shape"), [(64, (48, 192)), (256, (24, 512)), (4096, (3, 8192)), (64, (6, 96))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_weights_equal_those_of_bitsandbytes(
    kernels: Operations,
    double_quant: bool,
    weight_format: WeightFormat,
    block_size: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    base = quantize(random(*shape).to(dtype), Quantization(weight_format, block_size, double_quant), dtype)
    out = poisoned(*shape).to(dtype)
    kernels.dequantize(base, out)
    # Float32: the same products, except for fused multiply-adds in either library. Bfloat16: one unit in the last place
    # (2^-8), where the interpreter truncates or float32 fell on the other side of a rounding boundary.
    tolerance = 2.0**-22 if dtype is torch.float32 else 2.0**-7
    torch.testing.assert_close(out, base.dense(), rtol=tolerance, atol=1e-7)


def test_copied_rows_keep_their_place(kernels: Operations) -> None:
    source, out = random(ROWS, WIDTH + 8)[:, :WIDTH], poisoned(ROWS, WIDTH)
    kernels.copy_rows(source, out)
    assert torch.equal(out, source)


def test_placed_matrices_land_where_the_table_says(kernels: Operations) -> None:
    source = random(200)
    entries = [(0, 3, 4, 6, 10), (24, 100, 16, 8, 8), (-1, 60, 3, 5, 9)]
    placements = Placements(entries, torch.tensor(entries, device=DEVICE))
    found, expected = torch.ones(300, device=DEVICE), torch.ones(300, device=DEVICE)
    kernels.place(source, found, placements)
    REFERENCE.place(source, expected, placements)
    assert torch.equal(found, expected)
    assert not expected[60:65].any()


@pytest.mark.parametrize("with_pending", [True, False])
def test_add_norm_returns_the_sum_and_writes_its_norm(kernels: Operations, with_pending: bool) -> None:
    x, weight = random(ROWS, WIDTH) * 30, random(WIDTH, seed=2)
    pending = random(ROWS, WIDTH, seed=1) if with_pending else None
    out, expected = poisoned(ROWS, WIDTH), poisoned(ROWS, WIDTH)
    h = kernels.add_norm(x, pending, weight, 1e-5, out)
    expected_h = REFERENCE.add_norm(x, pending, weight, 1e-5, expected)
    torch.testing.assert_close(h, expected_h, **CLOSE)
    torch.testing.assert_close(out, expected, **CLOSE)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("with_copies", [True, False])
def test_norm_backward_is_the_gradient_of_the_norm_in_float64(
    kernels: Operations, with_residual: bool, with_copies: bool
) -> None:
    h, gradient, weight = random(ROWS, WIDTH), random(ROWS, WIDTH, seed=1), random(WIDTH, seed=2)
    residual = poisoned(ROWS, WIDTH).copy_(random(ROWS, WIDTH, seed=3)) if with_residual else None
    out = poisoned(ROWS, WIDTH)
    exact, normed = (
        (torch.full_like(h, float("nan")), torch.full_like(h, float("nan"))) if with_copies else (None, None)
    )
    kernels.norm_backward(gradient, h, weight, 1e-5, residual, out, exact, normed)
    x = h.double().requires_grad_()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    (expected,) = torch.autograd.grad(y, x, gradient.double())
    if residual is not None:
        expected = expected + residual
    torch.testing.assert_close(out, expected.float(), **CLOSE)
    if exact is not None and normed is not None:
        torch.testing.assert_close(exact, expected.float(), **CLOSE)
        torch.testing.assert_close(normed, y.detach().float(), **CLOSE)


def test_norms_read_and_write_columns_of_wider_rows(kernels: Operations) -> None:
    """As the norm of all query heads at once does; the gradient takes the place of what it is made from."""
    rows, weight = random(ROWS, WIDTH + 24), random(WIDTH, seed=2)
    x, expected = rows[:, 8:-16], torch.empty(ROWS, WIDTH, device=DEVICE)
    out = poisoned(ROWS, WIDTH)
    kernels.add_norm(x, None, weight, 1e-5, out)
    REFERENCE.add_norm(x.contiguous(), None, weight, 1e-5, expected)
    torch.testing.assert_close(out, expected, **CLOSE)
    gradient = poisoned(ROWS, WIDTH).copy_(random(ROWS, WIDTH, seed=1))
    REFERENCE.norm_backward(gradient.clone(), x.contiguous(), weight, 1e-5, None, expected, None, None)
    kernels.norm_backward(gradient, x, weight, 1e-5, None, gradient, None, None)
    torch.testing.assert_close(gradient, expected, **CLOSE)


@pytest.mark.parametrize("activation", Activation)
def test_gated_products_and_their_gradients_are_those_of_float64(kernels: Operations, activation: Activation) -> None:
    kernels = type(kernels)(activation)  # type: ignore[call-arg]
    gate_up, gradient = random(ROWS, 2 * WIDTH) * 4, random(ROWS, WIDTH, seed=1)
    out, gate_up_gradient, product = poisoned(ROWS, WIDTH), poisoned(ROWS, 2 * WIDTH), torch.empty_like(gradient)
    kernels.swiglu(gate_up, out)
    kernels.swiglu_backward(gate_up, gradient, gate_up_gradient, product)
    x = gate_up.double().requires_grad_()
    gate, up = x.chunk(2, dim=-1)
    is_silu = activation is Activation.SILU
    y = (torch.nn.functional.silu(gate) if is_silu else torch.nn.functional.gelu(gate, approximate="tanh")) * up
    (expected,) = torch.autograd.grad(y, x, gradient.double())
    torch.testing.assert_close(out, y.detach().float(), **CLOSE)
    torch.testing.assert_close(product, y.detach().float(), **CLOSE)
    torch.testing.assert_close(gate_up_gradient, expected.float(), **CLOSE)
    wide, product = poisoned(ROWS, 2 * WIDTH), gradient.clone()
    wide.copy_(gate_up)
    kernels.swiglu_backward(wide, product, wide, product)  # in place
    assert torch.equal(wide, gate_up_gradient)
    assert torch.equal(product, y.detach().float()) or torch.allclose(product, y.detach().float(), **CLOSE)


HEADS = HeadCounts(
    query=9, key_value=3, size=16
)  # 12 heads: more than one tile of eight, and not a whole number of them


def rotary(rows: int, time: int, pairs: int = HEADS.size // 2) -> Rotary:
    angles = torch.outer(torch.arange(time).float(), 0.3 ** torch.arange(pairs).float()).to(DEVICE)
    return Rotary(angles.cos(), angles.sin(), torch.arange(rows, device=DEVICE) * 7 % time)


def head_norm() -> HeadNorm:
    return HeadNorm(random(2, HEADS.size, seed=9), 1e-6)


PAIRS = pytest.mark.parametrize("pairs", [HEADS.size // 2, 3], ids=["whole heads", "part of a head"])


@PAIRS
@pytest.mark.parametrize("normed", [True, False])
def test_rotation_writes_query_and_key_columns_only(kernels: Operations, normed: bool, pairs: int) -> None:
    columns = HEADS.query_columns + HEADS.key_columns
    source = random(ROWS, columns + HEADS.key_columns)
    expected, values = source[:, :columns].clone(), source[:, columns:].clone()
    norm = head_norm() if normed else None
    REFERENCE.rotate(source, expected, HEADS, rotary(ROWS, 5, pairs), norm)
    kernels.rotate(source, source, HEADS, rotary(ROWS, 5, pairs), norm)
    torch.testing.assert_close(source[:, :columns], expected, **CLOSE)
    assert torch.equal(source[:, columns:], values)


@PAIRS
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("is_key", [True, False])
def test_rotation_backward_is_the_gradient_of_rotation(
    kernels: Operations, normed: bool, is_key: bool, pairs: int
) -> None:
    batch, time, count = 2, 5, HEADS.key_value if is_key else HEADS.query
    angles, norm = rotary(batch * time, time, pairs), head_norm() if normed else None
    source = random(batch * time, count * HEADS.size)
    gradient = random(batch, time, count, HEADS.size, seed=1).transpose(1, 2)  # strided, as attention gives it
    out = poisoned(batch * time, count * HEADS.size)
    kernels.rotate_backward(gradient, out, angles, norm, source, is_key)
    x = source.double().requires_grad_()
    split = x.unflatten(-1, (-1, HEADS.size))
    if norm is not None:
        split = split * torch.rsqrt(split.square().mean(-1, keepdim=True) + norm.epsilon) * norm.weights[int(is_key)]
    first, second, rest = split.split((pairs, pairs, HEADS.size - 2 * pairs), dim=-1)
    cos, sin = (table[angles.positions].double()[:, None] for table in (angles.cos, angles.sin))
    y = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    (expected,) = torch.autograd.grad(y, x, gradient.transpose(1, 2).flatten(0, 1).double())
    torch.testing.assert_close(out, expected.float(), **CLOSE)


@pytest.mark.parametrize("vocabulary", [100, 8192 + 77])
def test_cross_entropy_and_its_gradient_are_those_of_float64(kernels: Operations, vocabulary: int) -> None:
    logits = random(4, vocabulary) * 5 + 80  # far from zero: an unshifted exponential would overflow
    targets = torch.tensor([0, vocabulary - 1, 17, 64], device=DEVICE)
    x = logits.double().requires_grad_()
    expected_losses = torch.nn.functional.cross_entropy(x, targets, reduction="none")
    (expected,) = torch.autograd.grad(expected_losses.sum() * 0.25, x)
    untouched = logits.clone()
    losses = kernels.cross_entropy(untouched, targets, 0.25, False)
    assert torch.equal(untouched, logits)
    # Losses near 5 are differences of numbers near 90, whose float32 spacing is 2^-17.
    torch.testing.assert_close(losses, expected_losses.detach().float(), rtol=0, atol=4 * 2.0**-17)
    kernels.cross_entropy(logits, targets, 0.25, True)
    torch.testing.assert_close(logits, expected.float(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rate", [0.05, 0.5])
@pytest.mark.parametrize("channels", [7, 48, 2050])
def test_dropout_masks_are_those_of_the_contract(kernels: Operations, channels: int, rate: float) -> None:
    from qlora_hal_backends.torch_family.dropout_kernel import mask

    key, rows = 2**62 + 11, np.array([0, 3], np.int32)
    tokens, words = token_words(key, rows, 5), channel_words("model.layers.3.mlp.up_proj", channels)
    found = mask(words_on(tokens.reshape(-1), DEVICE), words_on(words, DEVICE), rate, torch.float32)
    expected = kept(key, "model.layers.3.mlp.up_proj", rows, 5, channels, rate).reshape(-1, channels)
    assert np.array_equal(found.cpu().numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("rank", [3, 16, 40])
def test_what_is_dropped_before_and_after_the_adapter_is_what_the_contract_drops(
    kernels: Operations, rank: int
) -> None:
    key, rows, width, names = 2**62 + 11, np.array([0, 3], np.int32), 150, ("layers.0.q_proj", "layers.0.k_proj")
    tokens = words_on(token_words(key, rows, 35).reshape(-1), DEVICE)
    channels = torch.stack([words_on(channel_words(name, width), DEVICE) for name in names])
    masks = Masks(Dropout(tokens, 0.4), channels, rank)
    keeps = [torch.from_numpy(kept(key, name, rows, 35, width, 0.4).reshape(-1, width)).to(DEVICE) for name in names]
    x, v, a = random(70, width + 8)[:, :width], random(70, 2 * rank + 8, seed=1), random(2 * rank + 8, width, seed=2)
    product = random(70, width, seed=3)
    for number, keep in enumerate(keeps):
        out = poisoned(70, width)
        kernels.drop(x, masks, number, out)
        assert torch.equal(out, x * keep)
    out = poisoned(70, width)
    kernels.add_dropped(product, v, a, masks, out)
    first, second = (v[:, part].double() @ a[part].double() for part in (slice(0, rank), slice(rank, 2 * rank)))
    expected = product.double() + first * keeps[0] + second * keeps[1]
    torch.testing.assert_close(out, expected.float(), **CLOSE)


def test_all_kernels_pass_the_trial_that_a_device_is_given(kernels: Operations) -> None:
    assert differing(kernels, REFERENCE, DEVICE) == []


def test_the_trial_names_each_operation_that_computes_something_else() -> None:
    class Wrong(ReferenceOperations):
        def swiglu(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
            super().swiglu(gate_up, out)
            out[-1, -1] += 0.01

        def place(self, source: torch.Tensor, target: torch.Tensor, placements: Placements) -> None:
            super().place(source, target, replace(placements, entries=placements.entries[:1]))

    assert differing(Wrong(), REFERENCE, DEVICE) == ["place", "swiglu"]
