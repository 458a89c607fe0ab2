"""This backend with one defect in how it reads a checkpoint. Tests only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.model.source import ModelSource
from qlora_hal_backends.gptq_int4 import SPEC, loading
from qlora_hal_backends.gptq_int4.engines import GptqSettings, PackedLinear
from qlora_hal_backends.gptq_int4.packed_tensors import read_packed
from qlora_hal_backends.gptq_int4.trainer import present_platform
from qlora_hal_backends.torch_family.loading import BaseModel
from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer

HONEST_SETTINGS, HONEST_TENSORS = loading.checked_settings, read_packed


def _opened(
    settings: Callable[[GptqSettings], GptqSettings] = lambda found: found,
    tensors: Callable[[PackedLinear], PackedLinear] = lambda found: found,
) -> TorchLoRATrainer:
    def load(source: ModelSource, storage: Quantization, compute: Compute, device: torch.device) -> BaseModel:
        wrong_settings = patch.object(loading, "checked_settings", lambda *given: settings(HONEST_SETTINGS(*given)))
        wrong_tensors = patch.object(loading, "read_packed", lambda *given: tensors(HONEST_TENSORS(*given)))
        with wrong_settings, wrong_tensors:
            return loading.load_base(present_platform(), source, storage, compute, device)

    return TorchLoRATrainer(SPEC, present_platform(), load)


reads_v2_as_v1 = partial(
    _opened, settings=lambda found: replace(found, checkpoint_format="gptq", quantizer="gptqmodel")
)
reads_v1_as_v2 = partial(_opened, settings=lambda found: replace(found, checkpoint_format="gptq_v2"))
takes_groups_in_order = partial(_opened, tensors=lambda found: replace(found, g_idx=found.g_idx.sort().values))
takes_the_middle_for_every_zero = partial(
    _opened, tensors=lambda found: replace(found, qzeros=torch.full_like(found.qzeros, -0x77777778))
)
