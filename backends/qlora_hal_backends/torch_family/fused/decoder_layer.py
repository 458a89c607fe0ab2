"""Forward and backward of one decoder layer, scheduled by hand; attention knows its own backward.

A layer receives the residual stream and the branch output that is still to be added to it, so that the addition, the
norm and the cast happen in one pass over memory:

    h1 = residual + pending                        h2 = h1 + attention(norm(h1))
    out = feed_forward(norm(h2))                   the next layer adds `out` to h2

Nothing elementwise is kept for backward: norms and the gated product are computed again where their inputs are read
anyway. `Keep` says which matrix products are kept.

The feed-forward sees each row by itself. Where its products are not kept it goes through the rows in tiles, forward
and backward, so that its widest buffers (three feed-forward widths a row at the height of backward) are bounded however
long a row is. Only the adapter's gradients are sums over rows: tile by tile they are the same terms, added in float32
in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.attention.causal import Attention, HeadCounts, Softmax
from qlora_hal_backends.torch_family.fused.feed_forward import FeedForward, kept_apart
from qlora_hal_backends.torch_family.fused.layer_weights import AdapterGradients, Join, LayerBuffers, LayerWeights
from qlora_hal_backends.torch_family.fused.operations import Dropout, Operations
from qlora_hal_backends.torch_family.fused.stream import Stream
from qlora_hal_backends.torch_family.fused.tape import (
    AttentionTape,
    FeedForwardProducts,
    FeedForwardTape,
    Keep,
    LayerTape,
    Sequences,
    StreamGradient,
)
from qlora_hal_backends.torch_family.platform import TILE_ROWS


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The schedule. One object serves all layers of a model; their weights come as an argument."""

    heads: HeadCounts
    attention_scale: float
    attention: Attention
    buffers: LayerBuffers
    operations: Operations
    stream: Stream
    feed_forward: FeedForward
    tile_rows: int = TILE_ROWS

    def hold(self, layer: LayerWeights) -> None:
        """From here on the products are of this layer, with the adapter as it is now."""
        self.buffers.hold(layer)
        self.feed_forward.hold(layer)

    def forget_adapter(self) -> None:
        """The adapter was updated, or may have been."""
        self.buffers.forget_adapter()
        self.feed_forward.forget_adapter()

    # forward -------------------------------------------------------------------------------------------------------
    def forward(
        self, layer: LayerWeights, residual: Tensor, pending: Tensor | None, sequences: Sequences, keep: Keep | None
    ) -> tuple[Tensor, Tensor, LayerTape | None]:
        """Return (h2, output still to be added, tape). `keep` None is evaluation: no tape."""
        self.hold(layer)
        branch, attention = self._attend(layer, residual, pending, sequences, with_graph=keep is not None)
        h1 = attention.h1
        if keep in (None, Keep.RESIDUAL):
            del attention
        h2, output, products = self._feed_forward(
            layer, h1, branch, sequences.dropout, keeps_products=keep is Keep.PRODUCTS
        )
        output = self.stream.joined(output, layer.feed_forward_join)
        if keep is None:
            return h2, output, None
        if keep is Keep.RESIDUAL:
            return h2, output, LayerTape(h1, None, None)
        return h2, output, LayerTape(h1, attention, FeedForwardTape(h2, products))

    def _attend(
        self, layer: LayerWeights, residual: Tensor, pending: Tensor | None, sequences: Sequences, with_graph: bool
    ) -> tuple[Tensor, AttentionTape]:
        into, out = self.buffers.groups["attention_in"], self.buffers.groups["attention_out"]
        extended = into.new_input(sequences.rows)
        x = extended[:, : into.columns]
        h1 = self.operations.add_norm(residual, pending, layer.input_norm, self.stream.epsilon, x)
        masks = layer.groups["attention_in"].masks(sequences.dropout)
        low_rank = kept_apart(into.low_rank(x, extended[:, into.columns :], masks))
        projected = into.product(extended, layer.groups["attention_in"].bias)
        del extended, x
        query, key, value = self._heads(layer, projected, sequences)
        softmax = Softmax(self.attention_scale, layer.window)
        mixed = self.attention(query, key, value, sequences.samples, softmax, with_graph=with_graph)
        extended = out.new_input(sequences.rows)
        self.operations.copy_rows(mixed.output, extended[:, : out.columns])
        masks = layer.groups["attention_out"].masks(sequences.dropout)
        output_low_rank = kept_apart(out.low_rank(extended[:, : out.columns], extended[:, out.columns :], masks))
        branch = out.product(extended, layer.groups["attention_out"].bias)
        join = layer.attention_join
        tape = AttentionTape(h1, low_rank, projected, mixed, _read_again(branch, join), output_low_rank)
        return self.stream.joined(branch, join), tape

    def _heads(self, layer: LayerWeights, projected: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: views `[M, heads, d]` of the products.

        Rotation is linear and works in place; a norm before it is not, so its input is left standing for backward.
        """
        heads, keys_end = self.heads, self.heads.query_columns + self.heads.key_columns
        rotated = projected if layer.head_norm is None else projected.new_empty(projected.shape[0], keys_end)
        self.operations.rotate(projected, rotated, heads, sequences.rotary_of(layer), layer.head_norm)
        parts = (rotated[:, : heads.query_columns], rotated[:, heads.query_columns : keys_end], projected[:, keys_end:])
        query, key, value = (part.unflatten(1, (-1, heads.size)) for part in parts)
        return query, key, value

    def _feed_forward(
        self, layer: LayerWeights, h1: Tensor, branch: Tensor, dropout: Dropout | None, *, keeps_products: bool
    ) -> tuple[Tensor, Tensor, FeedForwardProducts | None]:
        """(h2, output still to be joined, products where they are kept): in one piece where they are, else in tiles."""
        if keeps_products:
            h2, products = self.feed_forward.inner(layer, h1, branch, dropout)
            output, products.output_low_rank = self.feed_forward.outer(layer, products, dropout)
            products.output = _read_again(output, layer.feed_forward_join)
            return h2, output, products
        h2, output = torch.empty_like(h1), torch.empty_like(branch)
        for rows in self._tiles(h1.shape[0]):
            of_rows = _of(dropout, rows)
            _, products = self.feed_forward.inner(layer, h1[rows], branch[rows], of_rows, into=h2[rows])
            self.feed_forward.outer(layer, products, of_rows, into=output[rows])
            del products
        return h2, output, None

    def _tiles(self, rows: int) -> Iterator[slice]:
        return (slice(start, min(start + self.tile_rows, rows)) for start in range(0, rows, self.tile_rows))

    # backward ------------------------------------------------------------------------------------------------------
    def backward(
        self,
        layer: LayerWeights,
        tape: LayerTape,
        above: StreamGradient,
        sequences: Sequences,
        is_lowest: bool,
    ) -> StreamGradient | None:
        """Add this layer's adapter gradients and return the stream's gradient below it.

        Nothing below the lowest layer is trained: its input's gradient is not computed, and None is returned.
        """
        self.hold(layer)
        gradients = AdapterGradients(self.operations)
        attention, feed_forward = self._replayed(layer, tape, sequences)
        middle = self._feed_forward_backward(layer, feed_forward, above, sequences.dropout, gradients)
        del feed_forward
        above.forget()
        if layer.attention_join is not None:
            middle = self.stream.before_join(
                middle, layer.attention_join, attention.branch, self.buffers.groups["attention_out"]
            )
        below = self._attention_backward(layer, attention, middle, sequences, gradients, is_lowest)
        gradients.add()
        return below

    def _replayed(
        self, layer: LayerWeights, tape: LayerTape, sequences: Sequences
    ) -> tuple[AttentionTape, FeedForwardTape]:
        """Compute again what was not kept, but for the feed-forward's products, which are made tile by tile. The last
        product of a layer is never needed again."""
        attention, feed_forward = tape.attention, tape.feed_forward
        tape.attention = tape.feed_forward = None
        if attention is None:
            h1 = tape.give_input()
            branch, attention = self._attend(layer, h1, None, sequences, with_graph=True)
            # As `add_norm` adds: in float32, rounded once to the residual's dtype.
            h2 = branch.add_(h1) if branch.dtype == h1.dtype else h1 + branch
            return attention, FeedForwardTape(h2, None)
        assert feed_forward is not None, "attention is kept with what follows it, or computed again with it"
        return attention, feed_forward

    def _feed_forward_backward(
        self,
        layer: LayerWeights,
        tape: FeedForwardTape,
        above: StreamGradient,
        dropout: Dropout | None,
        gradients: AdapterGradients,
    ) -> StreamGradient:
        """The stream's gradient between attention and feed-forward."""
        middle = self.stream.new_gradient(tape.h2, self.buffers.groups["attention_out"])
        products, tape.products = tape.products, None
        if products is not None:
            of_output = self._of_output(layer, above, products, dropout)
            self.feed_forward.rows_backward(layer, tape.h2, products, of_output, middle, dropout, gradients)
            return middle
        for rows in self._tiles(tape.h2.shape[0]):
            of_rows = _of(dropout, rows)
            _, products = self.feed_forward.inner(layer, tape.h2[rows], None, of_rows)
            of_output = self._of_output(layer, above.of(rows), products, of_rows)
            self.feed_forward.rows_backward(
                layer, tape.h2[rows], products, of_output, middle.of(rows), of_rows, gradients
            )
            del products
            gradients.add()
        return middle

    def _of_output(
        self, layer: LayerWeights, above: StreamGradient, products: FeedForwardProducts, dropout: Dropout | None
    ) -> StreamGradient:
        """The gradient of the feed-forward's output, which a join changes."""
        join, output = layer.feed_forward_join, products.output
        if join is None:
            return above
        if join.norm is not None and output is None:
            output, _ = self.feed_forward.outer(layer, products, dropout)
        products.output = None
        return self.stream.before_join(above, join, output, self.feed_forward.gradient_room)

    def _attention_backward(
        self,
        layer: LayerWeights,
        tape: AttentionTape,
        middle: StreamGradient,
        sequences: Sequences,
        gradients: AdapterGradients,
        is_lowest: bool,
    ) -> StreamGradient | None:
        into, out = self.buffers.groups["attention_in"], self.buffers.groups["attention_out"]
        of_in, of_out = layer.groups["attention_in"], layer.groups["attention_out"]
        in_masks, out_masks = of_in.masks(sequences.dropout), of_out.masks(sequences.dropout)
        v = out.low_rank_gradient(middle.extended, out_masks)
        mixed_gradient = out.input_gradient(middle.extended, out_masks)
        gradients.of_b(of_out, middle.extended, tape.output_low_rank)
        gradients.of_a(of_out, v, tape.mixed.output, out_masks)
        extended = self._heads_backward(layer, tape, mixed_gradient, sequences)
        v = into.low_rank_gradient(extended, in_masks)
        gradients.of_b(of_in, extended, tape.input_low_rank)
        if is_lowest:
            x = middle.extended.new_empty(tape.h1.shape)
            self.operations.add_norm(tape.h1, None, layer.input_norm, self.stream.epsilon, x)
            gradients.of_a(of_in, v, x, in_masks)
            return None
        x_gradient = into.input_gradient(extended, in_masks)
        below, x = self.stream.norm_backward(
            x_gradient, tape.h1, layer.input_norm, middle, self.feed_forward.gradient_room, wants_x=v is not None
        )
        gradients.of_a(of_in, v, x, in_masks)
        return below

    def _heads_backward(
        self, layer: LayerWeights, tape: AttentionTape, mixed_gradient: Tensor, sequences: Sequences
    ) -> Tensor:
        """Through the attention and the rotation, into the group's gradient buffer."""
        heads, rotary = self.heads, sequences.rotary_of(layer)
        keys_start, keys_end = heads.query_columns, heads.query_columns + heads.key_columns
        query, key, value = tape.mixed.backward(mixed_gradient)
        extended = self.buffers.groups["attention_in"].new_gradient(sequences.rows)
        for gradient, columns, is_key in (
            (query, slice(0, keys_start), False),
            (key, slice(keys_start, keys_end), True),
        ):
            self.operations.rotate_backward(
                gradient, extended[:, columns], rotary, layer.head_norm, tape.projected[:, columns], is_key
            )
        values = extended[:, keys_end : keys_end + heads.key_columns]
        self.operations.copy_rows(value.transpose(1, 2).flatten(0, 1).flatten(1), values)
        return extended

    def final_norm(
        self, weight: Tensor, residual: Tensor, pending: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(h, states) after the last layer."""
        states = torch.empty_like(residual, dtype=dtype)
        h = self.operations.add_norm(residual, pending, weight, self.stream.epsilon, states)
        return h, states

    def final_norm_backward(self, weight: Tensor, h: Tensor, gradient: Tensor) -> StreamGradient:
        """The stream's gradient at the top."""
        room = self.feed_forward.gradient_room
        return self.stream.norm_backward(gradient, h, weight, None, room, wants_x=False)[0]


def _of(dropout: Dropout | None, rows: slice) -> Dropout | None:
    return None if dropout is None else dropout.of(rows)


def _read_again(branch: Tensor, join: Join | None) -> Tensor | None:
    """A branch whose norm backward goes through."""
    return None if join is None or join.norm is None else branch
