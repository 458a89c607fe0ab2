"""GPTQModel: its kernels' own dequantization under our products, and its solver in a child process."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qlora_hal.errors import BackendUnavailableError, ModelError
from qlora_hal.errors.installation import pip
from qlora_hal_backends.gptq_int4.contained import surroundings_kept
from qlora_hal_backends.gptq_int4.engines import (
    WORD_BITS,
    GptqSettings,
    PackedLinear,
    QuantizationJob,
    Report,
)
from qlora_hal_backends.gptq_int4.packed_tensors import has_undefined_zeros
from qlora_hal_backends.torch_family.base_weights import BaseWeight

_LAYER = "gptqmodel.nn_modules.qlinear.torch:TorchLinear"
_TRITON = "gptqmodel.nn_modules.triton_utils.dequant:dequant"


@dataclass(slots=True)
class LayerWeight:
    """A quantized layer of gptqmodel, asked for its weight and never for its product.

    The layer stays in training mode: in eval mode it keeps unpacked zero points beside the packed ones.
    """

    layer: Any
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    def dense(self) -> Tensor:
        # The layer multiplies in the dtype of its scales; float16 would round each weight once more.
        self.layer.scales = self.scales.float()
        weight: Tensor = self.layer.dequantize_weight().to(self.dtype).t()  # [in, out] transposed
        self.layer.scales = None
        return weight


@dataclass(slots=True)
class TritonWeight:
    """The tensors that gptqmodel's Triton kernel decodes: float32 inside, rounded once to `dtype`."""

    decode: Callable[..., Tensor]
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    settings: GptqSettings
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[1], self.g_idx.shape[0]

    def dense(self) -> Tensor:
        parts = self.qweight, self.scales, self.qzeros, self.g_idx
        return self.decode(self.dtype, *parts, self.settings.bits, WORD_BITS, self.settings.largest_code).t()


def load_weight(packed: PackedLinear, settings: GptqSettings, kernel: str, dtype: torch.dtype) -> BaseWeight:
    """One layer for a kernel. Raises ModelError QH-C74 for zero points that v1 cannot hold."""
    # gptqmodel subtracts and adds whole words, so that what it wrote itself it reads back exactly.
    if has_undefined_zeros(packed, settings) and not settings.quantizer.startswith("gptqmodel"):
        raise undefined_zeros(packed.name)
    layer = _layer(packed, settings)
    if settings.checkpoint_format == "gptq":
        _zeros_as_they_are(layer, settings.bits)
    # The Triton kernel counts whole words of zero points to a row.
    if kernel == "triton" and packed.out_features % settings.codes_per_word == 0:
        decode = _imported(_TRITON)
        return TritonWeight(decode, layer.qweight, layer.qzeros, packed.scales, layer.g_idx, settings, dtype)
    layer.scales = None
    return LayerWeight(layer, packed.scales, dtype)


def _layer(packed: PackedLinear, settings: GptqSettings) -> Any:
    """A layer of the library over the stored tensors. `post_init` is left out: it compiles the dequantization."""
    layer = _imported(_LAYER)(
        bits=settings.bits,
        group_size=settings.group_size or -1,
        sym=settings.symmetric,
        desc_act=settings.act_order,
        in_features=packed.in_features,
        out_features=packed.out_features,
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=False,
    )
    for part in ("qweight", "qzeros", "g_idx"):
        layer.register_buffer(part, getattr(packed, part).contiguous())
    layer.register_buffer("scales", packed.scales)
    layer.qzero_format(format=1 if settings.checkpoint_format == "gptq" else 2)
    return layer


def _zeros_as_they_are(layer: Any, bits: int) -> None:
    convert = _imported("gptqmodel.utils.model:convert_gptq_v1_to_v2_format_module")
    convert(layer, bits=bits, pack_dtype=torch.int32)


def undefined_zeros(name: str) -> ModelError:
    return ModelError(
        "QH-C74",
        f"{name} holds a zero point of 0 in the GPTQ format v1, which stores zero points minus one.",
        cause="Libraries disagree about -1 in a field of a few bits: some borrow from the adjacent zero point. So the "
        "intended weights are not known; asymmetric checkpoints need format v2.",
        fix="Quantize the 16-bit model again (qlora-hal quantize), or find a checkpoint in format gptq_v2.",
    )


@cache
def _imported(path: str) -> Any:
    """Something of gptqmodel by `module:name`. Raises BackendUnavailableError QH-E61 when the import fails."""
    module, _, name = path.partition(":")
    try:
        _import_the_library()
        with surroundings_kept():
            return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, OSError) as error:
        raise BackendUnavailableError(
            "QH-E61",
            f"gptqmodel is installed, but {path} cannot be imported.",
            cause=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix=pip("install --force-reinstall 'gptqmodel>=7.6,<8'"),
        ) from error


@cache
def _import_the_library() -> None:
    with surroundings_kept():
        library = importlib.import_module("gptqmodel")
        importlib.import_module("gptqmodel.utils.logger").setup_logger().setLevel("CRITICAL")
    # Nothing is quantized in this process, so the threads for it are not needed.
    pool = vars(library).get("_DEVICE_THREAD_POOL")
    if pool is not None:
        pool.shutdown()
        vars(library)["_DEVICE_THREAD_POOL"] = None


# quantizing, in a child process ---------------------------------------------------------------------------------------
def quantize(job: QuantizationJob, report: Report) -> None:
    """Run the GPTQ solver on a model folder and save what it found. Changes its process; call it in a child."""
    from gptqmodel import GPTQModel
    from gptqmodel.models import loader
    from gptqmodel.quantization import QuantizeConfig

    # Rows come as token ids, so no tokenizer is needed; loading one fails for folders that hold none.
    loader.load_hf_tokenizer = lambda *arguments, **named: None

    torch.manual_seed(job.seed)
    settings = job.settings
    config = QuantizeConfig(
        bits=settings.bits,
        group_size=settings.group_size or -1,
        sym=settings.symmetric,
        desc_act=settings.act_order,
        format=settings.checkpoint_format,
        device=job.device,
        offload_to_disk=False,
    )
    report(0, 1, "loading the 16-bit model")
    model = GPTQModel.load(str(job.model), config, trust_remote_code=False)
    rows = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in job.calibration]
    layers = int(model.model.config.get_text_config().num_hidden_layers)

    def layer_done(*, layer_idx: int, submodule_finalized: bool) -> None:
        if submodule_finalized:
            report(layer_idx + 1, layers, "solved the layers")

    model.layer_callback = layer_done
    model.quantize(rows, batch_size=job.batch_size, calibration_data_min_length=1)
    report(layers, layers, "writing")
    model.save(str(job.output))
