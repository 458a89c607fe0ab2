"""MXFP4 in torch, and gpt-oss as it is published: its bytes are kept, and mean what they mean in transformers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from against_transformers import compare, reference_of
from drawn_models import write_drawn_model
from published_mxfp4 import write_published_gpt_oss
from safetensors.torch import load_file, save_file
from trainers import open_cpu_trainer, source_of
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.errors import ModelError
from qlora_hal_backends import torch_family
from qlora_hal_backends.cpu_torch.trainer import open_trainer
from qlora_hal_backends.torch_family import microscaling
from qlora_hal_backends.torch_family.loading import Checkpoint
from qlora_hal_backends.torch_family.outline import outline
from qlora_hal_oracle.microscaling import MicroscalingFormat, dequantize_microscaling, quantize_microscaling
from qlora_hal_oracle.random_models import SHAPES, draw_tensors, write_quantized

BLOCK = "model.layers.1.mlp.experts"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoded_weights_are_those_of_transformers_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    write_published_gpt_oss(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    trainer = open_cpu_trainer(tmp_path, weight_format="mxfp4", dtype=dtype).trainer
    both, down = (
        convert_moe_packed_tensors(
            stored[f"{BLOCK}.{name}_blocks"], stored[f"{BLOCK}.{name}_scales"], dtype=getattr(torch, dtype)
        ).float()
        for name in ("gate_up_proj", "down_proj")
    )
    expected = {"gate_proj": both[..., ::2], "up_proj": both[..., 1::2], "down_proj": down}
    for name, weight in expected.items():
        found = trainer.dequantized_weight(f"{BLOCK}.{name}")
        np.testing.assert_array_equal(found, weight.transpose(1, 2).numpy())


def test_logits_loss_and_gradients_are_those_of_transformers_and_peft(tmp_path: Path) -> None:
    write_published_gpt_oss(tmp_path)
    found = compare(tmp_path, reference_of(tmp_path))
    assert found["result"] == "equal", found


def test_kept_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    """Gate and up apart, and nothing else done to them."""
    write_published_gpt_oss(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    base = open_cpu_trainer(tmp_path, weight_format="mxfp4").trainer._base  # type: ignore[attr-defined]
    for name, place, of in (
        ("gate_proj", 0, "gate_up_proj"),
        ("up_proj", 1, "gate_up_proj"),
        ("down_proj", 0, "down_proj"),
    ):
        step = 2 if of == "gate_up_proj" else 1
        held = base.linears[f"{BLOCK}.{name}"].base
        assert torch.equal(held.packed, stored[f"{BLOCK}.{of}_blocks"][:, place::step].flatten(2))
        assert torch.equal(held.scales, stored[f"{BLOCK}.{of}_scales"][:, place::step])
        assert torch.equal(held.dense(), torch.stack([held.expert(number) for number in range(4)]))


def test_gate_and_up_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_published_gpt_oss(tmp_path)
    read: list[tuple[str, int]] = []
    take = Checkpoint.take_bytes_of_part

    def noted(self: Checkpoint, name: str, number: int, device: torch.device) -> torch.Tensor:
        read.append((name, number))
        return take(self, name, number, device)

    monkeypatch.setattr(Checkpoint, "take_bytes_of_part", noted)
    open_cpu_trainer(tmp_path, weight_format="mxfp4")
    assert len(read) == len(set(read)) == 2 * 4 * 4  # layers, experts, bytes and scales of two tensors


def test_codes_are_those_of_the_codec() -> None:
    """Over all scales: numbers below float32's normal ones, zeros, and ties."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(64, 256)) * 2.0 ** random.integers(-130, 120, size=(64, 1))
    weight[0], weight[1] = 0.0, np.tile((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0), 32)
    exact = weight.astype(np.float32)
    expected = quantize_microscaling(exact, MicroscalingFormat.MXFP4)
    found = microscaling.encoded(torch.from_numpy(exact), torch.float32)
    np.testing.assert_array_equal(found.scales.numpy(), expected.scale_codes)
    np.testing.assert_array_equal(found.packed.numpy(), expected.packed.view(np.uint8))
    np.testing.assert_array_equal(found.dense().numpy(), dequantize_microscaling(expected))


@pytest.mark.needs_triton
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
def test_the_kernel_decodes_every_byte_at_every_scale_as_torch_does() -> None:
    """On a GPU compiled; elsewhere in Triton's interpreter (`TRITON_INTERPRET=1 pytest -m needs_triton`)."""
    from qlora_hal_backends.torch_family import microscaling_kernel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1", "without a GPU, set TRITON_INTERPRET=1"
    assert microscaling.decoder_agrees(microscaling_kernel.decoded, device)


@pytest.mark.needs_cuda
def test_a_gpu_decodes_by_the_kernel(tmp_path: Path) -> None:
    assert microscaling.proved_decoder(torch.device("cuda", 0)).words == "MXFP4 by one kernel"


def test_the_trial_of_a_decoder_sees_halves_in_the_wrong_order_and_lost_small_numbers() -> None:
    by_torch, cpu = microscaling.decoded_by_torch, torch.device("cpu")

    def swapped(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return by_torch(packed << 4 | packed >> 4, scales, dtype)

    def flushed(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        numbers = by_torch(packed, scales, dtype)
        return torch.where(numbers.abs() < torch.finfo(dtype).tiny, 0.0, numbers)

    assert microscaling.decoder_agrees(by_torch, cpu)
    assert not microscaling.decoder_agrees(swapped, cpu)
    assert not microscaling.decoder_agrees(flushed, cpu)


@pytest.mark.parametrize(("factor", "said"), [(1.0, "MXFP4 by one kernel"), (2.0, "MXFP4 by torch (the kernel comput")])
def test_a_kernel_that_decodes_something_else_is_not_taken(
    factor: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a device would have it on which Triton compiles it wrong."""

    def decoded(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return factor * microscaling.decoded_by_torch(packed, scales, dtype)

    name = "qlora_hal_backends.torch_family.microscaling_kernel"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(decoded=decoded))
    monkeypatch.setattr(torch_family, "microscaling_kernel", sys.modules[name], raising=False)
    monkeypatch.setattr(microscaling, "device_refusal", lambda device: None)
    decoder = microscaling.proved_decoder.__wrapped__(torch.device("cpu"))
    assert decoder.words.startswith(said)


def test_what_decodes_is_said(tmp_path: Path) -> None:
    write_published_gpt_oss(tmp_path)
    path = open_cpu_trainer(tmp_path, weight_format="mxfp4").trainer.device_facts().kernel_path
    assert "MXFP4 by torch (no Triton kernels on cpu)" in path


@pytest.mark.fault("M53")
def test_groups_that_do_not_divide_a_row_are_refused(tmp_path: Path) -> None:
    write_drawn_model(tmp_path / "dense", "qwen3", {"intermediate_size": 104})
    write_drawn_model(tmp_path / "experts", "gpt_oss", {"intermediate_size": 104})
    for name in ("dense", "experts"):
        source, quantization = source_of(tmp_path / name), Quantization(WeightFormat.MXFP4, 32)
        with pytest.raises(ModelError, match="down_proj has rows of 104") as refusal:
            open_trainer().load(source, quantization, Compute())
        assert refusal.value.code == "QH-M53"


@pytest.mark.fault("C72")
def test_packed_embeddings_of_mlx_are_refused_by_name(tmp_path: Path) -> None:
    shape = SHAPES[0]
    tensors = draw_tensors(shape, np.random.default_rng(0))
    write_quantized(tmp_path, shape, tensors, Quantization(WeightFormat.MXFP4, 32))
    stored = load_file(tmp_path / "model.safetensors")
    packed = quantize_microscaling(tensors["model.embed_tokens.weight"], MicroscalingFormat.MXFP4)
    stored["model.embed_tokens.weight"] = torch.from_numpy(packed.packed)
    stored["model.embed_tokens.scales"] = torch.from_numpy(packed.scale_codes)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.embed_tokens is quantized") as refusal:
        outline(source_of(tmp_path), {})
    assert refusal.value.code == "QH-C72"
