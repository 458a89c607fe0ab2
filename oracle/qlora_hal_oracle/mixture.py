"""The feed-forward part of a layer that is a mixture of experts, in float64, forward and back.

Tokens are laid out by expert, `[experts, places, hidden]` with zeros where an expert has fewer tokens than the one with
most: a stack of linear layers is one product then, and what a zero row adds to a gradient is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import blocks
from .arithmetic import Arithmetic
from .arrays import Float64, Int64
from .lora import AdaptedLinear, BackwardRun, LinearTrace
from .routing import Routing, route, route_backward
from .shape import MixtureShape

Apply = Callable[[str, Float64], Float64]
"""A linear layer by its name in the decoder layer, and its input, to its output; on the way back a gradient to one."""
Router = Callable[[str], AdaptedLinear]
"""A frozen linear layer by its name in the decoder layer."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedTrace:
    """The expert that every token passes. `share` `[batch, time, 1]` is what its output is multiplied with."""

    gate: Float64
    up: Float64
    output: Float64
    share: Float64
    share_trace: LinearTrace | None


@dataclass(frozen=True, slots=True, eq=False)
class MixtureTrace:
    """What the gradient needs. `places` `[tokens, experts per token]` is each token's place among those of its expert;
    `output` is what the experts gave, before the routing weights."""

    x: Float64
    router: LinearTrace
    routing: Routing
    places: Int64
    gate: Float64
    up: Float64
    output: Float64
    shared: SharedTrace | None


@dataclass(frozen=True, slots=True)
class Mixture:
    """One layer's. `correction` is the router's bias for the choice."""

    shape: MixtureShape
    activation: str
    correction: Float64 | None
    router: Router

    def forward(self, x: Float64, apply: Apply, arithmetic: Arithmetic) -> tuple[Float64, MixtureTrace]:
        """y = sum over the chosen experts of weight * expert(x), plus share * shared expert(x)."""
        shape, store = self.shape, arithmetic.store
        tokens = x.reshape(-1, x.shape[-1])
        logits, router = self.router(shape.router).forward(tokens, arithmetic)
        routing = self.route(logits)
        places, capacity = _places(routing.chosen, shape.experts)
        laid_out = np.zeros((shape.experts, capacity, x.shape[-1]))
        laid_out[routing.chosen, places] = tokens[:, None]
        gate, up = apply(shape.expert("gate"), laid_out), apply(shape.expert("up"), laid_out)
        output = apply(shape.expert("down"), store(self.gated(gate, up)))
        weighted = store(store(routing.weights)[..., None] * output[routing.chosen, places])
        y = store(weighted.sum(axis=1)).reshape(x.shape)
        shared = None
        if shape.shared:
            shared = self.shared_forward(x, apply, arithmetic)
            y = store(y + store(shared.share * shared.output))
        return y, MixtureTrace(x, router, routing, places, gate, up, output, shared)

    def gated(self, gate: Float64, up: Float64) -> Float64:
        """What a routed expert has between its projections."""
        if self.shape.limit is not None:
            return blocks.limited_gated(gate, up, self.shape.limit)
        return blocks.gated(gate, up, self.activation)

    def gated_backward(self, grad: Float64, gate: Float64, up: Float64) -> tuple[Float64, Float64]:
        """(gradient of the gate, of up)."""
        if self.shape.limit is not None:
            return blocks.limited_gated_backward(grad, gate, up, self.shape.limit)
        return blocks.gated_backward(grad, gate, up, self.activation)

    def route(self, logits: Float64) -> Routing:
        """Where the tokens of these router logits `[tokens, experts]` go."""
        return route(self.shape, logits, self.correction)

    def route_backward(self, grad_weights: Float64, routing: Routing) -> Float64:
        """Gradient of the router's logits from that of the weights."""
        return route_backward(self.shape, grad_weights, routing)

    def backward(self, grad: Float64, trace: MixtureTrace, back: Apply, run: BackwardRun) -> Float64:
        """Gradient of the input; those of the layers are added to the run's."""
        shape, store, routing = self.shape, run.arithmetic.store, trace.routing
        chosen, places = routing.chosen, trace.places
        grad_tokens = grad.reshape(-1, grad.shape[-1])
        grad_output = np.zeros_like(trace.output)
        grad_output[chosen, places] = store(routing.weights[..., None] * grad_tokens[:, None])
        grad_gated = back(shape.expert("down"), grad_output)
        grad_gate, grad_up = self.gated_backward(grad_gated, trace.gate, trace.up)
        grad_laid_out = back(shape.expert("gate"), store(grad_gate)) + back(shape.expert("up"), store(grad_up))
        grad_x = store(grad_laid_out[chosen, places].sum(axis=1))
        grad_weights = store((grad_tokens[:, None] * trace.output[chosen, places]).sum(axis=-1))
        grad_logits = store(self.route_backward(grad_weights, routing))
        grad_x = (grad_x + self.router(shape.router).backward(grad_logits, trace.router, run)).reshape(grad.shape)
        if trace.shared is not None:
            grad_x = grad_x + self._shared_backward(grad, trace.shared, back, run)
        return store(grad_x)

    def shared_forward(self, x: Float64, apply: Apply, arithmetic: Arithmetic) -> SharedTrace:
        """The expert that every token passes."""
        shape, store = self.shape, arithmetic.store
        gate, up = apply(shape.shared_expert("gate"), x), apply(shape.shared_expert("up"), x)
        output = apply(shape.shared_expert("down"), store(blocks.gated(gate, up, self.activation)))
        if not shape.shared_gate:
            return SharedTrace(gate, up, output, np.ones((*x.shape[:-1], 1)), None)
        logit, trace = self.router(shape.shared_gate_path).forward(x, arithmetic)
        return SharedTrace(gate, up, output, store(0.5 * (1.0 + np.tanh(0.5 * logit))), trace)

    def _shared_backward(self, grad: Float64, trace: SharedTrace, back: Apply, run: BackwardRun) -> Float64:
        shape, store = self.shape, run.arithmetic.store
        grad_gated = back(shape.shared_expert("down"), store(trace.share * grad))
        grad_gate, grad_up = blocks.gated_backward(grad_gated, trace.gate, trace.up, self.activation)
        grad_x = back(shape.shared_expert("gate"), store(grad_gate)) + back(shape.shared_expert("up"), store(grad_up))
        if trace.share_trace is None:
            return grad_x
        grad_share = (grad * trace.output).sum(axis=-1, keepdims=True)
        grad_logit = store(grad_share * trace.share * (1.0 - trace.share))
        return grad_x + self.router(shape.shared_gate_path).backward(grad_logit, trace.share_trace, run)


def _places(chosen: Int64, experts: int) -> tuple[Int64, int]:
    """The place of each token among those of each of its experts, in their order, and how many the fullest has."""
    goes = np.zeros((len(chosen), experts), dtype=np.int64)
    np.put_along_axis(goes, chosen, 1, axis=-1)
    before = np.cumsum(goes, axis=0) - goes
    return np.take_along_axis(before, chosen, axis=-1), int(goes.sum(axis=0).max(initial=1))
