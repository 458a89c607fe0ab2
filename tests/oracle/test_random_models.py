"""Models of the suite are real models, a function of the seed, and quantized as their libraries would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.files.safetensors_file import read_arrays
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.fixtures import Models
from qlora_hal_conformance.random_inputs import draw_batch, packed, rows_of, stream
from qlora_hal_oracle import LlamaShape, read_shape
from qlora_hal_oracle.random_models import SHAPES, UNEVEN_SHAPE, draw_tensors, linear_shapes, write_model

QUANTIZATIONS = [
    Quantization(WeightFormat.NF4, 64),
    Quantization(WeightFormat.NF4, 64, True),
    Quantization(WeightFormat.FP4, 128),
    Quantization(WeightFormat.INT8),
    Quantization(WeightFormat.INT4_GPTQ, 128),
    Quantization(WeightFormat.INT8_GPTQ, 128),
    Quantization(WeightFormat.INT4_AFFINE, 64),
    Quantization(WeightFormat.INT8_AFFINE, 32),
]


@pytest.mark.parametrize("shape", [*SHAPES, UNEVEN_SHAPE])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_core_reads_the_model_as_it_was_written(shape: LlamaShape, dtype: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", shape, draw_tensors(shape, stream(1, "x")), stored_dtype=dtype)
    facts = ModelSource.in_folder(model.folder).facts
    assert facts.linear_modules == linear_shapes(shape)
    assert read_shape(facts.config) == shape
    assert {tensor.dtype for tensor in facts.tensors.values()} == {
        {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    }
    if dtype != "bfloat16":  # numpy has no bfloat16
        stored = read_arrays(model.folder / "model.safetensors").arrays
        assert all(np.array_equal(stored[name].astype(np.float32), tensor) for name, tensor in model.tensors.items())


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda q: f"{q.weight_format.value}-{q.block_size}")
def test_core_recognises_the_quantized_model(quantization: Quantization, tmp_path: Path) -> None:
    model = Models(tmp_path, 3).quantized("main", quantization)
    facts = ModelSource.in_folder(model.folder).facts
    assert facts.prequantized is not None
    found = (facts.prequantized.weight_format, facts.prequantized.block_size, facts.prequantized.double_quant)
    assert found == (quantization.weight_format.value, quantization.block_size, quantization.double_quant)
    assert facts.linear_modules == linear_shapes(model.shape)
    assert model.stored is not None
    for module, decoded in model.stored.items():
        weight = model.tensors[f"{module}.weight"]
        # 4 bits keep about a tenth of a normal weight's size, 8 bits a hundredth; a scrambled layout keeps nothing.
        assert np.sqrt(((decoded - weight) ** 2).mean()) < 0.2 * weight.std()


def test_equal_seeds_give_equal_models_and_batches_and_others_do_not(tmp_path: Path) -> None:
    first, again, other = (Models(tmp_path / str(n), seed).drawn("main") for n, seed in enumerate((1, 1, 2)))
    name = "model.norm.weight"
    assert np.array_equal(first[1][name], again[1][name])
    assert not np.array_equal(first[1][name], other[1][name])
    batches = [draw_batch(stream(seed, case), SHAPES[0]) for seed, case in ((1, "a"), (1, "a"), (1, "b"), (2, "a"))]
    same = [np.array_equal(batches[0].input_ids, batch.input_ids) for batch in batches]
    assert same == [True, True, False, False]


def test_packed_rows_keep_every_sample() -> None:
    batch = draw_batch(stream(1, "x"), SHAPES[0], lengths=(5, 3, 7))
    together = packed([batch], time=18)
    assert together.counted_tokens == batch.counted_tokens
    assert together.segment_ids[0].tolist() == [1] * 5 + [2] * 3 + [3] * 7 + [0] * 3
    assert together.position_ids[0].tolist() == [*range(5), *range(3), *range(7), 0, 0, 0]
    assert [row.counted_tokens for row in rows_of(batch)] == [
        int((batch.labels[row, 1:] != -100).sum()) for row in range(3)
    ]
