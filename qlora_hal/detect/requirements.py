"""From configuration and model facts to what a backend must offer, and how the base will be stored."""

from __future__ import annotations

from qlora_hal.config.schema import RunConfig
from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import OPTIMIZER_FEATURE, Capabilities, Feature, Requirements, WeightFormat
from qlora_hal.errors import ConfigError
from qlora_hal.formats.catalogue import formats_of_level, record_of, records
from qlora_hal.formats.record import LEVELS
from qlora_hal.memory.placement import AUTO, FULL, OFFLOAD, SELECTIVE, asked_recompute
from qlora_hal.model.facts import ModelFacts
from qlora_hal.model.packed_facts import Prequantized


def requirements_of(config: RunConfig, facts: ModelFacts) -> Requirements:
    """What this run asks for. Raises ConfigError where the checkpoint is already stored otherwise."""
    stored = facts.prequantized
    asked = config.quantization.weight_format
    if stored is not None:
        _check_stored(config, stored)
        level, weight_format = "", WeightFormat(stored.weight_format)
    elif asked == "auto" or asked in LEVELS:
        level, weight_format = ("4bit" if asked == "auto" else asked), None
    else:
        level, weight_format = "", WeightFormat(asked)
    return Requirements(
        features=_features(config, quantizes=stored is None and asked != "none", loads=stored is not None)
        | _features_of_model(facts),
        level=level,
        weight_format=weight_format,
        block_size=config.quantization.block_size if stored is None else stored.block_size,
        compute_dtype=None if config.quantization.dtype == "auto" else config.quantization.dtype,
        architecture=facts.model_type,
        may_calibrate=stored is None,
    )


def needs_calibration(facts: ModelFacts, quantization: Quantization, capabilities: Capabilities) -> bool:
    """Whether the model has to be quantized with calibration rows before this backend can load it."""
    if facts.prequantized is not None or Feature.QUANTIZE_ON_LOAD in capabilities.features:
        return False
    return quantization.weight_format in capabilities.calibrated_formats


def quantization_of(config: RunConfig, facts: ModelFacts, capabilities: Capabilities) -> Quantization:
    """The storage as the chosen backend will have it, nothing left open."""
    needs = requirements_of(config, facts)
    weight_format = needs.weight_format or capabilities.levels[needs.level]
    stored = facts.prequantized
    if stored is not None:
        return Quantization(weight_format, stored.block_size, stored.double_quant)
    sizes = capabilities.block_sizes.get(weight_format, ())
    has_scales_to_quantize = record_of(weight_format).double_quant
    can_double = has_scales_to_quantize and Feature.DOUBLE_QUANT in capabilities.features
    asked = config.quantization.double_quant
    if asked and not has_scales_to_quantize:
        able = " or ".join(record.name for record in records() if record.double_quant)
        raise ConfigError(
            "QH-U10",
            f"quantization.double_quant is true, but {weight_format.value} has no scales per block to quantize.",
            where="quantization.double_quant",
            fix=f"Remove double_quant, or choose weight_format {able}.",
        )
    return Quantization(
        weight_format,
        needs.block_size or (sizes[0] if sizes else None),
        can_double if asked is None else asked,
    )


def unmet_description_note(facts: ModelFacts, quantization: Quantization) -> str:
    """The sentence for a config.json that describes a quantization its weights do not have (it was written by a model
    that was quantized while loading), or "". The run's own settings decide how they are stored."""
    names = [name for name in ("quantization_config", "quantization") if facts.config.get(name)]
    if facts.prequantized is not None or not names:
        return ""
    described = facts.config[names[0]]
    wishes = described if isinstance(described, dict) else {}
    asked = ", ".join(f"{name}: {str(value).lower()}" for name, value in wishes.items() if value in (True, 4, 8))
    return (
        f"config.json describes a quantization ({names[0]}{': ' + asked if asked else ''}) that its weights do not "
        f"have: they are stored as {quantization.weight_format.value}, as quantization.weight_format says"
    )


def _features(config: RunConfig, *, quantizes: bool, loads: bool) -> frozenset[Feature]:
    wanted: list[tuple[bool, Feature]] = [
        (quantizes, Feature.QUANTIZE_ON_LOAD),
        (loads, Feature.LOAD_PREQUANTIZED),
        (bool(config.quantization.double_quant), Feature.DOUBLE_QUANT),
        (asked_recompute(config.training) in (SELECTIVE, FULL, OFFLOAD), Feature.GRADIENT_CHECKPOINTING),
        (asked_recompute(config.training) in (SELECTIVE, OFFLOAD), Feature.RECOMPUTATION_CHOICE),
        (config.training.base_offload not in ((), AUTO), Feature.BASE_OFFLOAD),
        (config.lora.dropout > 0, Feature.LORA_DROPOUT),
        (config.data.packing, Feature.PACKING),
        (config.quantization.fp8_products, Feature.FP8_PRODUCTS),
    ]
    features = {feature for is_wanted, feature in wanted if is_wanted}
    optimizer = OPTIMIZER_FEATURE[config.training.optim]
    return frozenset(features | ({optimizer} if optimizer else set()))


def _features_of_model(facts: ModelFacts) -> frozenset[Feature]:
    return frozenset({Feature.EXPERTS} if facts.has_routed_experts else ())


def _check_stored(config: RunConfig, stored: Prequantized) -> None:
    """A pre-quantized checkpoint is taken as it is: asking for another storage is a contradiction."""
    asked = config.quantization
    wrong: list[str] = []
    has_the_level = stored.weight_format in formats_of_level(asked.weight_format)
    if asked.weight_format not in ("auto", stored.weight_format) and not has_the_level:
        wrong.append(f"weight_format {asked.weight_format} (it is {stored.weight_format})")
    if asked.block_size is not None and asked.block_size != stored.block_size:
        wrong.append(f"block_size {asked.block_size} (it is {stored.block_size})")
    if asked.double_quant is not None and asked.double_quant != stored.double_quant:
        wrong.append(f"double_quant {asked.double_quant} (it is {stored.double_quant})")
    if wrong:
        raise ConfigError(
            "QH-U11",
            f"The checkpoint is already quantized; these settings ask for something else: {'; '.join(wrong)}.",
            where="quantization",
            fix="Remove these settings, or start from the 16-bit checkpoint.",
        )
