"""The residual stream and its gradient where a branch leaves it and comes back: norms and joins, for both branches of a
layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.fused.layer_weights import Join
from qlora_hal_backends.torch_family.fused.operations import Operations
from qlora_hal_backends.torch_family.fused.tape import StreamGradient


class GradientRoom(Protocol):
    """What takes the gradient of a branch's output: it wants `rows` columns of it, in a buffer of its own making."""

    @property
    def rows(self) -> int: ...

    def new_gradient(self, rows: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Stream:
    epsilon: float
    operations: Operations

    def joined(self, branch: Tensor, join: Join | None) -> Tensor:
        """A branch as it is added to the stream."""
        if join is None:
            return branch
        if join.norm is None:
            return branch * join.scale
        normed = torch.empty_like(branch)
        self.operations.add_norm(branch, None, join.norm, self.epsilon, normed)
        return normed

    def before_join(
        self, stream: StreamGradient, join: Join, branch: Tensor | None, consumer: GradientRoom
    ) -> StreamGradient:
        """The gradient of a branch, for what made it, beside that of the stream which passes it by."""
        extended = consumer.new_gradient(stream.exact.shape[0])
        rounded = extended[:, : consumer.rows]
        if join.norm is None:
            rounded.copy_(stream.exact * join.scale)
        else:
            assert branch is not None, "a branch that is normed was kept"
            self.operations.norm_backward(stream.exact, branch, join.norm, self.epsilon, None, rounded, None, None)
        return StreamGradient(stream.exact, extended)

    def new_gradient(self, h: Tensor, consumer: GradientRoom) -> StreamGradient:
        extended = consumer.new_gradient(h.shape[0])
        rounded = extended[:, : consumer.rows]
        return StreamGradient(rounded if h.dtype == rounded.dtype else torch.empty_like(h), extended)

    def norm_backward(
        self,
        x_gradient: Tensor,
        h: Tensor,
        weight: Tensor,
        above: StreamGradient | None,
        consumer: GradientRoom,
        *,
        wants_x: bool,
    ) -> tuple[StreamGradient, Tensor]:
        """Gradient of the stream below a norm, in the gradient buffer of what consumes it; and norm(h)."""
        below = self.new_gradient(h, consumer)
        return below, self.norm_backward_into(x_gradient, h, weight, above, below, wants_x=wants_x)

    def norm_backward_into(
        self,
        x_gradient: Tensor,
        h: Tensor,
        weight: Tensor,
        above: StreamGradient | None,
        below: StreamGradient,
        *,
        wants_x: bool,
    ) -> Tensor:
        """Fill `below`; gives norm(h), and something else where it is not wanted."""
        rounded = below.extended[:, : h.shape[1]]
        exact = None if h.dtype == rounded.dtype else below.exact
        x = torch.empty_like(x_gradient) if wants_x else None
        self.operations.norm_backward(
            x_gradient, h, weight, self.epsilon, None if above is None else above.exact, rounded, exact, x
        )
        return x if x is not None else rounded
