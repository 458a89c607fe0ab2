"""auto-gptq 0.7.1: its layers' own decoding under our products, and its solver, on a CPU too.

The library is archived and imports names that transformers 5 no longer has, so it is imported beside a transformers 4
only, and not before a layer or a solver is asked for. `ci/run_auto_gptq.sh` builds such an environment.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from qlora_hal.errors import BackendUnavailableError, ModelError, UnsupportedFeatureError
from qlora_hal.model.weight_files import read_json
from qlora_hal_backends.gptq_int4.engines import (
    AUTO_GPTQ,
    CODE_BITS,
    CODES_PER_WORD,
    WORD_BITS,
    GptqSettings,
    PackedLinear,
    QuantizationJob,
    Report,
    engine_obstacle,
)
from qlora_hal_backends.gptq_int4.packed_tensors import has_undefined_zeros
from qlora_hal_backends.torch_family.base_weights import BaseWeight
from qlora_hal_backends.torch_family.transformers_versions import older_names, read_config

LARGEST_CODE = 2**CODE_BITS - 1

_PROCESS_WIDE = (
    ("auto_gptq.modeling._base", "CUDA_0"),
    ("auto_gptq.modeling._utils", "CUDA_0"),
    ("auto_gptq.modeling._const", "CUDA_0"),
)
"""Where the solver finds the device that it works on: the first CUDA device, as a constant."""


# decoding -------------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class QuantLinearWeight:
    """A layer of auto-gptq, asked for its weight and never for its product."""

    layer: Any
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.outfeatures, self.layer.infeatures

    @property
    def stored_bytes(self) -> int:
        layer = self.layer
        return sum(int(part.nbytes) for part in (layer.qweight, layer.qzeros, layer.g_idx, self.scales))

    def dense(self) -> Tensor:
        inputs = self.layer.infeatures
        asking = torch.empty((), dtype=self.dtype, device=self.scales.device).expand(inputs, inputs)
        # The layer decodes in the dtype of its scales; float16 would round each weight once more.
        self.layer.scales = self.scales.float()
        weight: Tensor = self.layer(asking.as_subclass(_Asking)).t()  # [in, out] transposed
        self.layer.scales = None
        return weight


class _Asking(Tensor):
    """An input whose product with a matrix is that matrix: the layer decodes nowhere but on the way to its product,
    and multiplying with the identity would cost as much as a batch of `in` tokens."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        if function is torch.matmul:
            return arguments[1]
        return super().__torch_function__(function, types, arguments, named or {})  # type: ignore[no-untyped-call]


def load_weight(packed: PackedLinear, settings: GptqSettings, kernel: str, dtype: torch.dtype) -> BaseWeight:
    """One layer for a kernel: `cuda_old` takes groups in order, `cuda` follows `g_idx`; without the library's CUDA
    extension, and in training, both are plain torch on any device.

    Raises ModelError QH-C74 for zero points that this library misreads, QH-M55 for sides that it cannot decode.
    """
    _check_sides(packed.name, packed.in_features, packed.out_features, settings, whole=CODES_PER_WORD)
    qzeros = packed.qzeros if settings.checkpoint_format == "gptq" else _stored_less_one(packed.qzeros)
    if has_undefined_zeros(packed, settings) or (kernel == "cuda" and _reads_sixteen(qzeros)):
        raise _misread_zeros(packed.name)
    layer = _imported(f"auto_gptq.nn_modules.qlinear.qlinear_{kernel}:QuantLinear")(
        bits=CODE_BITS,
        group_size=_group(packed.in_features, settings),
        infeatures=packed.in_features,
        outfeatures=packed.out_features,
        bias=False,
        trainable=True,  # keeps the CUDA extension, which has no backward pass, out
    )
    layer.qweight, layer.qzeros, layer.g_idx = packed.qweight, qzeros, packed.g_idx
    layer.scales = None
    return QuantLinearWeight(layer, packed.scales, dtype)


def _group(inputs: int, settings: GptqSettings) -> int:
    """Inputs that share a scale; a group that is wider than the layer ends with it."""
    return min(settings.group_size or inputs, inputs)


def _check_sides(name: str, inputs: int, outputs: int, settings: GptqSettings, *, whole: int) -> None:
    group = _group(inputs, settings)
    wrong = [f"{side} outputs" for side in (outputs,) if side % whole]
    wrong += [f"{inputs} inputs in groups of {group}"] if inputs % group or inputs % whole else []
    if wrong:
        raise ModelError(
            "QH-M55",
            f"auto-gptq cannot serve {name}: it has {' and '.join(wrong)}; whole groups, and sides that are a multiple "
            f"of {whole}, are expected.",
            fix="Use the engine gptqmodel, or another group size.",
        )


def _fields(qzeros: Tensor) -> Tensor:
    shifts = torch.arange(0, WORD_BITS, CODE_BITS, device=qzeros.device, dtype=torch.int32)
    fields: Tensor = (qzeros[..., None] >> shifts) & LARGEST_CODE
    return fields


def _stored_less_one(qzeros: Tensor) -> Tensor:
    """Zero points of format v2 as v1 stores them: each field less one, modulo 16."""
    shifts = torch.arange(0, WORD_BITS, CODE_BITS, device=qzeros.device, dtype=torch.int64)
    words = (((_fields(qzeros) - 1) & LARGEST_CODE).long() << shifts).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _reads_sixteen(qzeros: Tensor) -> bool:
    """Kernel `cuda` adds one after it has cut the field out: a zero point of 0, stored as 15, becomes 16 there."""
    return bool((_fields(qzeros) == LARGEST_CODE).any())


def _misread_zeros(name: str) -> ModelError:
    return ModelError(
        "QH-C74",
        f"{name} holds a zero point of 0, which auto-gptq has no form for: it stores and reads zero points less one.",
        cause="Written by auto-gptq itself, the -1 also overwrites the zero points beside it, so the weights that were "
        "meant are not known; its kernel for act-order reads 16.",
        fix="Quantize the 16-bit model again with symmetric groups, or use the engine gptqmodel for a checkpoint in "
        "format gptq_v2.",
    )


# the library ----------------------------------------------------------------------------------------------------------
@cache
def _imported(path: str) -> Any:
    """Something of auto-gptq by `module:name`. Raises BackendUnavailableError QH-E61, beside transformers 5 without
    having tried."""
    obstacle = engine_obstacle(AUTO_GPTQ, _version)
    cause: Exception | None = None
    if not obstacle:
        module, _, name = path.partition(":")
        try:
            with _quiet():
                return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, OSError) as error:
            obstacle, cause = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", error
    raise BackendUnavailableError(
        "QH-E61", f"{path} of auto-gptq cannot be imported.", cause=obstacle, fix=AUTO_GPTQ.install
    ) from cause


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """The library warns that its CUDA extension is absent, torch that the library uses its older names; and its solver
    switches TF32 off for the whole process when it is imported."""
    logger = logging.getLogger("auto_gptq")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convolutions = torch.backends.cudnn.allow_tf32
        products = torch.backends.cuda.matmul.allow_tf32
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = convolutions
            torch.backends.cuda.matmul.allow_tf32 = products
            logger.setLevel(level)


# quantizing, in a child process ---------------------------------------------------------------------------------------
def quantize(job: QuantizationJob, report: Report) -> None:
    """Run auto-gptq's solver on a model folder and save what it found. For a child process: what is replaced in the
    process is put back, but the library's own imports stay.

    Raises ModelError QH-M55 for a model that the library cannot quantize and QH-C74 for zero points that it cannot
    write down, UnsupportedFeatureError QH-B01 for format v2.
    """
    if job.settings.checkpoint_format != "gptq":
        raise UnsupportedFeatureError(
            "QH-B01",
            "auto-gptq writes GPTQ format v1 only; v2 was asked for.",
            fix="Use the engine gptqmodel, or symmetric groups in format v1.",
        )
    torch.manual_seed(job.seed)
    device = torch.device(job.device)
    report(0, 1, "loading the 16-bit model")
    causal = _sixteen_bit_model(job, device)
    stored = causal.dtype
    if device.type == "cpu":
        causal = causal.float()  # a CPU has no half-precision products worth the name
    wrapped = _wrapped(causal, job.settings)
    with _solver_on(device), _layers_reported(report):
        wrapped.quantize(_examples(job), use_triton=False, cache_examples_on_gpu=False)
    report(1, 1, "writing")
    _save(wrapped, job, stored)


def _sixteen_bit_model(job: QuantizationJob, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_pretrained(
        job.model,
        config=read_config(job.model, trust_remote_code=False),
        torch_dtype="auto",
        # Other kinds leave the mask out, and the solver asks each layer's inputs for one.
        attn_implementation="eager",
        use_safetensors=True,
        local_files_only=True,
    )
    return causal.eval()


def _wrapped(causal: Any, settings: GptqSettings) -> Any:
    """The library's own class for the architecture around a model; its `from_pretrained` insists on CUDA."""
    known = _imported("auto_gptq.modeling.auto:GPTQ_CAUSAL_LM_MODEL_MAP")
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
            _check_sides(name, module.in_features, module.out_features, settings, whole=WORD_BITS)
    described = _imported("auto_gptq.modeling._base:BaseQuantizeConfig")(
        bits=CODE_BITS,
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
        if not job.settings.symmetric and _reads_sixteen(module.qzeros):
            raise _misread_zeros(name)
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
