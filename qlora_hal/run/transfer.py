"""One run, several backends: what stays exact when a run moves, what does not, and how far the moved model is off.

Adapter, moments, schedule, data order and dropout keys are host values and move exactly. The base, stored in another
weight format, is another model: how different, is measured against answers that were saved with the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from qlora_hal.contract.capabilities import OPTIMIZER_FEATURE, Capabilities, Feature, WeightFormat
from qlora_hal.contract.dropout import MASKS
from qlora_hal.contract.values import Batch, Float32
from qlora_hal.errors import CheckpointError
from qlora_hal.formats.catalogue import record_of
from qlora_hal.report.transfer_record import Divergence, Transfer
from qlora_hal.run.trained_base import options_of_training

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.values import Int32
    from qlora_hal.files.safetensors_file import Array

ROWS, TOKENS, LIKELIEST = 8, 32, 16
"""Rows that are answered, tokens of each, and how many of the likeliest next tokens are kept for each place."""

MAX_KL = 0.5
"""Nats per token. Two 4-bit formats of a model as small as the demo's lie 0.2 to 0.25 apart (docs/resume.md), larger
models less; twice that is a damaged base, or another one."""

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]

_UNPAGED: Mapping[OptimizerName, OptimizerName] = {"paged_adamw": "adamw", "paged_adamw_8bit": "adamw_8bit"}


class Answering(Protocol):
    """What is asked of a trainer."""

    def logits(self, batch: Batch) -> Float32: ...


# the plan, before anything loads ----------------------------------------------------------------------------------


def transferred_config(
    config: RunConfig, provenance: Mapping[str, object], backend: str, capabilities: Capabilities
) -> tuple[RunConfig, tuple[str, ...]]:
    """The configuration of a run as `backend` can go on with it, and what that changes (empty: nothing).

    The stored weight format is kept wherever `backend` has it; else the level's own format takes its place.
    """
    same = provenance.get("backend") == backend
    changes: list[str] = []
    quantization, changed = _transferred_quantization(provenance, capabilities)
    changes += changed
    dtype = config.quantization.dtype
    if config.quantization.fp8_products and Feature.FP8_PRODUCTS not in capabilities.features:
        changes.append("fp8 products with the base are made in the compute dtype, which is chosen again")
        quantization["compute_dtype"] = "auto"
    elif dtype != "auto" and dtype not in capabilities.compute_dtypes:
        changes.append(f"compute dtype {dtype} is chosen again")
        quantization["compute_dtype"] = "auto"
    optimizer = config.training.optim
    if not _has_optimizer(optimizer, capabilities):
        unpaged = _UNPAGED.get(optimizer, "adamw")
        optimizer = unpaged if _has_optimizer(unpaged, capabilities) else "adamw"
        if optimizer != _UNPAGED.get(config.training.optim):  # pages are only where the moments lie
            changes.append(f"optimizer {config.training.optim} is {optimizer}")
    options = options_of_training(config, provenance) if same else {}
    updated = config.model_copy(
        update={
            "backend": _with(config.backend, name=backend, options=options),
            "quantization": _with(config.quantization, **quantization),
            "training": _with(config.training, optim=optimizer),
        }
    )
    return updated, tuple(changes)


def check_allowed(step: int, changes: Sequence[str], *, transfer: bool) -> None:
    """What changes the model or its optimizer is done only when asked for. Raises CheckpointError QH-C12."""
    if changes and not transfer:
        raise CheckpointError(
            "QH-C12",
            f"An exact resume of step {step} is impossible here: {'; '.join(changes)}.",
            cause="The same adapter on other base weights is another model.",
            fix="Add --transfer to continue anyway: the divergence is measured and printed before the first step.",
            context={"changes": list(changes)},
        )


def planned(
    step: int, provenance: Mapping[str, object], now: Mapping[str, object], changes: Sequence[str], dropout: float
) -> Transfer | None:
    """What to say when a run goes on elsewhere; None where nothing moved."""
    dtype_before, dtype = provenance.get("compute_dtype"), now["compute_dtype"]
    in_fp8 = bool(now.get("fp8_products"))
    products_differ = bool(provenance.get("fp8_products")) != in_fp8
    moved = provenance.get("backend") != now["backend"]
    if not moved and not changes and dtype_before == dtype and not products_differ:
        return None
    inexact = list(changes)
    if products_differ:
        inexact.append(f"products with the base are {'now' if in_fp8 else 'no longer'} in fp8")
    if dtype_before != dtype:
        inexact.append(f"compute dtype was {dtype_before}, is {dtype}")
    exact = ["adapter", "optimizer moments and step", "learning-rate schedule", "data order and position"]
    if moved and dropout > 0:
        same = provenance.get("dropout_masks") == MASKS
        (exact if same else inexact).append("dropout masks" if same else "dropout masks (of an earlier release)")
    if not any(change.startswith("weight format") for change in changes):
        exact.append("weight format")
    if any(change.startswith("optimizer") for change in changes):
        exact[1] = "optimizer step"
    return Transfer(step, str(provenance.get("backend")), str(now["backend"]), tuple(exact), tuple(inexact))


def _transferred_quantization(
    provenance: Mapping[str, object], capabilities: Capabilities
) -> tuple[dict[str, Any], list[str]]:
    stored, block, double = (provenance.get(name) for name in ("weight_format", "block_size", "double_quant"))
    weight_format = WeightFormat(str(stored))
    sizes = capabilities.block_sizes.get(weight_format, ())
    if weight_format in capabilities.weight_formats and (block is None or block in sizes):
        # Where a format has it, false is a choice like true: left open it would become the default.
        kept = double if record_of(weight_format).double_quant else None
        return {"weight_format": weight_format.value, "block_size": block, "double_quant": kept}, []
    level = record_of(weight_format).holding_level
    other = capabilities.levels.get(level)
    if other is None:
        raise CheckpointError(
            "QH-C12",
            f"The checkpoint's base is stored as {weight_format.value}; this backend has no {level} format at all.",
            fix="Resume on a backend that has one: qlora-hal backends lists them.",
        )
    was = f"{weight_format.value}{f' in blocks of {block}' if block else ''}{' double-quantized' if double else ''}"
    return (
        {"weight_format": other.value, "block_size": None, "double_quant": None},
        [f"weight format was {was}, becomes {other.value}"],
    )


def _has_optimizer(name: OptimizerName, capabilities: Capabilities) -> bool:
    feature = OPTIMIZER_FEATURE[name]
    return feature is None or feature in capabilities.features


def _with(part: Any, **changed: object) -> Any:
    return type(part).model_validate({**part.model_dump(), **changed})


# the measurement --------------------------------------------------------------------------------------------------


def reference_logits(trainer: Answering, batches: Sequence[Batch]) -> dict[str, Array]:
    """What the model says now: for each row (a batch of one) its tokens, and the likeliest next tokens at each place
    with their log-probabilities, `[rows, tokens, LIKELIEST]`; -1 and -inf where a row is shorter."""
    ids = np.full((len(batches), TOKENS), -1, np.int32)
    likeliest = np.full((len(batches), TOKENS, LIKELIEST), -1, np.int32)
    log_probabilities = np.full((len(batches), TOKENS, LIKELIEST), -np.inf, np.float32)
    for row, batch in enumerate(batches):
        said = _log_softmax(trainer.logits(batch)[0])
        kept = min(LIKELIEST, said.shape[-1])
        top = np.argsort(-np.take_along_axis(said, part := _largest(said, kept), -1), -1, kind="stable")
        names = np.take_along_axis(part, top, -1)
        length = batch.input_ids.shape[1]
        ids[row, :length] = batch.input_ids[0]
        likeliest[row, :length, :kept] = names
        log_probabilities[row, :length, :kept] = np.take_along_axis(said, names, -1)
    return {"input_ids": ids, "likeliest": likeliest, "log_probabilities": log_probabilities}


def measured_divergence(trainer: Answering, answers: Mapping[str, Array]) -> Divergence | None:
    """The same tokens asked again; None when the checkpoint holds no answers."""
    if not answers:
        return None
    divergences, agreeing = [], 0
    for ids, names, log_probabilities in zip(
        answers["input_ids"], answers["likeliest"], answers["log_probabilities"], strict=True
    ):
        length = int(np.count_nonzero(ids >= 0))
        said = _log_softmax(trainer.logits(batch_of_tokens(ids[:length]))[0])
        kept = int(np.count_nonzero(names[0] >= 0))
        names, before = names[:length, :kept], log_probabilities[:length, :kept].astype(np.float64)
        now = np.take_along_axis(said, names, -1).astype(np.float64)
        divergences.append(_divergence(before, now))
        agreeing += int(np.count_nonzero(said.argmax(-1) == names[:, 0]))
    tokens = sum(len(row) for row in divergences)
    return Divergence(
        rows=len(divergences),
        tokens=tokens,
        kl_mean=float(np.concatenate(divergences).mean()),
        kl_max=max(float(row.mean()) for row in divergences),
        top1=agreeing / tokens,
    )


def check_divergence(gap: Divergence | None) -> None:
    """Raises CheckpointError QH-C66 when the model is too far from the one that was saved to be the same run."""
    if gap is not None and not gap.kl_mean <= MAX_KL:
        raise CheckpointError(
            "QH-C66",
            f"The model here is {gap.kl_mean:.3g} nats per token from the one that was saved, "
            f"at most {MAX_KL} is expected of another weight format.",
            cause="The base differs, or one of the two backends computes wrongly.",
            fix="Run qlora-hal conformance on both backends; nothing was trained or written.",
            context=asdict(gap),
        )


def batch_of_tokens(ids: Int32) -> Batch:
    """One row of tokens without any label, `[1, time]`."""
    row = np.array(ids, dtype=np.int32)[None]
    ones = np.ones_like(row)
    return Batch(row, np.full_like(row, -100), np.arange(row.shape[1], dtype=np.int32)[None], ones)


def _largest(values: Float32, count: int) -> Any:
    return np.argpartition(-values, count - 1, axis=-1)[..., :count]


def _log_softmax(logits: Float32) -> Float32:
    shifted = logits - logits.max(-1, keepdims=True)
    normed: Float32 = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normed


def _divergence(before: Any, now: Any) -> Any:
    """KL(before || now) at each place, all tokens that are not named taken as one."""
    kept = np.sum(np.exp(before) * (before - now), -1)
    rest, rest_now = (np.clip(1.0 - np.exp(named).sum(-1), 1e-9, 1.0) for named in (before, now))
    return np.maximum(kept + rest * np.log(rest / rest_now), 0.0)
