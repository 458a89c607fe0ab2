"""What the spec does not declare is refused by name; nothing is quietly left out."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_hal.backend import BackendSpec, Compute, Quantization
from qlora_hal.capabilities import OPTIMIZER_FEATURE, Feature, Needs, WeightFormat, missing
from qlora_hal.errors import ConfigError, UnsupportedFeatureError
from qlora_hal.model.source import ModelSource
from qlora_hal.values import Adapter, Batch


def refuse_load(spec: BackendSpec, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
    """Raises UnsupportedFeatureError for a format, block size, dtype, architecture or feature that is not declared."""
    blockwise = quantization.weight_format in spec.capabilities.block_sizes
    plain_source = source.facts.prequantized is None
    wanted = {
        Feature.DOUBLE_QUANT: quantization.double_quant,
        Feature.QUANTIZE_ON_LOAD: plain_source and quantization.weight_format is not WeightFormat.NONE,
        Feature.LOAD_PREQUANTIZED: not plain_source,
        Feature.GRADIENT_CHECKPOINTING: compute.gradient_checkpointing,
    }
    refuse(
        spec,
        Needs(
            features=frozenset(feature for feature, asked in wanted.items() if asked),
            weight_format=quantization.weight_format,
            # 0 is no block size: a blockwise format without one is refused too.
            block_size=(quantization.block_size or 0) if blockwise else quantization.block_size,
            compute_dtype=compute.dtype,
            architecture=source.facts.model_type,
        ),
    )
    if compute.options:
        raise UnsupportedFeatureError(
            "QH-B01",
            f"Backend {spec.name} has no options; it was given {', '.join(sorted(compute.options))}.",
            fix="Remove backend.options.",
        )


def refuse_adapter(spec: BackendSpec, adapter: Adapter, optimizer: str) -> None:
    """Raises UnsupportedFeatureError for dropout or an optimizer that is not declared, ConfigError for a name."""
    if optimizer not in OPTIMIZER_FEATURE:
        known = ", ".join(OPTIMIZER_FEATURE)
        raise ConfigError("QH-B01", f"No optimizer is called {optimizer!r}; known are {known}.", fix="Use adamw.")
    wanted = {OPTIMIZER_FEATURE[optimizer], Feature.LORA_DROPOUT if adapter.config.dropout else None}
    refuse(spec, Needs(features=frozenset(feature for feature in wanted if feature is not None)))


def refuse_batches(spec: BackendSpec, batches: Sequence[Batch]) -> None:
    """Raises UnsupportedFeatureError for packed rows where packing is not declared."""
    if any(batch.is_packed for batch in batches):
        refuse(spec, Needs(features=frozenset({Feature.PACKING})))


def refuse(spec: BackendSpec, needs: Needs) -> None:
    """Raises UnsupportedFeatureError naming everything in `needs` that the spec lacks."""
    lacks = missing(needs, spec.capabilities)
    if lacks:
        raise UnsupportedFeatureError(
            "QH-B01",
            f"Backend {spec.name} does not offer {'; '.join(lacks)}.",
            fix="Run qlora-hal backends to see which backend does.",
            context={"lacks": list(lacks)},
        )
