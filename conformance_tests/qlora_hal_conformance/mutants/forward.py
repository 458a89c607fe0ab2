"""Wrong products: scale, rounding, attention, modules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qlora_hal.contract.values import Adapter, AdapterConfig, Batch, Float32
from qlora_hal_conformance.reference_backend.rounding import RoundedArithmetic, arithmetic_of
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer
from qlora_hal_oracle import Arithmetic, LlamaShape, LoraScale, OracleLlama
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.lora import AdaptedLinear, LinearTrace

from .registry import Mutant, with_rooms, with_trainer


def scale_one(config: AdapterConfig) -> LoraScale:
    return LoraScale(alpha=1.0, rank=1)


def scale_alpha(config: AdapterConfig) -> LoraScale:
    return LoraScale(config.alpha, rank=1)


def scale_never_rank_stabilized(config: AdapterConfig) -> LoraScale:
    return LoraScale(config.alpha, config.r)


class AddedOntoRounded(AdaptedLinear):
    def forward(self, x: Float64, arithmetic: Arithmetic, mask: Float64 | None = None) -> tuple[Float64, LinearTrace]:
        base, _ = AdaptedLinear(self.module, self.weight, self.bias, None, None, self.scale).forward(x, arithmetic)
        nothing = np.zeros_like(self.weight)
        alone = AdaptedLinear(self.module, nothing, None, self.lora_a, self.lora_b, self.scale)
        product, trace = alone.forward(x, arithmetic, mask)
        return arithmetic.store(base + product), trace


class YoungUpdateLost(OracleLlama):
    def linear(self, module: str) -> AdaptedLinear:
        honest = super().linear(module)
        return AddedOntoRounded(module, honest.weight, honest.bias, honest.lora_a, honest.lora_b, honest.scale)


class ModuleMissed(OracleLlama):
    def linear(self, module: str) -> AdaptedLinear:
        honest = super().linear(module)
        return replace(honest, lora_a=None, lora_b=None) if module.endswith("up_proj") else honest


class KernelWritesNothing(OracleLlama):
    def linear(self, module: str) -> AdaptedLinear:
        honest = super().linear(module)
        return replace(honest, weight=np.zeros_like(honest.weight)) if module.endswith("down_proj") else honest


class MultipliesAnotherLayout(OracleLlama):
    def linear(self, module: str) -> AdaptedLinear:
        honest = super().linear(module)
        transposed = honest.weight.reshape(honest.weight.shape[::-1]).T
        return replace(honest, weight=transposed) if module.endswith("gate_proj") else honest


class KeyGroupsSwapped(OracleLlama):
    def linear(self, module: str) -> AdaptedLinear:
        honest = super().linear(module)
        if not module.endswith(("k_proj", "v_proj")):
            return honest
        by = self.shape.head_dim
        lora_b = None if honest.lora_b is None else np.roll(honest.lora_b, by, axis=0)
        return replace(honest, weight=np.roll(honest.weight, by, axis=0), lora_b=lora_b)


def rope_theta_ignored(
    shape: LlamaShape, base: dict[str, Float64], adapter: dict[str, Float64], scale: LoraScale
) -> OracleLlama:
    return OracleLlama(replace(shape, rope_theta=10000.0), base, adapter, scale)


def samples_see_each_other(batch: Batch) -> Batch:
    return replace(batch, segment_ids=np.minimum(batch.segment_ids, 1))


def positions_ignored(batch: Batch) -> Batch:
    return replace(batch, position_ids=np.zeros_like(batch.position_ids))


def to_float16(values: Float64) -> Float64:
    return values.astype(np.float16).astype(np.float64)


def bfloat16_as_float16(dtype: str) -> Arithmetic:
    return RoundedArithmetic(to_float16) if dtype == "bfloat16" else arithmetic_of(dtype)


def float32_as_bfloat16(dtype: str) -> Arithmetic:
    return arithmetic_of("bfloat16")


def rows_for_columns(tensor: Float32) -> Float64:
    return np.ascontiguousarray(tensor.T).reshape(tensor.shape).astype(np.float64)


class StepZeroChangesTheModel(ReferenceTrainer):
    """Fills B with noise where it is zero."""

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        noise = np.random.default_rng(0)
        filled = {
            name: tensor if tensor.any() else noise.normal(0, 0.02, tensor.shape).astype(np.float32)
            for name, tensor in adapter.tensors.items()
        }
        super().attach(Adapter(filled, adapter.config), optimizer)


MUTANTS = (
    Mutant(
        "alpha_over_r_dropped",
        "Adds the adapter's product without alpha / r.",
        ("30", "31"),
        with_rooms(scale=scale_one),
        recreates="mlx-examples#1186",
    ),
    Mutant(
        "alpha_used_as_scale",
        "Scales by alpha where alpha / r is meant.",
        ("30", "31"),
        with_rooms(scale=scale_alpha),
        recreates="Blaizzy/mlx-vlm#841",
    ),
    Mutant(
        "rank_stabilization_ignored",
        "Scales by alpha / r where alpha / sqrt(r) is asked for.",
        ("30", "31"),
        with_rooms(scale=scale_never_rank_stabilized),
    ),
    Mutant(
        "young_update_lost",
        "Adds the adapter's product onto a base output that is already rounded to bfloat16.",
        ("44",),
        with_rooms(model=YoungUpdateLost),
    ),
    Mutant(
        "target_module_missed",
        "Leaves every up_proj without its adapter.",
        ("30", "31"),
        with_rooms(model=ModuleMissed),
        recreates="unsloth-zoo#810",
    ),
    Mutant(
        "kernel_writes_nothing",
        "The product of down_proj succeeds and leaves zeros.",
        ("30", "31"),
        with_rooms(model=KernelWritesNothing),
        recreates="unslothai/unsloth#11614",
    ),
    Mutant(
        "multiplies_another_layout",
        "Shows the right weight but multiplies gate_proj in column order.",
        ("30", "31"),
        with_rooms(model=MultipliesAnotherLayout),
        recreates="bitsandbytes#1887",
    ),
    Mutant(
        "key_groups_swapped",
        "Query heads read the keys and values of the neighbouring group.",
        ("30", "31"),
        with_rooms(model=KeyGroupsSwapped),
    ),
    Mutant(
        "rope_theta_ignored",
        "Turns positions with theta 10000 whatever config.json says.",
        ("30", "31"),
        with_rooms(model=rope_theta_ignored),
    ),
    Mutant(
        "samples_see_each_other",
        "Attends across the samples that are packed into one row.",
        ("30", "31"),
        with_rooms(read_batch=samples_see_each_other),
        recreates="trl#1230",
    ),
    Mutant(
        "positions_ignored",
        "Turns no query and no key: every token stands at position 0.",
        ("30", "31"),
        with_rooms(read_batch=positions_ignored),
    ),
    Mutant(
        "bfloat16_computed_as_float16",
        "Computes in float16 when bfloat16 is asked for.",
        ("30", "31", "42", "44"),
        with_rooms(arithmetic=bfloat16_as_float16),
        recreates="ROCm/legacy-rocm-build#6034",
    ),
    Mutant(
        "float32_computed_as_bfloat16",
        "Computes in bfloat16 when float32 is asked for.",
        ("30", "31"),
        with_rooms(arithmetic=float32_as_bfloat16),
        may_fail=("20",),
    ),
    Mutant(
        "adapter_transposed",
        "Reads adapter tensors in column order.",
        ("30", "31"),
        with_rooms(adapter_in=rows_for_columns),
        recreates="ml-explore/mlx-lm#1119",
        may_fail=("11",),
    ),
    Mutant(
        "adapter_starts_with_noise",
        "Fills a zero B with noise, so that attaching changes the model.",
        ("30", "51"),
        with_trainer(StepZeroChangesTheModel),
        recreates="AutoGPTQ#361",
    ),
)
