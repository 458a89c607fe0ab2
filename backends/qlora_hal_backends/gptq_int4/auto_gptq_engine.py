"""auto-gptq 0.7.1: its layers' own decoding under our products. Its solver is in `auto_gptq_solver`.

The library is archived and imports names that transformers 5 no longer has, so it is imported beside a transformers 4
only, and not before a layer or a solver is asked for. `ci/run_auto_gptq.sh` builds such an environment.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qlora_hal.errors import BackendUnavailableError, ModelError
from qlora_hal_backends.gptq_int4.engines import (
    AUTO_GPTQ,
    WORD_BITS,
    GptqSettings,
    PackedLinear,
    engine_obstacle,
)
from qlora_hal_backends.gptq_int4.packed_tensors import fields_of, has_undefined_zeros
from qlora_hal_backends.torch_family.base_weights import BaseWeight


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
    check_sides(packed.name, packed.in_features, packed.out_features, settings, whole=settings.codes_per_word)
    qzeros = packed.qzeros if settings.checkpoint_format == "gptq" else _stored_less_one(packed.qzeros, settings)
    if has_undefined_zeros(packed, settings) or (kernel == "cuda" and reads_one_too_many(qzeros, settings)):
        raise misread_zeros(packed.name)
    layer = imported(f"auto_gptq.nn_modules.qlinear.qlinear_{kernel}:QuantLinear")(
        bits=settings.bits,
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


def check_sides(name: str, inputs: int, outputs: int, settings: GptqSettings, *, whole: int) -> None:
    """Both sides a multiple of `whole`, and whole groups. Raises ModelError QH-M55."""
    group = _group(inputs, settings)
    wrong = []
    if outputs % whole:
        wrong.append(f"{outputs} outputs")
    if inputs % whole or inputs % group:
        wrong.append(f"{inputs} inputs in groups of {group}")
    if wrong:
        raise ModelError(
            "QH-M55",
            f"auto-gptq does not support {name}: it has {' and '.join(wrong)}; whole groups, and sides that are a "
            f"multiple of {whole}, are expected.",
            fix="Use the engine gptqmodel, or another group size.",
        )


def _stored_less_one(qzeros: Tensor, settings: GptqSettings) -> Tensor:
    """Zero points of format v2 as v1 stores them: each field less one, modulo 2**bits."""
    shifts = torch.arange(0, WORD_BITS, settings.bits, device=qzeros.device, dtype=torch.int64)
    fields = fields_of(qzeros, settings).unflatten(1, (-1, settings.codes_per_word))
    words = (((fields - 1) & settings.largest_code).long() << shifts).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def reads_one_too_many(qzeros: Tensor, settings: GptqSettings) -> bool:
    """Kernel `cuda` adds one after it has cut the field out: a zero point of 0, stored as 2**bits - 1, becomes 2**bits
    there."""
    return bool((fields_of(qzeros, settings) == settings.largest_code).any())


def misread_zeros(name: str) -> ModelError:
    return ModelError(
        "QH-C74",
        f"{name} holds a zero point of 0, which auto-gptq cannot represent: it stores and reads zero points minus one.",
        cause="Written by auto-gptq itself, the -1 also overwrites the adjacent zero points, so the intended weights "
        "are not known; its kernel for act-order reads a number one too large for its field.",
        fix="Quantize the 16-bit model again with symmetric groups, or use the engine gptqmodel for a checkpoint in "
        "format gptq_v2.",
    )


# the library ----------------------------------------------------------------------------------------------------------
@cache
def imported(path: str) -> Any:
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
