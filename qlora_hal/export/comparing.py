"""Models opened for a look at their logits: in which dtype, on which backend, with an adapter or with one of zeros."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qlora_hal.adapter.naming import module_of
from qlora_hal.contract.backend import BackendSpec, Compute, Quantization
from qlora_hal.contract.capabilities import Requirements, WeightFormat
from qlora_hal.contract.checked_trainer import CheckedTrainer
from qlora_hal.contract.values import Adapter
from qlora_hal.detect import discovery
from qlora_hal.detect.discovery import reports
from qlora_hal.detect.selection import choose
from qlora_hal.model.expert_stacks import layers_of
from qlora_hal.model.facts import read_facts
from qlora_hal.model.source import ModelSource
from qlora_hal.run.prepare import chosen_dtype

if TYPE_CHECKING:
    from qlora_hal.export.subject import Subject
    from qlora_hal.model.facts import ModelFacts
    from qlora_hal.run.prepare import ResolvedBackend

BATCH_ROWS = 8
_ROOM = 1.25
"""Memory of a loaded model over its weights alone: activations of a few rows, and what the allocator keeps."""
_EXACT_IN_FLOAT32 = "float32: no rounding but the merge's own is in the comparison"


@dataclass(frozen=True, slots=True)
class ChosenCompute:
    """The dtype that both models compute in, and why."""

    compute: Compute
    reason: str


def choose_compute(
    subject: Subject, resolved_backend: ResolvedBackend, proved: tuple[str, ...], memory_limit: int | None
) -> ChosenCompute:
    """float32 where the base is then the very one that was trained on and the merged model fits, else the run's dtype.

    A base that is quantized while loading is quantized from its weights in the compute dtype; in another dtype than
    the run's it is the same base only where the files hold nothing finer.
    """
    options = subject.options_on(resolved_backend.choice.spec.name)
    facts = resolved_backend.source.facts
    needed = int(facts.parameter_count * 4 * _ROOM)
    if "float32" in proved and subject.trained_dtype in ("auto", "float32"):
        return ChosenCompute(Compute("float32", options=options), f"{_EXACT_IN_FLOAT32}, and so was the training")
    if "float32" not in proved:
        reason = "the device was not shown to compute float32"
    elif not _same_base_in_float32(facts, resolved_backend.quantization, subject.trained_dtype):
        reason = f"the run's: the base was quantized from its weights in {subject.trained_dtype}"
    elif memory_limit is not None and memory_limit < needed:
        reason = "the run's: the merged model in float32 does not fit this device"
    else:
        return ChosenCompute(Compute("float32", options=options), _EXACT_IN_FLOAT32)
    dtype = chosen_dtype(subject.trained_dtype, proved, resolved_backend.choice.spec.name)
    return ChosenCompute(Compute(dtype, options=options), reason)  # type: ignore[arg-type]


def _same_base_in_float32(facts: ModelFacts, quantization: Quantization, trained_dtype: str) -> bool:
    if facts.prequantized is not None or quantization.weight_format is WeightFormat.NONE:
        return True
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    tensors = [
        facts.tensors.get(f"{layer}.weight")
        for module, shape in facts.linear_modules.items()
        for layer in layers_of(module, shape)
    ]
    # Experts that are one tensor have names of their own; what cannot be told is not taken to be the same.
    return {names.get(tensor.dtype, "") if tensor else "" for tensor in tensors} == {trained_dtype}


@contextmanager
def opened_merged(
    folder: Path, spec: BackendSpec, compute: Compute, adapter: Adapter, *, trust_remote_code: bool
) -> Iterator[CheckedTrainer]:
    """A merged folder, unquantized, on the backend and in the dtype that `merged_backend` gave.

    `adapter`, with B zero, is attached: what the suite certifies is the order load, attach, logits.
    """
    source = ModelSource(folder.name, folder, read_facts(folder), trust_remote_code=trust_remote_code)
    trainer = CheckedTrainer(discovery.open_trainer(spec, compute.options))
    try:
        trainer.load(source, Quantization(WeightFormat.NONE), compute)
        trainer.attach(without_effect(adapter), "adamw")
        yield trainer
    finally:
        trainer.close()


def merged_backend(spec: BackendSpec, compute: Compute, architecture: str) -> tuple[BackendSpec, Compute]:
    """What runs the merged model: the same backend, or the first ready one where that has no unquantized format."""
    capabilities = spec.capabilities
    if WeightFormat.NONE in capabilities.weight_formats and compute.dtype in capabilities.compute_dtypes:
        return spec, compute

    needs = Requirements(weight_format=WeightFormat.NONE, compute_dtype=compute.dtype, architecture=architecture)
    entries = discovery.listed()
    choice = choose("auto", needs, entries, reports(entries), allow_cpu=True)
    return choice.spec, Compute(compute.dtype)


def without_effect(adapter: Adapter) -> Adapter:
    """The adapter with B zero: its product is zero."""
    tensors: Mapping[str, np.ndarray] = {  # type: ignore[type-arg]
        name: np.zeros_like(tensor) if module_of(name)[1] == "B" else tensor for name, tensor in adapter.tensors.items()
    }
    return Adapter(tensors, adapter.config)
