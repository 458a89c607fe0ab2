"""The pretrained models, and their weights exactly as a weight format's contract has them.

The contract of a format is the oracle's codec: what it makes of a weight and back is the number that products see. A
reference is trained on these numbers, unquantized in float32; a backend is given the model to quantize itself or, where
it cannot, the codec's own packed file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Float32
from qlora_hal.demo import model_path
from qlora_hal.files.safetensors_file import read_arrays
from qlora_hal.formats.catalogue import record_of
from qlora_hal_conformance.convergence import smollm2
from qlora_hal_oracle import LlamaShape, read_shape
from qlora_hal_oracle.random_models import linear_shapes, write_model, write_quantized


def _demo(folder: Path) -> Path:
    return model_path()


def _smollm2(folder: Path) -> Path:
    smollm2.write_model(folder)
    return folder


MODELS: Mapping[str, Callable[[Path], Path]] = {"demo": _demo, "smollm2": _smollm2}
"""Name -> where its folder is, given a folder that it may be written into."""


@dataclass(frozen=True, slots=True, eq=False)
class Pretrained:
    """A pretrained Llama: the folder as published, and its weights in float32 by Hugging Face's names."""

    name: str
    folder: Path
    shape: LlamaShape
    config: Mapping[str, object]
    tensors: Mapping[str, Float32]

    @property
    def sha256(self) -> str:
        """Of all weights, whatever file they came in."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}{tensor.shape}".encode() + tensor.astype("<f4").tobytes())
        return digest.hexdigest()

    def contract_weights(self, quantization: Quantization) -> dict[str, Float32]:
        """Module path -> weight `[out, in]` as the format's codec has it."""
        modules = linear_shapes(self.shape)
        if quantization.weight_format is WeightFormat.NONE:
            return {module: self.tensors[f"{module}.weight"] for module in modules}
        record = record_of(quantization.weight_format)
        size = quantization.block_size or record.default_block
        found = {}
        for module in modules:
            packed = record.codec.quantize(self.tensors[f"{module}.weight"], size, quantization.double_quant)
            found[module] = record.codec.dequantize(packed).astype(np.float32)
        return found

    def write_contract(self, folder: Path, weights: Mapping[str, Float32]) -> None:
        """A folder of plain float32 weights: those of the contract by module path, and all else unchanged."""
        base = {f"{module}.weight": weight for module, weight in weights.items()}
        write_model(folder, self.shape, {**self.tensors, **base}, config=self.config)

    def write_packed(self, folder: Path, quantization: Quantization) -> None:
        """A folder whose linear layers are packed already, as the format's codec packs them."""
        write_quantized(folder, self.shape, self.tensors, quantization, stored_dtype="bfloat16", config=self.config)


def read_model(name: str, folder: Path) -> Pretrained:
    """Find a model, or write it into `folder`. Raises ModelError QH-B53 where it is not installed."""
    found = MODELS[name](folder)
    config = json.loads((found / "config.json").read_text(encoding="utf-8"))
    tensors = {
        key: np.asarray(array, np.float32) for key, array in read_arrays(found / "model.safetensors").arrays.items()
    }
    return Pretrained(name, found, read_shape(config), config, tensors)
