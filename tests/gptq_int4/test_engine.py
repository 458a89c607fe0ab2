"""The GPTQModel engine: its kernels decode what the oracle packed, and products with that are what they should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gptq_int4.gptq_checkpoints import KINDS, V1, V2, Kind, packed
from torch import nn

from qlora_hal.errors import ModelError, UnsupportedFeatureError
from qlora_hal.errors.installation import install_line
from qlora_hal_backends.gptq_int4.engines import (
    ENGINES,
    GPTQMODEL,
    GptqSettings,
    PackedLinear,
    chosen_kernel,
    engine_obstacle,
    installed_engine,
)
from qlora_hal_backends.gptq_int4.gptqmodel_engine import load_weight
from qlora_hal_backends.torch_family.base_weights import BaseWeight
from qlora_hal_backends.torch_family.lora_linear import FrozenLinear, LoRASwitches, LoRAWeights
from qlora_hal_oracle import GptqWeight, dequantize_gptq
from qlora_hal_oracle.arrays import Float32

OUTPUTS, INPUTS, RANK, ROWS = 48, 256, 4, 24
U32 = 2.0**-24
OLD_TRANSFORMERS = ENGINES["auto_gptq"].requires["transformers"][0]


def weight() -> Float32:
    return np.random.default_rng(3).normal(size=(OUTPUTS, INPUTS)).astype(np.float32)


def settings_of(kind: Kind) -> GptqSettings:
    size = kind.group_size if kind.group_size > 0 else None
    return GptqSettings(size, kind.symmetric, kind.act_order, kind.convention.value, bits=kind.bits)


def on_torch(stored: GptqWeight) -> PackedLinear:
    names = ("qweight", "qzeros", "scales", "g_idx")
    return PackedLinear("a layer", *(torch.from_numpy(getattr(stored, name).copy()) for name in names))


def loaded(kind: Kind, dtype: torch.dtype = torch.float32) -> tuple[BaseWeight, GptqWeight]:
    stored = packed(weight(), kind)
    return load_weight(on_torch(stored), settings_of(kind), "torch", dtype), stored


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_decoded_weight_is_that_of_the_oracle_bit_for_bit(kind: Kind) -> None:
    """A code difference of at most 15 times a float16 scale has at most 15 significant bits: exact in float32."""
    base, stored = loaded(kind)
    assert base.shape == (OUTPUTS, INPUTS)
    assert np.array_equal(base.dense().numpy().astype(np.float64), dequantize_gptq(stored))
    assert np.array_equal(base.dense().numpy(), base.dense().numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_weight_is_rounded_once(dtype: torch.dtype) -> None:
    base, stored = loaded(Kind(32, symmetric=False, convention=V1), dtype=dtype)
    once = torch.from_numpy(dequantize_gptq(stored).astype(np.float32)).to(dtype)
    assert torch.equal(base.dense(), once)


def test_what_stays_in_memory_is_what_the_checkpoint_holds() -> None:
    """The decoded weight is not kept."""
    base, _ = loaded(Kind(64))
    groups = INPUTS // 64
    packed = OUTPUTS * INPUTS // 2 + groups * OUTPUTS // 2 + groups * OUTPUTS * 2 + INPUTS * 4
    for _ in range(2):
        held = {name: buffer.nbytes for name, buffer in base.layer.named_buffers() if not name.startswith("wf_")}
        assert sum(held.values()) + base.scales.nbytes == packed, held  # beside the shifts by which codes are unpacked
        base.dense()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_equal_those_of_a_plain_layer_with_the_decoded_weights(kind: Kind) -> None:
    """Against float64 autograd through `x W^T + s x A^T B^T` with the oracle's W.

    Each entry is a sum of k products in float32: |error| <= k u sum|terms| (Higham 2002, section 3.1), the sum of
    absolute terms computed exactly here; the second product doubles k at most once more.
    """
    base, stored = loaded(kind)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, INPUTS, generator=generator)
    a, b = torch.randn(RANK, INPUTS, generator=generator) / 16, torch.randn(OUTPUTS, RANK, generator=generator) / 4
    dy = torch.randn(ROWS, OUTPUTS, generator=generator)
    layer = FrozenLinear(INPUTS, OUTPUTS)
    layer.base = base
    pa, pb = nn.Parameter(a), nn.Parameter(b)
    layer.lora = LoRAWeights(pa, pb, a, b, 2.0, 0.0, 0, LoRASwitches())
    px = x.clone().requires_grad_()
    y = layer(px)
    y.backward(dy)
    exact = _by_autograd(x, a, b, dy, dequantize_gptq(stored), absolute=False)
    scale = _by_autograd(x.abs(), a.abs(), b.abs(), dy.abs(), np.abs(dequantize_gptq(stored)), absolute=True)
    terms = {"y": 2 * INPUTS + RANK, "x": 2 * OUTPUTS + RANK, "a": ROWS + OUTPUTS, "b": ROWS + INPUTS}
    assert px.grad is not None
    assert pa.grad is not None
    assert pb.grad is not None
    found = {"y": y.detach(), "x": px.grad, "a": pa.grad, "b": pb.grad}
    for name, k in terms.items():
        assert (np.abs(found[name].double().numpy() - exact[name]) <= k * U32 * scale[name]).all(), name


def _by_autograd(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dy: torch.Tensor, w: object, *, absolute: bool
) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    x64, a64, b64 = (t.double().requires_grad_() for t in (x, a, b))
    y = nn.functional.linear(x64, torch.as_tensor(w)) + 2.0 * (x64 @ a64.t()) @ b64.t()
    y.backward(dy.double())
    grads = {"x": x64.grad, "a": a64.grad, "b": b64.grad}
    return {"y": y.detach().numpy(), **{name: g.numpy() for name, g in grads.items() if g is not None}}


@pytest.mark.fault("N15")
@pytest.mark.parametrize("kernel", GPTQMODEL.inference_only_kernels)
def test_an_inference_kernel_is_refused_with_the_trainable_ones(kernel: str) -> None:
    with pytest.raises(UnsupportedFeatureError) as raised:
        chosen_kernel(GPTQMODEL, kernel, "cpu", act_order=False)
    error = raised.value
    assert error.code == "QH-N15"
    assert error.exit_status == 2
    assert "trainable are: torch" in error.message
    assert "forward pass only" in error.cause


@pytest.mark.fault("N15")
def test_a_kernel_that_takes_groups_in_order_is_refused_for_act_order() -> None:
    engine = ENGINES["auto_gptq"]
    in_order = next(kernel for kernel in engine.kernels if not kernel.act_order)
    assert chosen_kernel(engine, in_order.name, "cpu", act_order=False) is in_order
    assert chosen_kernel(engine, "auto", "cpu", act_order=True).act_order
    with pytest.raises(UnsupportedFeatureError, match="cannot train this checkpoint") as raised:
        chosen_kernel(engine, in_order.name, "cpu", act_order=True)
    assert "desc_act" in raised.value.cause


def test_each_device_has_a_trainable_kernel_of_gptqmodel() -> None:
    chosen = {
        device: chosen_kernel(GPTQMODEL, "auto", device, act_order=True).name for device in ("cuda", "rocm", "cpu")
    }
    assert chosen == {"cuda": "triton", "rocm": "torch", "cpu": "torch"}


def test_trainable_kernels_are_those_that_gptqmodel_calls_trainable() -> None:
    from qlora_hal_backends.gptq_int4.contained import surroundings_kept

    with surroundings_kept():
        from gptqmodel.nn_modules.qlinear.exllamav2 import ExllamaV2Linear
        from gptqmodel.nn_modules.qlinear.machete import MacheteLinear
        from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.nn_modules.qlinear.torch_int8 import TorchInt8Linear
        from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear
    assert all(layer.SUPPORTS_TRAINING for layer in (TorchLinear, TritonV2Linear))
    assert not any(layer.SUPPORTS_TRAINING for layer in (MarlinLinear, MacheteLinear, ExllamaV2Linear, TorchInt8Linear))


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"gptqmodel": "7.6.0", "transformers": "5.23.0"}, "gptqmodel"),
        ({"gptqmodel": "7.6.0", "auto-gptq": "0.7.1", "transformers": "5.23.0"}, "gptqmodel"),
        ({"auto-gptq": "0.7.1", "transformers": OLD_TRANSFORMERS}, "auto_gptq"),
        ({"gptqmodel": "7.6.0", "auto-gptq": "0.7.1", "transformers": OLD_TRANSFORMERS}, "auto_gptq"),
    ],
)
def test_the_engine_is_the_one_that_fits_what_is_installed(installed: dict[str, str], expected: str) -> None:
    assert installed_engine(version=installed.get).name == expected


def test_without_a_fitting_engine_every_reason_is_told() -> None:
    with pytest.raises(UnsupportedFeatureError) as raised:
        installed_engine(version={"auto-gptq": "0.7.1", "transformers": "5.23.0"}.get)
    error = raised.value
    assert (error.code, error.exit_status) == ("QH-E60", 2)
    assert "gptqmodel is not installed" in error.message
    assert f"auto_gptq needs transformers {OLD_TRANSFORMERS} or newer" in error.message
    assert "5.23.0 is installed" in error.message
    assert error.fix == install_line("gptq")


def test_an_old_engine_is_told_from_a_missing_one() -> None:
    old = {"gptqmodel": "2.2.0", "transformers": "5.23.0"}
    assert engine_obstacle(GPTQMODEL, old.get) == "gptqmodel needs gptqmodel 7.6 or newer, below 8; 2.2.0 is installed"


def v1_with_a_zero_of_nothing() -> tuple[PackedLinear, GptqSettings]:
    """As auto-gptq wrote asymmetric layers: -1 in four bits."""
    kind = Kind(64, symmetric=False, convention=V1)
    layer = on_torch(packed(weight(), kind))
    layer.qzeros[0, 0] |= 15
    return layer, settings_of(kind)


def test_zero_points_that_v1_cannot_hold_are_refused() -> None:
    layer, settings = v1_with_a_zero_of_nothing()
    with pytest.raises(ModelError, match="zero point of 0 in the GPTQ format v1") as raised:
        load_weight(layer, settings, "torch", torch.float32)
    assert (raised.value.code, raised.value.exit_status) == ("QH-C74", 5)


def test_gptqmodel_reads_back_the_v1_zero_points_that_it_wrote() -> None:
    """It subtracts and adds one to every field of a word at once, with borrows."""
    grid_with_zeros = packed(np.abs(weight()), Kind(64, symmetric=False, convention=V2))
    words = grid_with_zeros.qzeros.view(np.uint32) - np.uint32(0x11111111)
    layer = on_torch(grid_with_zeros)
    layer.qzeros.copy_(torch.from_numpy(words.view(np.int32)))
    told = GptqSettings(64, False, False, "gptq", quantizer="gptqmodel:7.6.0")
    found = load_weight(layer, told, "torch", torch.float32).dense().numpy()
    assert np.array_equal(found.astype(np.float64), dequantize_gptq(grid_with_zeros))
