"""From a window of numpy batches to gradients: one forward and backward for each micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from qlora_hal.contract.backend import Recompute
from qlora_hal.contract.toolkit import next_labels, next_weights
from qlora_hal.contract.values import IGNORE_LABEL, Batch
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal_backends.torch_family.attention.sinks import SAMPLE_LENGTHS
from qlora_hal_backends.torch_family.device import has_queue
from qlora_hal_backends.torch_family.head_loss import loss_sum, row_losses, whole_loss_sum
from qlora_hal_backends.torch_family.loading import FEED_FORWARD, BaseModel


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A batch on the device. `counted` indexes the flattened hidden states whose next token carries loss."""

    input_ids: Tensor  # [batch, time]
    position_ids: Tensor | None  # [batch, time]; None where every row is one sample from position 0
    counted: Tensor  # [counted]
    targets: Tensor  # [counted]
    weights: Tensor | None = None  # float32 [counted]
    lengths: tuple[int, ...] | None = None  # of the samples of a packed batch, end to end; padding counts as samples


BatchLoss = Callable[[DeviceBatch, float], Tensor]
"""`batch_loss` with its base bound: of the plain layers here, or of the fused ones."""


def to_device(batch: Batch, device: torch.device) -> DeviceBatch:
    """Copy a batch without waiting; which positions count is decided here, on the host."""
    flat = next_labels(batch).reshape(-1)
    counted = np.flatnonzero(flat != IGNORE_LABEL)
    return DeviceBatch(
        input_ids=_copy(batch.input_ids, device),
        # transformers finds packed samples by positions that restart, and masks attention across them. Rows that are
        # one sample padded on the right need no mask: causal attention never looks at what follows.
        position_ids=_copy(batch.position_ids, device) if batch.is_packed else None,
        counted=_copy(counted, device),
        targets=_copy(flat[counted], device),
        weights=None if batch.weights is None else _copy(next_weights(batch).reshape(-1)[counted], device),
        lengths=_sample_lengths(batch) if batch.is_packed else None,
    )


def _sample_lengths(batch: Batch) -> tuple[int, ...]:
    """Of the samples as they lie one after the other, row by row; the padding at a row's end is one of them."""
    begins = np.ones(batch.segment_ids.shape, bool)
    begins[:, 1:] = batch.segment_ids[:, 1:] != batch.segment_ids[:, :-1]
    return tuple(np.diff(np.flatnonzero(begins), append=begins.size).tolist())


def check_lengths(base: BaseModel, batch: Batch) -> None:
    """Raises UnsupportedFeatureError QH-B62 for samples that would get other rotary factors than alone. transformers
    goes by the largest position, which in a batch that is not packed is that of the padding's end."""
    if base.rotary is not None:
        seen = int(batch.position_ids.max(initial=-1)) + 1 if batch.is_packed else batch.input_ids.shape[1]
        base.rotary.check_batch(batch, seen)


def _copy(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    host = torch.from_numpy(np.ascontiguousarray(array))
    host = host if host.is_floating_point() else host.long()
    if not has_queue(device):
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def _samples(base: BaseModel, batch: DeviceBatch) -> dict[str, Any]:
    """What tells samples apart. Positions are given only where they say something: architectures without positions
    (Mamba, ALiBi) take none. Raises UnsupportedFeatureError QH-B60 for samples that share a row where the architecture
    cannot tell them apart."""
    rows, time = batch.input_ids.shape
    lengths = {SAMPLE_LENGTHS: batch.lengths or (time,) * rows} if base.takes_lengths else {}
    if batch.position_ids is None:
        return lengths
    if base.mixes_samples:
        raise UnsupportedFeatureError(
            "QH-B60",
            f"{type(base.causal).__name__} cannot train on packed rows: {base.mixes_samples}.",
            where="data.packing",
            cause="Each sample would be trained on the samples before it in its row.",
            fix="Set data.packing: false.",
        )
    return {"position_ids": batch.position_ids, **lengths}


def hidden_states(base: BaseModel, batch: DeviceBatch) -> Tensor:
    """The body's last hidden states `[batch, time, hidden]`."""
    output = base.body(input_ids=batch.input_ids, use_cache=False, **_samples(base, batch))
    states: Tensor = output.last_hidden_state
    return states


def whole_logits(base: BaseModel, batch: DeviceBatch) -> Tensor:
    """Float32 logits `[batch, time, vocabulary]` of the architecture's own forward pass."""
    output = base.causal(input_ids=batch.input_ids, use_cache=False, **_samples(base, batch))
    logits: Tensor = output.logits.float()
    return logits


def logits(base: BaseModel, batch: DeviceBatch) -> Tensor:
    """Float32 logits `[batch, time, vocabulary]`."""
    return whole_logits(base, batch) if base.head is None else base.head.logits(hidden_states(base, batch))


def batch_loss(base: BaseModel, batch: DeviceBatch, gradient_scale: float) -> Tensor:
    """Sum of token losses, and with weights the weighted one `[2]`; backward of the last gives the gradient of
    `gradient_scale` times it."""
    if base.head is None:
        return whole_loss_sum(whole_logits(base, batch), batch.counted, batch.targets, gradient_scale, batch.weights)
    states = hidden_states(base, batch)
    rows = states.reshape(-1, states.shape[-1])[batch.counted]
    return loss_sum(rows, batch.targets, base.head, gradient_scale, batch.weights)


def token_losses(base: BaseModel, batch: DeviceBatch) -> Tensor:
    """The loss of each counted token `[counted]`, float32."""
    if base.head is None:
        rows = whole_logits(base, batch).flatten(0, 1)[batch.counted]
        return torch.nn.functional.cross_entropy(rows, batch.targets, reduction="none")
    states = hidden_states(base, batch)
    return row_losses(states.reshape(-1, states.shape[-1])[batch.counted], batch.targets, base.head)


def minimised(loss: Tensor) -> Tensor:
    """Of a batch's loss: the weighted sum where there is one."""
    return loss if loss.ndim == 0 else loss[-1]


def accumulate_gradients(
    batch_loss: BatchLoss,
    window: Sequence[Batch],
    device: torch.device,
    *,
    gradient_scale: float,
    see: Callable[[Batch], None],
    placed: Callable[[Batch], DeviceBatch],
) -> Tensor:
    """Backward through every micro-batch; gradients add up where the adapter keeps them. `see` is called with each
    before, `placed` takes it to the device. Returns `[loss sum, weighted loss sum]`, twice the same where nothing is
    weighted."""
    total = torch.zeros(2, dtype=torch.float32, device=device)
    for batch in window:
        if batch.counted_tokens == 0:
            continue
        see(batch)
        loss = batch_loss(placed(batch), gradient_scale)
        minimised(loss).backward()
        total += loss.detach()
    return total


@contextmanager
def recomputed_layers(base: BaseModel, recompute: Recompute, device: torch.device) -> Iterator[None]:
    """Gradient checkpointing (Chen et al. 2016) of each decoder layer or of its feed-forward alone, for the time of one
    window.

    The modules' own `forward` is wrapped on the instance: nothing stays patched, and no class is touched. Dropout masks
    are keyed, so no generator state needs to be kept for the recomputation.
    """
    modules = [getattr(layer, FEED_FORWARD) if recompute == "selective" else layer for layer in base.layers]
    for module in modules:
        forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
        module.forward = partial(_saved_on_host, forward, has_queue(device)) if recompute == "offload" else forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _saved_on_host(forward: Callable[..., Any], pinned: bool, /, *arguments: Any, **named: Any) -> Any:
    """What a checkpointed layer keeps is its input; here that waits in the host's memory."""
    with save_on_cpu(pin_memory=pinned):
        return forward(*arguments, **named)
