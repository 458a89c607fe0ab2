"""What stands in the place of transformers' module of routed experts, and the rule for ties.

transformers (5.x) holds all experts of a block as weights of three dimensions, and computes with them in one of several
ways (`integrations/moe.py`), each from hidden states, the chosen experts of each token, and their weights. Here it is
computed as its grouped way does: rows sorted by expert, one product for each projection, the sum over a token's experts
made once, whatever it is computed in. What is between the projections stays the architecture's own code.

The router is the architecture's code as well, and its `torch.topk` promises nothing for equal scores. In bfloat16 they
are common. Within a block the expert with the lower number wins, on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qlora_hal_backends.torch_family.experts.products import Groups, LoopOverExperts, Products
from qlora_hal_backends.torch_family.experts.stack import ExpertStack

_BIASES = ("gate_up_proj_bias", "down_proj_bias")


class RoutedExperts(nn.Module):
    """The experts of one block. `gate`, `up` and `down` are filled when the checkpoint is read; `sides` are the widths
    outside and between the projections."""

    gate_up_proj_bias: Tensor | None
    down_proj_bias: Tensor | None

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.experts = int(theirs.num_experts)
        sides = tuple(theirs.down_proj.shape[1:])
        self.sides: tuple[int, int] = (sides[1], sides[0]) if theirs.is_transposed else (sides[0], sides[1])
        self.is_interleaved = not theirs.is_concatenated
        self.is_transposed = bool(theirs.is_transposed)
        self.products: Products = LoopOverExperts()
        self.gate: ExpertStack | None = None
        self.up: ExpertStack | None = None
        self.down: ExpertStack | None = None
        self.gated = _gating(theirs)
        for name in _BIASES:
            setattr(self, name, getattr(theirs, name, None))

    @property
    def has_biases(self) -> bool:
        return any(getattr(self, name) is not None for name in _BIASES)

    @property
    def stacks(self) -> tuple[ExpertStack, ExpertStack, ExpertStack]:
        assert self.gate is not None, "the names are not known"
        assert self.up is not None
        assert self.down is not None
        return self.gate, self.up, self.down

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gate, up, down = self.stacks
        tokens, width = hidden_states.shape
        chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
        numbers = torch.arange(self.experts, device=chosen.device)
        # Not bincount, which waits for the device.
        groups = Groups(torch.searchsorted(chosen, numbers, right=True).to(torch.int32))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        each = top_k_index.shape[-1]
        rows = _SentToExperts.apply(hidden_states, order, back, each)  # type: ignore[no-untyped-call]
        inputs = (stack.rows(rows, groups, self.products) for stack in (gate, up))
        inner = self.gated(*self._with_biases(tuple(inputs), chosen))
        y = down.rows(inner, groups, self.products)
        if self.down_proj_bias is not None:
            y = y + self.down_proj_bias[chosen]
        y = y * top_k_weights.reshape(-1)[order, None]
        by_token: Tensor = _SentBack.apply(y, order, back)  # type: ignore[no-untyped-call]
        return by_token.view(tokens, each, width).sum(dim=1).to(hidden_states.dtype)

    def _with_biases(self, inputs: tuple[Tensor, ...], chosen: Tensor) -> tuple[Tensor, ...]:
        if self.gate_up_proj_bias is None:
            return inputs
        biases = self.halves(self.gate_up_proj_bias)
        return tuple(rows + bias[chosen] for rows, bias in zip(inputs, biases, strict=True))

    def halves(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up of what transformers holds as one, along its last side."""
        if self.is_interleaved:
            return both[..., ::2], both[..., 1::2]
        gate, up = both.chunk(2, dim=-1)
        return gate, up


class _SentToExperts(torch.autograd.Function):
    """Each token's row once for each of its experts, sorted by expert. Autograd would add the gradients of its rows
    by an index with repetitions, which is slow; they are as many for each token."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, back: Tensor, each: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.each = each
        return tokens[order // each]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        return grad[back].view(-1, ctx.each, grad.shape[-1]).sum(dim=1), None, None, None


class _SentBack(torch.autograd.Function):
    """Rows in the order of the tokens again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows[back]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad[order], None, None


def _gating(theirs: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """What is between the projections. An architecture's own is asked with both halves as it lays them."""
    from transformers.integrations import moe

    kind = type(theirs)
    if kind._apply_gate is moe._default_apply_gate:
        activation = theirs.act_fn
        return lambda gate, up: activation(gate) * up
    settings = nn.Module()
    settings.__dict__.update({name: value for name, value in vars(theirs).items() if not name.startswith("_")})
    settings._modules.update(theirs._modules)

    def own(gate: Tensor, up: Tensor) -> Tensor:
        joined = torch.cat((gate, up), -1) if theirs_concatenates else torch.stack((gate, up), -1).flatten(-2)
        gated: Tensor = kind._apply_gate(settings, joined)
        return gated

    theirs_concatenates = bool(theirs.is_concatenated)
    return own


def place_experts(causal: Any) -> dict[str, RoutedExperts]:
    """Put ours in the place of transformers' modules of experts: path in the model -> block. Kinds that compute
    something else stay where they are (and keep their weights of three dimensions)."""
    placed: dict[str, RoutedExperts] = {}
    for path, theirs in list(_known_experts(causal)):
        ours = RoutedExperts(theirs)
        causal.set_submodule(path, ours)
        parent = causal.get_submodule(path.rpartition(".")[0])
        parent.forward = _lower_number_wins(parent.forward)
        placed[path] = ours
    return placed


def _known_experts(causal: Any) -> Iterator[tuple[str, Any]]:
    for path, module in causal.named_modules():
        weights = {name for name, _ in module.named_parameters(recurse=False)}
        plain = {"gate_up_proj", "down_proj"} <= weights <= {"gate_up_proj", "down_proj", *_BIASES}
        # The norm after each expert came to transformers after 5.17.
        has_norm = getattr(module, "has_post_expert_norm", False)
        # One expert alone is no stack to the core.
        if plain and getattr(module, "has_gate", False) and not has_norm and module.num_experts > 1:
            yield path, module


def _lower_number_wins(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def with_rule(*args: Any, **kwargs: Any) -> Any:
        with TiesByNumber():
            return forward(*args, **kwargs)

    return with_rule


class TiesByNumber(TorchFunctionMode):
    """`torch.topk` that takes the first of equal entries: a stable sort has that order, on every device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.topk or func is Tensor.topk:
            return _first_of_equal(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _first_of_equal(
    scores: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> torch.return_types.topk:
    values, places = torch.sort(scores, dim=dim, descending=largest, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), places.narrow(dim, 0, k)))
