"""What the spec does not declare is refused by name; nothing is quietly left out."""

from __future__ import annotations

from qlora_hal.adapter.naming import lora_a_key, lora_b_key
from qlora_hal.contract.backend import BackendSpec, Compute, Quantization
from qlora_hal.contract.capabilities import Feature, Requirements, WeightFormat
from qlora_hal.contract.toolkit import require
from qlora_hal.contract.values import Adapter
from qlora_hal.errors import AdapterError, UnsupportedFeatureError
from qlora_hal.model.source import ModelSource


def refuse_load(spec: BackendSpec, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
    """Raises UnsupportedFeatureError for a format, block size, dtype, architecture or feature that is not declared."""
    blockwise = quantization.weight_format in spec.capabilities.block_sizes
    plain_source = source.facts.prequantized is None
    wanted = {
        Feature.DOUBLE_QUANT: quantization.double_quant,
        Feature.QUANTIZE_ON_LOAD: plain_source and quantization.weight_format is not WeightFormat.NONE,
        Feature.LOAD_PREQUANTIZED: not plain_source,
        Feature.GRADIENT_CHECKPOINTING: compute.gradient_checkpointing,
        Feature.DATA_PARALLEL: compute.world.size > 1,
        Feature.SHARDED_BASE: compute.shard_base,
        Feature.FP8_PRODUCTS: compute.fp8_products,
        Feature.EXPERTS: any(linear.experts > 1 for linear in source.facts.linear_modules.values()),
    }
    require(
        spec,
        Requirements(
            features=frozenset(feature for feature, asked in wanted.items() if asked),
            weight_format=quantization.weight_format,
            # 0 is no block size: a blockwise format without one is refused too.
            block_size=(quantization.block_size or 0) if blockwise else quantization.block_size,
            compute_dtype=compute.dtype,
            architecture=source.facts.model_type,
        ),
    )
    if compute.fp8_products and compute.dtype != "bfloat16":
        raise UnsupportedFeatureError(
            "QH-B01",
            f"Products in 8-bit floats belong to a run in bfloat16; this one computes in {compute.dtype}.",
            fix="Set quantization.compute_dtype: fp8.",
        )
    if compute.fp8_products and wanted[Feature.EXPERTS]:
        raise UnsupportedFeatureError(
            "QH-B01",
            f"Products in 8-bit floats are of dense models; {source.facts.model_type} has routed experts.",
            where=source.name,
            fix="Set quantization.compute_dtype: bfloat16.",
        )
    if compute.options:
        raise UnsupportedFeatureError(
            "QH-B01",
            f"Backend {spec.name} has no options; it was given {', '.join(sorted(compute.options))}.",
            fix="Remove backend.options.",
        )


def refuse_untargeted(adapter: Adapter) -> None:
    """Raises AdapterError for tensors of modules that the adapter's settings do not name: nothing would train them."""
    used = {key(module) for module in adapter.config.target_modules for key in (lora_a_key, lora_b_key)}
    unused = sorted(set(adapter.tensors) - used)
    if unused:
        raise AdapterError(
            "QH-C09",
            f"{len(unused)} adapter tensors belong to no target module: {', '.join(unused[:5])}.",
            fix="Name their modules in target_modules, or leave the tensors out.",
            context={"tensors": unused},
        )
