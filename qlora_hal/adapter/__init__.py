"""The adapter: names, targets, first values, files, and whether it fits a model."""

from qlora_hal.adapter.fitting import check_base, check_changed, check_fits, check_same_settings
from qlora_hal.adapter.initial import initial_adapter
from qlora_hal.adapter.mlx_files import write_mlx_adapter
from qlora_hal.adapter.mlx_reading import read_mlx_adapter
from qlora_hal.adapter.naming import lora_a_key, lora_b_key, module_of
from qlora_hal.adapter.peft_files import read_adapter, read_provenance, write_adapter
from qlora_hal.adapter.targets import resolve_targets

__all__ = [
    "check_base",
    "check_changed",
    "check_fits",
    "check_same_settings",
    "initial_adapter",
    "lora_a_key",
    "lora_b_key",
    "module_of",
    "read_adapter",
    "read_mlx_adapter",
    "read_provenance",
    "resolve_targets",
    "write_adapter",
    "write_mlx_adapter",
]
