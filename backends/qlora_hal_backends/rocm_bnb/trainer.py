"""Opens the family's trainer on this platform."""

from __future__ import annotations

from qlora_hal_backends.rocm_bnb import SPEC
from qlora_hal_backends.torch_family.platform import ROCM
from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer


def open_trainer() -> TorchLoRATrainer:
    return TorchLoRATrainer(SPEC, ROCM)
