"""auto-gptq's own solver on a model folder, on a CPU too: the library itself insists on CUDA. For a child process."""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from qlora_hal.errors import ModelError, UnsupportedFeatureError
from qlora_hal.model.weight_files import read_json
from qlora_hal_backends.gptq_int4.auto_gptq_engine import check_sides, imported, misread_zeros, reads_one_too_many
from qlora_hal_backends.gptq_int4.engines import WORD_BITS, GptqSettings, QuantizationJob, Report
from qlora_hal_backends.torch_family.transformers_versions import older_names, read_config

_PROCESS_WIDE = (
    ("auto_gptq.modeling._base", "CUDA_0"),
    ("auto_gptq.modeling._utils", "CUDA_0"),
    ("auto_gptq.modeling._const", "CUDA_0"),
)
"""Where the solver finds the device that it works on: the first CUDA device, as a constant."""


def quantize(job: QuantizationJob, report: Report) -> None:
    """Run auto-gptq's solver on a model folder and save what it found. For a child process: what is replaced in the
    process is put back, but the library's own imports stay.

    Raises ModelError QH-M55 for a model that the library cannot quantize and QH-C74 for zero points that it cannot
    write down, UnsupportedFeatureError QH-B01 for format v2.
    """
    if job.settings.checkpoint_format != "gptq":
        raise UnsupportedFeatureError(
            "QH-B01",
            "auto-gptq writes GPTQ format v1 only; v2 was requested.",
            fix="Use the engine gptqmodel, or symmetric groups in format v1.",
        )
    torch.manual_seed(job.seed)
    device = torch.device(job.device)
    report(0, 1, "loading the 16-bit model")
    causal = _sixteen_bit_model(job)
    stored = causal.dtype
    if device.type == "cpu":
        causal = causal.float()  # a CPU has no half-precision products worth the name
    wrapped = _wrapped(causal, job.settings)
    with _solver_on(device), _layers_reported(report):
        wrapped.quantize(_examples(job), use_triton=False, cache_examples_on_gpu=False)
    report(1, 1, "writing")
    _save(wrapped, job, stored)


def _sixteen_bit_model(job: QuantizationJob) -> Any:
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_pretrained(
        job.model,
        config=read_config(job.model, trust_remote_code=False),
        torch_dtype="auto",
        use_safetensors=True,
        local_files_only=True,
    )
    return causal.eval()


def _wrapped(causal: Any, settings: GptqSettings) -> Any:
    """The library's own class for the architecture around a model; its `from_pretrained` insists on CUDA."""
    known = imported("auto_gptq.modeling.auto:GPTQ_CAUSAL_LM_MODEL_MAP")
    model_type = causal.config.model_type
    if model_type not in known:
        raise ModelError(
            "QH-M55",
            f"auto-gptq does not know the architecture {model_type}; it has {', '.join(sorted(known))}.",
            fix="Quantize with the engine gptqmodel.",
        )
    layers = {layer for together in known[model_type].inside_layer_modules for layer in together}
    for name, module in causal.named_modules():
        if any(name.endswith(f".{layer}") for layer in layers) and isinstance(module, torch.nn.Linear):
            check_sides(name, module.in_features, module.out_features, settings, whole=WORD_BITS)
    described = imported("auto_gptq.modeling._base:BaseQuantizeConfig")(
        bits=settings.bits,
        group_size=settings.group_size or -1,
        sym=settings.symmetric,
        desc_act=settings.act_order,
    )
    return known[model_type](causal, False, described)


def _examples(job: QuantizationJob) -> list[dict[str, Tensor]]:
    """Rows of one length together: the library would pad shorter ones on the left, and count the padding."""
    rows = sorted(job.calibration, key=len)
    examples = []
    for _, alike in groupby(rows, key=len):
        tokens = torch.tensor(list(alike), dtype=torch.long)
        for batch in tokens.split(max(job.batch_size, 1)):
            examples.append({"input_ids": batch, "attention_mask": torch.ones_like(batch)})
    return examples


@contextmanager
def _solver_on(device: torch.device) -> Iterator[None]:
    """The solver's device is a constant of three modules, and it waits for CUDA whatever its device."""
    with ExitStack() as stack:
        for module, name in _PROCESS_WIDE:
            stack.enter_context(_replaced(importlib.import_module(module), name, device))
        if device.type != "cuda":
            stack.enter_context(_replaced(torch.cuda, "synchronize", lambda *_: None))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _layers_reported(report: Report) -> Iterator[None]:
    """The solver tells of its progress in its log alone: `Start quantizing layer 3/32`."""
    logger = logging.getLogger("auto_gptq.modeling._base")
    handlers, propagate = list(logger.handlers), logger.propagate
    logger.handlers[:] = [_LayerCount(report)]
    logger.propagate = False
    others = [logging.getLogger(f"auto_gptq.{name}") for name in ("modeling._utils", "quantization.gptq")]
    levels = [other.level for other in others]
    for other in others:
        other.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        for other, level in zip(others, levels, strict=True):
            other.setLevel(level)


class _LayerCount(logging.Handler):
    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.match(r"Start quantizing layer (\d+)/(\d+)", record.getMessage()):
            self._report(int(found[1]) - 1, int(found[2]), f"layer {found[1]}")


def _save(wrapped: Any, job: QuantizationJob, stored: torch.dtype) -> None:
    """auto-gptq's own files; scales in float16 as the format has them, everything else as the 16-bit model has it."""
    packed = {name: module for name, module in wrapped.model.named_modules() if hasattr(module, "qweight")}
    for name, module in packed.items():
        if not job.settings.symmetric and reads_one_too_many(module.qzeros, job.settings):
            raise misread_zeros(name)
    scales = {name: module.scales.to(torch.float16) for name, module in packed.items()}
    wrapped.model.to(stored)
    for name, module in packed.items():
        module.scales = scales[name]
    wrapped.save_quantized(str(job.output), use_safetensors=True)
    # transformers would write down where the model lay on this machine, and rename what a newer version had named.
    config = read_json(job.model / "config.json")
    described = {key: value for key, value in wrapped.quantize_config.to_dict().items() if not key.startswith("model_")}
    config |= older_names(config, where=str(job.model))
    config["quantization_config"] = {**described, "checkpoint_format": job.settings.checkpoint_format}
    (job.output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
