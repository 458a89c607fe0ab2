"""What every trainer needs beside its mathematics, for authors of backends. NumPy alone; none of it has to be used."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from qlora_hal.contract.backend import BackendSpec, Compute, Quantization
from qlora_hal.contract.capabilities import OPTIMIZER_FEATURE, Feature, Requirements, WeightFormat, unmet_requirements
from qlora_hal.contract.values import (
    IGNORE_LABEL,
    AdapterConfig,
    Batch,
    Float32,
    Int32,
    LossSum,
    OptimizerSnapshot,
    StepStats,
)
from qlora_hal.errors import (
    AdapterError,
    BackendContractError,
    ModelError,
    OutOfMemoryError,
    UnsupportedFeatureError,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What `OptimizerSnapshot.moments` holds of each adapter tensor, after its name and a dot."""


# refusals: what the spec does not declare is refused by name, never left out -----------------------------------------
def check_served(
    spec: BackendSpec, quantization: Quantization, compute: Compute, *, prequantized: bool = False
) -> None:
    """What a trainer asks first in `load`: raises UnsupportedFeatureError QH-B01 naming all that the spec lacks.

    The core asks the same before it opens a trainer; this keeps a caller without the core from getting another format
    or dtype than the one it named.
    """
    weight_format = quantization.weight_format
    features = {
        Feature.DOUBLE_QUANT: quantization.double_quant,
        Feature.GRADIENT_CHECKPOINTING: compute.gradient_checkpointing,
        Feature.DATA_PARALLEL: compute.world.size > 1,
        Feature.SHARDED_BASE: compute.shard_base,
        Feature.RECOMPUTATION_CHOICE: compute.recompute != "full",
        Feature.BASE_OFFLOAD: bool(compute.base_offload),
        Feature.FP8_PRODUCTS: compute.fp8_products,
        Feature.LOAD_PREQUANTIZED: prequantized,
        Feature.QUANTIZE_ON_LOAD: not prequantized and weight_format is not WeightFormat.NONE,
    }
    require(
        spec,
        Requirements(
            features=frozenset(feature for feature, is_needed in features.items() if is_needed),
            weight_format=weight_format,
            block_size=quantization.block_size,
            compute_dtype=compute.dtype,
        ),
    )


def check_attached(spec: BackendSpec, config: AdapterConfig, optimizer: str) -> None:
    """Beside `check_served`, for `attach`: the optimizer and dropout. Raises UnsupportedFeatureError QH-B01."""
    check_optimizer(optimizer, spec)
    if config.dropout:
        require(spec, Requirements(features=frozenset({Feature.LORA_DROPOUT})))


def check_batches(spec: BackendSpec, batches: Sequence[Batch]) -> None:
    """For each step and view: packed rows and weighted tokens. Raises UnsupportedFeatureError QH-B01."""
    asked = {Feature.PACKING: any(batch.is_packed for batch in batches), Feature.TOKEN_WEIGHTS: has_weights(batches)}
    require(spec, Requirements(features=frozenset(feature for feature, is_asked in asked.items() if is_asked)))


def check_optimizer(name: str, spec: BackendSpec) -> None:
    """Raises UnsupportedFeatureError QH-B01 for a name that the backend does not offer."""
    features = spec.capabilities.features
    offered = [known for known, feature in OPTIMIZER_FEATURE.items() if feature is None or feature in features]
    if name not in offered:
        raise UnsupportedFeatureError(
            "QH-B01",
            f"Backend {spec.name} has no optimizer {name!r}; it has {', '.join(offered)}.",
            fix="Set training.optim to one of them.",
        )


def require(spec: BackendSpec, needs: Requirements) -> None:
    """Raises UnsupportedFeatureError QH-B01 naming everything in `needs` that the spec does not declare."""
    if lacks := unmet_requirements(needs, spec.capabilities):
        raise UnsupportedFeatureError(
            "QH-B01",
            f"Backend {spec.name} does not support what was requested: {'; '.join(lacks)}.",
            fix="Run qlora-hal backends to see which backend does.",
            context={"lacks": list(lacks)},
        )


def out_of_order(first: str) -> BackendContractError:
    """The error of a trainer that is used before `first`."""
    return BackendContractError(
        "QH-B02", f"The trainer was used before {first}().", fix=f"Call {first}() first; this is a bug of the caller."
    )


def unknown_module(module: str, linear_modules: Collection[str]) -> ModelError:
    """The error of `dequantized_weight` for a path without a linear layer."""
    first = next(iter(linear_modules), "none")
    return ModelError(
        "QH-C07",
        f"There is no linear layer {module}; the base has {len(linear_modules)}, the first is {first}.",
        fix="Name one of linear_modules().",
    )


def check_moments(snapshot: OptimizerSnapshot, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises AdapterError QH-C09 with every moment that is missing or has the wrong shape, for adapter tensors of these
    shapes."""
    wanted = {f"{name}.{kind}": tuple(shape) for name, shape in shapes.items() for kind in MOMENTS}
    wrong = [name for name, shape in wanted.items() if getattr(snapshot.moments.get(name), "shape", None) != shape]
    wrong += sorted(snapshot.moments.keys() - wanted.keys())
    if wrong:
        raise AdapterError(
            "QH-C09",
            f"{len(wrong)} of {len(wanted)} optimizer tensors are missing, unknown or have the wrong shape: "
            f"{', '.join(wrong[:5])}.",
            fix="Resume with the adapter that this optimizer state was saved with.",
            context={"tensors": wrong},
        )


@contextmanager
def memory_named(
    device: str, phase: str, *, kinds: tuple[type[BaseException], ...] = (), words: Sequence[str] = ()
) -> Iterator[None]:
    """MemoryError, an error of `kinds`, and a RuntimeError whose text holds one of `words` (lower case) come out as
    OutOfMemoryError QH-N07, which the core answers by splitting the window."""
    caught: tuple[type[BaseException], ...] = (MemoryError, RuntimeError, *kinds)
    try:
        yield
    except caught as error:
        text = str(error).lower()
        if not isinstance(error, (MemoryError, *kinds)) and not any(word in text for word in words):
            raise
        reason = (str(error).splitlines() or ["no message"])[0]
    else:
        return
    # Out of the except block: the error's frames hold the activations.
    raise OutOfMemoryError(
        "QH-N07",
        f"{device} ran out of memory in {phase}.",
        cause=reason,
        fix="Lower training.per_device_train_batch_size or data.max_seq_length, or set training.recompute: auto.",
        context={"phase": phase},
    )


# batches -------------------------------------------------------------------------------------------------------------
def counted_tokens(batches: Sequence[Batch]) -> int:
    """Tokens that carry loss, over all batches."""
    return sum(batch.counted_tokens for batch in batches)


def has_weights(batches: Sequence[Batch]) -> bool:
    """Whether any batch weighs its tokens."""
    return any(batch.weights is not None for batch in batches)


def next_labels(batch: Batch) -> Int32:
    """The label that the logits at each place are scored against `[batch, time]`; none at the end of a row."""
    following = np.full_like(batch.labels, IGNORE_LABEL)
    following[:, :-1] = batch.labels[:, 1:]
    return following


def next_weights(batch: Batch) -> Float32:
    """The weight of the loss at each place `[batch, time]`, aligned with `next_labels`; 1 without weights."""
    following = np.zeros(batch.labels.shape, np.float32)
    following[:, :-1] = 1.0 if batch.weights is None else batch.weights[:, 1:]
    return following


def at_labels(batch: Batch, losses: Float32) -> Float32:
    """What `token_losses` gives `[batch, time]`, from the losses of the counted tokens alone, in order."""
    found = np.zeros(batch.labels.shape, np.float32)
    found[:, 1:][batch.labels[:, 1:] != IGNORE_LABEL] = losses
    return found


# figures -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Done:
    """A step that needs no waiting for."""

    stats: StepStats

    def resolve(self) -> StepStats:
        return self.stats


@dataclass(frozen=True, slots=True)
class WindowCount:
    """What the figures of a step say of its window, counted when the step is queued: by the time that they are read the
    caller may have put other tokens into the arrays."""

    tokens: int
    has_weights: bool

    @classmethod
    def of(cls, window: Sequence[Batch]) -> WindowCount:
        return cls(counted_tokens(window), has_weights(window))

    def stats(self, loss_sum: float, weighted: float, grad_norm: float, *, applied: bool) -> StepStats:
        """The figures of a step: the weighted sum only where there are weights."""
        return StepStats(loss_sum, self.tokens, grad_norm, applied, weighted if self.has_weights else None)


def step_stats(
    window: Sequence[Batch], loss_sum: float, weighted: float, grad_norm: float, *, applied: bool
) -> StepStats:
    """The figures of a step that is done; one that is read later keeps a `WindowCount`."""
    return WindowCount.of(window).stats(loss_sum, weighted, grad_norm, applied=applied)


def evaluated(batches: Sequence[Batch], loss_sum: float, weighted: float) -> LossSum:
    """The same of an evaluation."""
    return LossSum(loss_sum, counted_tokens(batches), weighted if has_weights(batches) else None)
