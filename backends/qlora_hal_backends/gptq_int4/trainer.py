"""Opens the family's trainer with GPTQ's room for loading, on the device that torch has."""

from __future__ import annotations

from functools import partial

import torch

from qlora_hal_backends.gptq_int4 import SPEC
from qlora_hal_backends.gptq_int4.loading import load_base
from qlora_hal_backends.gptq_int4.platforms import CPU, CUDA, ROCM
from qlora_hal_backends.torch_family.platform import TorchPlatform
from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer


def open_trainer() -> TorchLoRATrainer:
    platform = present_platform()
    return TorchLoRATrainer(SPEC, platform, partial(load_base, platform))


def present_platform() -> TorchPlatform:
    """The GPU that this torch drives, else the CPU."""
    if not torch.cuda.is_available():
        return CPU
    return ROCM if torch.version.hip else CUDA
