"""The fused body of a model: from token ids to hidden states, and back to the adapter's gradients.

One autograd function spans all layers. Its backward adds the adapter's gradients into the flat buffer itself and
returns none: the input is embeddings, which are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_hal.contract.dropout import UInt32
from qlora_hal.contract.values import Batch
from qlora_hal_backends.torch_family import step
from qlora_hal_backends.torch_family.attention.causal import Samples
from qlora_hal_backends.torch_family.flat_adapter import FlatAdapter
from qlora_hal_backends.torch_family.fused.decoder_layer import DecoderLayer
from qlora_hal_backends.torch_family.fused.end_to_end import kept_places, without_padding
from qlora_hal_backends.torch_family.fused.head_loss import loss_sum_with, select_rows
from qlora_hal_backends.torch_family.fused.layer_inputs import (
    HostMemory,
    LayerInputs,
    ResidentInputs,
)
from qlora_hal_backends.torch_family.fused.layer_weights import LayerWeights
from qlora_hal_backends.torch_family.fused.operations import Dropout, Rotary
from qlora_hal_backends.torch_family.fused.tape import Keep, LayerTape, Sequences
from qlora_hal_backends.torch_family.loading import BaseModel
from qlora_hal_backends.torch_family.platform import LONG_SAMPLE
from qlora_hal_backends.torch_family.step import DeviceBatch

LOG_SUM_BYTES = 4

RotaryTables = Callable[[int], Mapping[str, tuple[Tensor, Tensor]]]
"""Of positions up to a bound: cos and sin by type of layer, "" where all are alike."""


@dataclass(slots=True)
class _Tape:
    """One forward pass, until its backward has read it. Layers are taken off as they are done with."""

    sequences: Sequences
    inputs: LayerInputs
    layers: list[LayerTape] = field(default_factory=list)
    last_h: Tensor | None = None


@dataclass(slots=True)
class FusedBody:
    """`hidden_states` and `batch_loss` of `step`, for a base whose layers the fused schedule computes.

    `keep` is what layers keep for backward, `host` where the inputs of recomputed layers wait for it, None on the
    device. `products_path` says in words how products with the base are made where that is not in the compute dtype,
    `attention_path` how samples of unequal lengths are attended to. A batch with the adapter
    switched off takes the plain layers.
    """

    base: BaseModel
    flat: FlatAdapter
    schedule: DecoderLayer
    layers: Sequence[LayerWeights]
    final_norm: Tensor
    rotary_tables: RotaryTables
    keep: Keep
    residual_dtype: torch.dtype
    products_path: str
    attention_path: str
    embedding_scale: float
    host: HostMemory | None = None
    _anchor: Tensor = field(init=False)
    _tables: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _longest: int = 0

    def __post_init__(self) -> None:
        # Autograd records a function when an input wants a gradient; the adapter's parameters are not its inputs.
        self._anchor = torch.zeros((), device=self.flat.parameters.device, requires_grad=True)

    @property
    def words(self) -> str:
        """For the run's `kernel_path`."""
        return ", ".join(filter(None, ("fused layers", self.products_path, self.attention_path)))

    def laid_out(self, batch: Batch) -> Batch:
        """What `batch_loss` is best given in place of a batch: the same samples, without their padding."""
        return without_padding(batch) if self.flat.switches.enabled else batch

    def laid_out_words(self, batch: Batch, words: UInt32) -> UInt32:
        """Dropout's words `[batch, time]` of a batch, as those of its `laid_out` `[M]`."""
        kept = kept_places(batch) if self.flat.switches.enabled else None
        return words.reshape(-1) if kept is None else words[kept]

    def hidden_states(self, batch: DeviceBatch) -> Tensor:
        """The last hidden states `[batch, time, hidden]`."""
        if not self.flat.switches.enabled:
            return step.hidden_states(self.base, batch)
        if torch.is_grad_enabled():
            states: Tensor = _BodyFunction.apply(self._anchor, self, batch)  # type: ignore[no-untyped-call]
            return states
        return self._forward(batch, None)[0]

    def batch_loss(self, batch: DeviceBatch, gradient_scale: float) -> Tensor:
        """What `step.batch_loss` computes."""
        assert self.base.head is not None, "`supported` refuses a base without a head"
        states = self.hidden_states(batch)
        rows = select_rows(states.flatten(0, 1), batch.counted)
        return loss_sum_with(
            self.schedule.operations, rows, batch.targets, self.base.head, gradient_scale, batch.weights
        )

    def _forward(self, batch: DeviceBatch, keep: Keep | None) -> tuple[Tensor, _Tape]:
        sequences = self._sequences(batch)
        if keep is Keep.RESIDUAL and self._attended_can_wait(sequences):
            keep = Keep.RESIDUAL_AND_ATTENDED
        tape = _Tape(sequences, self._inputs(keep))
        self.schedule.forget_adapter()
        embedded = self._embedded(batch)
        residual: Tensor = embedded.flatten(0, 1).to(self.residual_dtype)
        pending: Tensor | None = None
        for layer in self.layers:
            residual, pending, layer_tape = self.schedule.forward(layer, residual, pending, sequences, keep)
            if layer_tape is not None:
                tape.inputs.keep(layer_tape.give())
                tape.layers.append(layer_tape)
        assert pending is not None
        tape.last_h, states = self.schedule.final_norm(self.final_norm, residual, pending, embedded.dtype)
        return states.unflatten(0, batch.input_ids.shape), tape

    def _backward(self, tape: _Tape, gradient: Tensor) -> None:
        assert tape.last_h is not None, "a tape is read once"
        rows = gradient.flatten(0, 1).contiguous()
        stream = self.schedule.final_norm_backward(self.final_norm, tape.last_h, rows, self.layers[-1])
        tape.last_h = None
        del rows, gradient
        for index in reversed(range(len(self.layers))):
            layer_tape = tape.layers.pop()
            layer_tape.take(tape.inputs.take())
            lower = self.layers[index - 1] if index else None
            below = self.schedule.backward(self.layers[index], layer_tape, stream, tape.sequences, lower)
            if below is not None:
                stream = below

    def _embedded(self, batch: DeviceBatch) -> Tensor:
        embedded: Tensor = self.base.body.embed_tokens(batch.input_ids).detach()
        return embedded if self.embedding_scale == 1.0 else embedded * self.embedding_scale

    def _inputs(self, keep: Keep | None) -> LayerInputs:
        if self.host is None or keep not in (Keep.RESIDUAL, Keep.RESIDUAL_AND_ATTENDED):
            return ResidentInputs()
        return self.host.of_a_pass(len(self.layers))

    def _attended_can_wait(self, sequences: Sequences) -> bool:
        """Whether what attention gives crosses to the host, too, in place of being computed again: the same bits, where
        they are worth the way and the host has room for them."""
        if self.host is None or least_attended(self.layers, sequences.samples.longest) < LONG_SAMPLE:
            return False
        heads = self.schedule.heads.counts
        columns = self.final_norm.numel() + heads.query_columns
        of_row = columns * self.residual_dtype.itemsize + heads.query * LOG_SUM_BYTES
        return self.host.has_room((len(self.layers) - 1) * sequences.rows * of_row)

    @contextmanager
    def _copies_settled(self) -> Iterator[None]:
        """Where a pass breaks off, its copies end before its memory is used for something else."""
        try:
            yield
        except BaseException:
            if self.host is not None:
                self.host.queue.settle()
            raise

    def _sequences(self, batch: DeviceBatch) -> Sequences:
        size, time = batch.input_ids.shape
        samples = Samples.of(batch.lengths or (time,) * size, batch.input_ids.device)
        if self._longest < samples.longest:
            self._tables, self._longest = self.rotary_tables(samples.longest), samples.longest
        positions = batch.position_ids
        if positions is None:
            positions = torch.arange(time, device=batch.input_ids.device).repeat(size)
        positions = positions.flatten()
        rotary = {name: Rotary(cos, sin, positions) for name, (cos, sin) in self._tables.items()}
        return Sequences(size * time, rotary, samples, self._dropout(size * time))

    def _dropout(self, rows: int) -> Dropout | None:
        tokens = self.flat.switches.token_words
        if tokens is None:
            return None
        assert tokens.shape[0] == rows, "dropout's words are those of the batch as it is laid out"
        return Dropout(tokens, self.flat.adapter.config.dropout)


def least_attended(layers: Sequence[LayerWeights], longest: int) -> int:
    """Over how many tokens the layer attends that attends over the fewest, in samples of up to `longest`."""
    return min(longest, *(layer.window or longest for layer in layers))


class _BodyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, body: FusedBody, batch: DeviceBatch) -> Tensor:
        with body._copies_settled():
            states, ctx.tape = body._forward(batch, body.keep)
        ctx.body = body
        return states

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        tape, ctx.tape = ctx.tape, None
        assert tape is not None, "the fused body's backward runs once for each forward"
        with ctx.body._copies_settled():
            ctx.body._backward(tape, gradient)
        return None, None, None
