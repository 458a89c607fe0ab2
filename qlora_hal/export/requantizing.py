"""The merged model once more, quantized: by the format's writer, or through the backend that calibrates it.

Quantizing again is no merge without loss: the grid of the trained base fitted the base, not base and adapter. What it
costs is measured like the merge itself and recorded; the limits are those of the 16-bit model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal.adapter.fitting import check_fits
from qlora_hal.contract.backend import BackendSpec, Compute, Quantization
from qlora_hal.contract.capabilities import Feature, Requirements, WeightFormat
from qlora_hal.contract.checked_trainer import CheckedTrainer
from qlora_hal.detect import discovery
from qlora_hal.detect.discovery import find, load_spec, reports
from qlora_hal.detect.selection import choose
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal.export.comparing import without_effect
from qlora_hal.export.weights import BaseFiles, MergedTensor, experts_in_one_tensor
from qlora_hal.files import durable
from qlora_hal.files.safetensors_file import DTYPE_BITS
from qlora_hal.formats.catalogue import record_of
from qlora_hal.formats.record import PackedWriter
from qlora_hal.model.expert_stacks import halves_of, layer_in
from qlora_hal.model.facts import ModelFacts, read_facts
from qlora_hal.model.shards import Array, write_shards
from qlora_hal.model.source import ModelSource
from qlora_hal.model.weight_files import read_headers
from qlora_hal.quantize.calibration import Recipe, calibration_from, quantize_into

if TYPE_CHECKING:
    from qlora_hal.contract.values import ComputeDtype
    from qlora_hal.data import TokenStore
    from qlora_hal.export.subject import Subject

CALIBRATION_ROWS = 128


def requantized(
    source: ModelSource, folder: Path, weight_format: str, *, calibration: TokenStore, tell: Callable[[str], None]
) -> BackendSpec | None:
    """Write `folder`, the merged model in `weight_format`. The backend that made it, where one did; it `tell`s how far
    it is.

    Raises UnsupportedFeatureError QH-B01 when no ready backend here makes the format, and what a quantizer raises.
    """
    record = record_of(weight_format)
    if record.writer is not None:
        write_packed(source, folder, record.writer)
        return None

    calibrated = record.weight_format
    spec = calibrating_backend(calibrated)
    rows = calibration_from(
        calibration, rows=CALIBRATION_ROWS, context=source.facts.max_position_embeddings, where="rows"
    )
    recipe = Recipe(Quantization(calibrated, _group_size(spec, calibrated, source.facts)))
    quantize_into(folder, source, spec, recipe, rows, {}, tell)
    return spec


def write_packed(source: ModelSource, folder: Path, writer: PackedWriter) -> None:
    """Every linear layer that can carry LoRA in the writer's format; all else as it is."""
    dtype = str(source.facts.config.get("dtype") or source.facts.config.get("torch_dtype"))
    files, tensors = BaseFiles(read_headers(source.path)), []
    for name, stored in source.facts.tensors.items():
        module = name.removesuffix(".weight")
        layer = layer_in(source.facts.linear_modules, module)
        if halves_of(name, source.facts.linear_modules):
            raise experts_in_one_tensor(name)
        if module == name or layer is None:
            tensors.append(MergedTensor(name, stored.dtype, stored.shape, stored.byte_count))
            continue
        shapes = writer.shapes(module, layer, dtype)
        tensors += [
            MergedTensor(part, kind, shape, math.prod(shape) * DTYPE_BITS[kind] // 8, module)
            for part, (kind, shape) in shapes.items()
        ]
    folder.mkdir()
    write_shards(folder, tensors, _PackedValues(files, writer, dtype))
    config = {**source.facts.config, "quantization_config": writer.description(dtype)}
    content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    durable.write_new(folder / "config.json", [content])
    for path in source.path.iterdir():
        is_of_weights = path.name.endswith((".safetensors", ".safetensors.index.json"))
        if path.is_file() and not is_of_weights and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


class _PackedValues:
    """The tensors of a packed weight are asked for one by one; the last module's are kept."""

    def __init__(self, files: BaseFiles, writer: PackedWriter, dtype: str) -> None:
        self._files = files
        self._writer = writer
        self._dtype = dtype
        self._module = ""
        self._tensors: Mapping[str, Array] = {}

    def __call__(self, tensor: MergedTensor) -> Array:
        if not tensor.module:
            return self._files.stored(tensor.name)
        if tensor.module != self._module:
            weight = self._files.float32(f"{tensor.module}.weight")
            self._module, self._tensors = tensor.module, self._writer.tensors(tensor.module, weight, self._dtype)
        return self._tensors[tensor.name]


@contextmanager
def opened_requantized(
    folder: Path, preferred: BackendSpec, dtype: ComputeDtype, subject: Subject
) -> Iterator[CheckedTrainer]:
    """A requantized folder, loaded by `preferred` or else by the first ready backend that can; the subject's adapter,
    with B zero, is attached."""
    source = ModelSource(folder.name, folder, read_facts(folder))
    stored = source.facts.prequantized
    assert stored is not None
    quantization = Quantization(WeightFormat(stored.weight_format), stored.block_size, stored.double_quant)
    spec = preferred
    if quantization.weight_format not in spec.capabilities.weight_formats:
        needs = Requirements(
            features=frozenset({Feature.LOAD_PREQUANTIZED}),
            weight_format=quantization.weight_format,
            compute_dtype=dtype,
            architecture=source.facts.model_type,
        )
        entries = discovery.listed()
        spec = choose("auto", needs, entries, reports(entries), allow_cpu=True).spec
    options = subject.options_on(spec.name)
    trainer = CheckedTrainer(discovery.open_trainer(spec, options))
    try:
        trainer.load(source, quantization, Compute(dtype, options=options))
        check_fits(subject.adapter, trainer.linear_modules(), where=str(folder))
        trainer.attach(without_effect(subject.adapter), "adamw")
        yield trainer
    finally:
        trainer.close()


def calibrating_backend(weight_format: WeightFormat) -> BackendSpec:
    """The ready backend that brings a model into the format. Raises UnsupportedFeatureError QH-B01 when none does."""
    entries = discovery.listed()
    ready = [load_spec(find(report.backend, entries)) for report in reports(entries) if report.ready]
    able = [spec for spec in ready if weight_format in spec.capabilities.calibrated_formats]
    if able:
        return max(able, key=lambda spec: spec.priority)
    raise UnsupportedFeatureError(
        "QH-B01",
        f"No backend that is ready here quantizes to {weight_format.value}.",
        where="requantize",
        fix="Install one (qlora-hal backends says how), or omit requantize.",
    )


def _group_size(spec: BackendSpec, weight_format: WeightFormat, facts: ModelFacts) -> int | None:
    """The backend's default, or the largest size it has that divides every layer."""
    sizes = spec.capabilities.block_sizes.get(weight_format, ())
    inputs = [shape.inputs for shape in facts.linear_modules.values()]
    dividing = [size for size in sizes if all(count % size == 0 for count in inputs)]
    if not dividing:
        return sizes[0] if sizes else None  # the quantizer refuses it, naming the layers
    return sizes[0] if sizes[0] in dividing else max(dividing)
