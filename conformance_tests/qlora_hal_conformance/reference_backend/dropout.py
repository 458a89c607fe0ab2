"""LoRA dropout as `qlora_hal.contract.dropout` defines it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qlora_hal.contract.dropout import kept
from qlora_hal.contract.values import AdapterConfig, Int32, LinearShape
from qlora_hal_oracle.arrays import Float64


def draw_masks(
    config: AdapterConfig, linear_modules: Mapping[str, LinearShape], rows: Int32, time: int, key: int
) -> dict[str, Float64]:
    """Module path -> `[batch, time, in]`: 0 with probability p, else 1/(1-p). Empty when the rate is 0."""
    rate = config.dropout
    if rate == 0.0:
        return {}
    return {
        module: np.where(kept(key, module, rows, time, linear_modules[module].inputs, rate), 1.0 / (1.0 - rate), 0.0)
        for module in config.target_modules
    }
