"""No option can be ignored: a field that came later is handed only to a backend that declares what it needs.

A plugin that was written before a field existed does not read it. So each field beyond the first set names its feature,
and a value other than its default is refused where that feature is not declared. A field in neither table is a mistake
that a test finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from qlora_hal.contract.backend import BackendSpec, Compute
from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.values import AdapterConfig, Batch, StepSettings
from qlora_hal.errors import UnsupportedFeatureError

FIRST_FIELDS: Mapping[type, frozenset[str]] = {
    Compute: frozenset({"dtype", "options"}),
    AdapterConfig: frozenset({"r", "alpha", "use_rslora", "target_modules"}),
    StepSettings: frozenset(
        {
            "learning_rate", "denominator", "dropout_key", "weight_decay", "max_grad_norm", "beta1", "beta2", "epsilon",
        }
    ),
    Batch: frozenset({"input_ids", "labels", "position_ids", "segment_ids", "rows"}),
}  # fmt: skip
"""What every backend reads: the minimum contract."""

GATES: Mapping[type, Mapping[str, Feature]] = {
    Compute: {
        "gradient_checkpointing": Feature.GRADIENT_CHECKPOINTING,
        "world": Feature.DATA_PARALLEL,
        "shard_base": Feature.SHARDED_BASE,
        "recompute": Feature.RECOMPUTATION_CHOICE,
        "base_offload": Feature.BASE_OFFLOAD,
        "fp8_products": Feature.FP8_PRODUCTS,
    },
    AdapterConfig: {"dropout": Feature.LORA_DROPOUT},
    StepSettings: {},
    Batch: {"weights": Feature.TOKEN_WEIGHTS},
}


def check_gates(spec: BackendSpec, value: object) -> None:
    """Raises UnsupportedFeatureError QH-B01 where a field has a value that the backend does not declare to read."""
    declared = spec.capabilities.features
    asked = {
        name: feature
        for name, feature in _gates_of(value).items()
        if feature not in declared and not _is_default(value, name)
    }
    if asked:
        listed = ", ".join(f"{type(value).__name__}.{name} needs {feature.value}" for name, feature in asked.items())
        raise UnsupportedFeatureError(
            "QH-B01",
            f"Backend {spec.name} does not support what was requested: {listed}.",
            fix="Run qlora-hal backends to see which backend does.",
            context={"lacks": [feature.value for feature in asked.values()]},
        )


def _gates_of(value: object) -> Mapping[str, Feature]:
    return next((gates for kind, gates in GATES.items() if isinstance(value, kind)), {})


def _is_default(value: object, name: str) -> bool:
    found, default = getattr(value, name), _default(next(f for f in fields(value) if f.name == name))  # type: ignore[arg-type]
    return found is default or (default is not None and found.__class__ is default.__class__ and found == default)


def _default(field: Field[Any]) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()
