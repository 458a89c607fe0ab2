"""The tools whose files are read."""

from __future__ import annotations

from qlora_hal.config.other_tools.axolotl import AXOLOTL
from qlora_hal.config.other_tools.llama_factory import LLAMA_FACTORY
from qlora_hal.config.other_tools.mlx_lm import MLX_LM
from qlora_hal.config.other_tools.tables import Tool
from qlora_hal.config.other_tools.trl import TRL
from qlora_hal.config.other_tools.unsloth import UNSLOTH

TOOLS: tuple[Tool, ...] = (AXOLOTL, LLAMA_FACTORY, MLX_LM, TRL, UNSLOTH)
