"""Stored weights: bitsandbytes' own numbers, blocks across rows, memory while loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes import functional as codec
from safetensors.torch import load_file, save_file
from tiny_models import write_model
from trainers import OpenTrainer, open_cpu_trainer, random_batch, source_of

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal_backends.torch_family.base_weights import quantize
from qlora_hal_oracle import FourBitFormat, FourBitLayout, dequantize_four_bit, quantize_four_bit

UNIT_ROUNDOFF = 2.0**-24


@pytest.mark.parametrize("kind", [FourBitFormat.NF4, FourBitFormat.FP4])
@pytest.mark.parametrize(("rows", "columns", "block_size"), [(64, 128, 64), (64, 96, 64), (64, 704, 128), (4, 32, 64)])
def test_blocks_may_cross_rows(kind: FourBitFormat, rows: int, columns: int, block_size: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    ours = quantize(weight, Quantization(WeightFormat(kind.value), block_size), torch.float32).dense().numpy()
    stored = quantize_four_bit(weight.numpy(), weight_format=kind, block_size=block_size)
    exact = dequantize_four_bit(stored.packed, stored.absmax, FourBitLayout(kind, block_size, (rows, columns)))
    # One float32 product of a code and a scale: half a unit in the last place of the result.
    assert np.abs(ours - exact).max() <= 2 * UNIT_ROUNDOFF * np.abs(exact).max()


def test_int8_integers_equal_those_of_bitsandbytes() -> None:
    from bitsandbytes.functional import int8_vectorwise_quant

    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)).half().float()
    ours = quantize(weight, Quantization(WeightFormat.INT8), torch.float32)
    theirs, row_absmax, _ = int8_vectorwise_quant(weight.half())
    # A value within float32 rounding of a half may go either way; no more than one in ten thousand does.
    assert (ours.integers != theirs).float().mean() <= 1e-4  # type: ignore[attr-defined]
    assert torch.equal(ours.row_absmax, row_absmax)  # type: ignore[attr-defined]


def test_zero_weights_stay_zero_in_every_format() -> None:
    for weight_format, block_size in ((WeightFormat.INT8, None), (WeightFormat.NF4, 64), (WeightFormat.FP4, 64)):
        assert not quantize(torch.zeros(64, 64), Quantization(weight_format, block_size), torch.float32).dense().any()


@pytest.mark.parametrize("weight_format", ["nf4", "fp4", "int8"])
def test_checkpoint_written_by_transformers_is_taken_as_it_is(
    weight_format: str, tmp_path: Path, opened: Callable[..., OpenTrainer]
) -> None:
    """transformers and bitsandbytes quantize and save; our weights must be theirs, bit for bit."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    write_model(tmp_path / "plain", "llama")
    four_bit = weight_format != "int8"
    settings = BitsAndBytesConfig(
        load_in_4bit=four_bit,
        load_in_8bit=not four_bit,
        bnb_4bit_quant_type=weight_format if four_bit else "nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "quantized")
    stored = source_of(tmp_path / "quantized").facts.prequantized
    assert stored is not None
    assert stored.weight_format == weight_format
    ours = opened(tmp_path / "quantized", weight_format=weight_format)
    for name, module in theirs.named_modules():
        if name in ours.trainer.linear_modules():
            if four_bit:
                expected = dequantize_4bit(module.weight.data, module.weight.quant_state)
            else:
                expected = module.weight.CB.float() * (module.weight.SCB / 127.0)[:, None]
            assert np.array_equal(ours.trainer.dequantized_weight(name), expected.float().numpy()), name
    assert ours.step([random_batch(0)]).applied


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_codes_stored_under_the_name_of_a_float_and_scales_in_sixteen_bits_are_read(
    double_quant: bool, scales: torch.dtype, tmp_path: Path
) -> None:
    """As FSDP wants codes stored. Kernels read them as bytes, and bitsandbytes its scales as float32."""
    plain, module = write_model(tmp_path / "plain", "llama"), "model.layers.1.mlp.up_proj"
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        codes, state = codec.quantize_4bit(
            tensors[name], blocksize=64, compress_statistics=double_quant, quant_storage=torch.bfloat16
        )
        parts = state.as_dict(packed=True)
        scale = "nested_absmax" if double_quant else "absmax"
        parts[scale] = parts[scale].to(scales)
        tensors |= {name: codes, **{f"{name}.{part}": value for part, value in parts.items()}}
        if name == f"{module}.weight":
            (state.state2 if double_quant else state).absmax = parts[scale].float()
            expected = codec.dequantize_4bit(codes.view(torch.uint8).view(-1, 1), state)
    stored = tmp_path / "packed"
    stored.mkdir()
    save_file(tensors, stored / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    described = {**method, "bnb_4bit_use_double_quant": double_quant, "bnb_4bit_quant_storage": "bfloat16"}
    (stored / "config.json").write_text(json.dumps({**config, "quantization_config": described}))
    trainer = open_cpu_trainer(stored, weight_format="nf4").trainer
    assert trainer._base.linears[module].base.packed.dtype == torch.uint8  # type: ignore[attr-defined]
    np.testing.assert_array_equal(trainer.dequantized_weight(module), expected.numpy())


@pytest.mark.long
def test_loading_never_holds_the_unquantized_model(tmp_path: Path) -> None:
    """Anonymous memory at its peak, in a fresh process: 4-bit weights, what stays unquantized, and one tensor."""
    small = write_model(tmp_path / "small", "llama")
    folder = write_model(
        tmp_path / "large", "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=24, vocab_size=320
    )
    program = f"""
import sys, threading
sys.path[:0] = {sys.path!r}
import torch, bitsandbytes, transformers, accelerate
from trainers import source_of
from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal_backends.cpu_torch.trainer import open_trainer
from pathlib import Path
small, source = (source_of(Path(name)) for name in ({str(small)!r}, {str(folder)!r}))
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], anonymous())
four_bit = Quantization(WeightFormat.NF4, 64, True)
trainer = open_trainer()
trainer.load(small, four_bit, Compute("float32"))  # imports what loading imports
before = anonymous()
watcher = threading.Thread(target=watch); watcher.start()
trainer.load(source, four_bit, Compute("float32"))
done.set(); watcher.join()
print(peak[0] - before)
"""
    # A fixed threshold makes glibc give every freed tensor back at once; by default it learns to keep them.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    unquantized = source_of(folder).facts.parameter_count * 4
    # 100 million parameters take 400 MB in float32 and 52 MB in 4 bits; half of the first tells the two apart with
    # room for the allocator and the code that is loaded on first use.
    assert int(child.stdout.split()[-1]) < unquantized / 2
    assert unquantized > 300e6


@pytest.mark.fault("M50")
def test_weights_that_do_not_fit_the_configuration_are_all_named(tmp_path: Path) -> None:
    from qlora_hal.errors import ModelError

    folder = write_model(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ModelError, match="left over") as refusal:
        open_cpu_trainer(folder)
    assert len(refusal.value.context["left_over"]) == 9  # type: ignore[arg-type]


def test_compute_dtypes_are_proved_by_computing() -> None:
    from qlora_hal_backends.cpu_torch.trainer import open_trainer

    assert open_trainer().proved_compute_dtypes()[0] == "float32"
    assert Compute().dtype == "float32"


@pytest.mark.parametrize("weight_format", ["nf4", "int8", "none"])
def test_base_weight_that_is_not_finite_is_named(weight_format: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from qlora_hal.errors import ModelError

    folder = write_model(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN") as refusal:
        open_cpu_trainer(folder, weight_format=weight_format)
    assert refusal.value.code == "QH-M52"
