"""What a backend can do, as data: it prints, compares, serialises into a certificate, and is checked before any import.

The one central check is `unmet_requirements(needs, capabilities)`; backend code holds no capability `if`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar


class WeightFormat(str):
    """How the frozen base weights are stored: the name of a record in `qlora_hal.formats.catalogue`.

    The set is open: `WeightFormat("int4_rowwise")` is the format of that name, and whether a record stands behind it is
    the catalogue's to say. One name is one object, also after pickling, so formats are compared with `is` and `==`.
    """

    __slots__ = ()
    _of_name: ClassVar[dict[str, WeightFormat]] = {}

    NONE: ClassVar[WeightFormat]
    """Not quantized: the compute dtype."""
    INT8: ClassVar[WeightFormat]
    """8-bit integers with one absmax per output row (LLM.int8, Dettmers et al. 2022)."""
    NF4: ClassVar[WeightFormat]
    """16-entry normal-float codebook with an absmax per block (QLoRA, Dettmers et al. 2023)."""
    FP4: ClassVar[WeightFormat]
    """4-bit floats (sign, 2-bit exponent, 1-bit mantissa) with an absmax per block."""
    INT4_GPTQ: ClassVar[WeightFormat]
    """4-bit integers, per-group scale and zero point (GPTQ, Frantar et al. 2022)."""
    INT8_GPTQ: ClassVar[WeightFormat]
    """8-bit integers, per-group scale and zero point (GPTQ)."""
    INT2_AFFINE: ClassVar[WeightFormat]
    """MLX: 2-bit integers, per-group scale and bias."""
    INT3_AFFINE: ClassVar[WeightFormat]
    """MLX: 3-bit integers, per-group scale and bias."""
    INT4_AFFINE: ClassVar[WeightFormat]
    """MLX: 4-bit integers, per-group scale and bias."""
    INT5_AFFINE: ClassVar[WeightFormat]
    """MLX: 5-bit integers, per-group scale and bias."""
    INT6_AFFINE: ClassVar[WeightFormat]
    """MLX: 6-bit integers, per-group scale and bias."""
    INT8_AFFINE: ClassVar[WeightFormat]
    """MLX: 8-bit integers, per-group scale and bias."""
    MXFP4: ClassVar[WeightFormat]
    """4-bit floats (E2M1), one power of two to 32 of them (OCP Microscaling Formats 1.0)."""
    NVFP4: ClassVar[WeightFormat]
    """4-bit floats (E2M1), one 8-bit float (E4M3) to 16 of them (NVIDIA)."""
    MXFP8: ClassVar[WeightFormat]
    """8-bit floats (E4M3), one power of two to 32 of them (OCP Microscaling Formats 1.0)."""

    def __new__(cls, name: str) -> WeightFormat:
        return cls._of_name.setdefault(str(name), super().__new__(cls, name))

    @property
    def value(self) -> str:
        """The name as a plain str."""
        return str(self)

    def __reduce__(self) -> tuple[type[WeightFormat], tuple[str]]:
        return WeightFormat, (str(self),)

    def __repr__(self) -> str:
        return f"WeightFormat({str(self)!r})"


for _name in (
    "none", "int8", "nf4", "fp4", "int4_gptq", "int8_gptq", "int2_affine", "int3_affine", "int4_affine",
    "int5_affine", "int6_affine", "int8_affine", "mxfp4", "nvfp4", "mxfp8",
):  # fmt: skip
    setattr(WeightFormat, _name.upper(), WeightFormat(_name))


class Feature(StrEnum):
    """What a backend may offer beyond the minimum contract."""

    DOUBLE_QUANT = "double_quant"
    QUANTIZE_ON_LOAD = "quantize_on_load"
    LOAD_PREQUANTIZED = "load_prequantized"
    GRADIENT_CHECKPOINTING = "gradient_checkpointing"
    LORA_DROPOUT = "lora_dropout"
    PACKING = "packing"
    ADAMW_8BIT = "adamw_8bit"
    PAGED_ADAMW = "paged_adamw"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"
    BITWISE_DETERMINISM = "bitwise_determinism"
    PEAK_MEMORY = "peak_memory"
    GENERATE = "generate"
    DATA_PARALLEL = "data_parallel"
    """Several ranks, each with the whole packed base (`Compute.world`)."""
    SHARDED_BASE = "sharded_base"
    """Several ranks, the packed base spread over them."""
    RECOMPUTATION_CHOICE = "recomputation_choice"
    """Other parts of a layer are recomputed than all of it, or its input waits in the host's memory
    (`Compute.recompute`)."""
    BASE_OFFLOAD = "base_offload"
    """Parts of the base live in the host's memory (`Compute.base_offload`)."""
    TOKEN_WEIGHTS = "token_weights"
    """A loss of weighted tokens (`Batch.weights`), and `token_losses` to make them from."""
    EXPERTS = "experts"
    """Models with routed experts: each stack of them is a module (`LinearShape.experts`) that can carry LoRA."""
    FP8_PRODUCTS = "fp8_products"
    """Products with the frozen base in 8-bit floats (E4M3), in `Compute.fp8_products`."""


OPTIMIZER_FEATURE: Mapping[str, Feature | None] = {
    "adamw": None,
    "adamw_8bit": Feature.ADAMW_8BIT,
    "paged_adamw": Feature.PAGED_ADAMW,
    "paged_adamw_8bit": Feature.PAGED_ADAMW_8BIT,
}
"""The feature an optimizer needs; plain AdamW is part of the minimum contract."""

_ASKED_FOR_BY: Mapping[Feature, str] = {
    Feature.DOUBLE_QUANT: "quantization.double_quant",
    Feature.GRADIENT_CHECKPOINTING: "training.gradient_checkpointing or training.recompute",
    Feature.RECOMPUTATION_CHOICE: "training.recompute",
    Feature.BASE_OFFLOAD: "training.base_offload",
    Feature.LORA_DROPOUT: "lora.dropout",
    Feature.PACKING: "data.packing",
    Feature.FP8_PRODUCTS: "quantization.compute_dtype fp8",
    **{feature: f"training.optim {name}" for name, feature in OPTIMIZER_FEATURE.items() if feature is not None},
}
"""The setting by which a run comes to need a feature; other features follow from its model."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The widest claim of a backend; a device may narrow it after it was proved.

    `weight_formats` are names of the catalogue (`qlora_hal.formats.catalogue`), which must agree with the rest:
    `levels` maps the portable quantization levels (`none`, `8bit`, `4bit`) to formats of that level, and `block_sizes`
    lists, per format, those of its sizes that this backend quantizes with; the first is the default and is always
    written down.
    `architectures` are Hugging Face `model_type` values; empty means whatever the model library knows.
    `calibrated_formats` are those that a 16-bit model is brought into before it is loaded, with calibration rows.
    `families` are the `model_type` values that this backend promises to compute: the conformance suite judges a drawn
    model of each by its oracle, and one that is refused is red. A model of any other may be refused while it is loaded,
    and must not be computed differently.
    """

    weight_formats: frozenset[WeightFormat]
    compute_dtypes: frozenset[str]
    features: frozenset[Feature]
    block_sizes: Mapping[WeightFormat, tuple[int, ...]] = field(default_factory=dict)
    levels: Mapping[str, WeightFormat] = field(default_factory=dict)
    architectures: frozenset[str] = frozenset()
    calibrated_formats: frozenset[WeightFormat] = frozenset()
    families: frozenset[str] = frozenset()

    def as_json(self) -> dict[str, object]:
        return {
            "weight_formats": sorted(f.value for f in self.weight_formats),
            "compute_dtypes": sorted(self.compute_dtypes),
            "features": sorted(f.value for f in self.features),
            "block_sizes": {f.value: list(sizes) for f, sizes in sorted(self.block_sizes.items())},
            "levels": {level: f.value for level, f in sorted(self.levels.items())},
            "architectures": sorted(self.architectures),
            "calibrated_formats": sorted(f.value for f in self.calibrated_formats),
            "families": sorted(self.families),
        }


@dataclass(frozen=True, slots=True)
class Requirements:
    """What one run asks of a backend.

    `level` is a portable level (`none`, `8bit`, `4bit`) or "" when `weight_format` names one format exactly.
    `may_calibrate`: where the format has to be calibrated, QUANTIZE_ON_LOAD is met by quantizing before loading.
    """

    features: frozenset[Feature] = frozenset()
    level: str = ""
    weight_format: WeightFormat | None = None
    block_size: int | None = None
    compute_dtype: str | None = None
    architecture: str = ""
    may_calibrate: bool = False


def unmet_requirements(needs: Requirements, capabilities: Capabilities) -> tuple[str, ...]:
    """Everything in `needs` that `capabilities` lack, each as a phrase for a message; empty when all are met."""
    lacks: list[str] = []
    weight_format = needs.weight_format
    if needs.level:
        weight_format = capabilities.levels.get(needs.level)
        if weight_format is None:
            lacks.append(f"quantization level {needs.level} (has {_listing(capabilities.levels)})")
    if weight_format is not None and weight_format not in capabilities.weight_formats:
        have = _listing(f.value for f in capabilities.weight_formats)
        lacks.append(f"weight format {weight_format.value} (has {have})")
    elif weight_format is not None and needs.block_size is not None:
        sizes = capabilities.block_sizes.get(weight_format, ())
        if needs.block_size not in sizes:
            lacks.append(f"block size {needs.block_size} for {weight_format.value} (has {_listing(map(str, sizes))})")
    if needs.compute_dtype is not None and needs.compute_dtype not in capabilities.compute_dtypes:
        lacks.append(f"compute dtype {needs.compute_dtype} (has {_listing(capabilities.compute_dtypes)})")
    if capabilities.architectures and needs.architecture and needs.architecture not in capabilities.architectures:
        lacks.append(f"architecture {needs.architecture} (has {_listing(capabilities.architectures)})")
    absent = needs.features - capabilities.features
    if needs.may_calibrate and weight_format in capabilities.calibrated_formats:
        absent -= {Feature.QUANTIZE_ON_LOAD}
    lacks.extend(_told(feature) for feature in sorted(absent))
    return tuple(lacks)


def _told(feature: Feature) -> str:
    setting = _ASKED_FOR_BY.get(feature)
    return f"feature {feature.value}" + (f" (asked for by {setting})" if setting else "")


def _listing(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
