"""A frozen linear layer with a low-rank adapter: names, scale, forward and gradient.

y = x W^T + b + scale * B A drop(x), with A `[r, in]`, B `[out, r]` (arXiv:2106.09685, section 4.1). The adapter's
product is added to the base product before anything is rounded to the compute dtype. A stack of experts is the same
with one axis before the others: x `[experts, places, in]`, A `[experts, r, in]`, B `[experts, out, r]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .arithmetic import Arithmetic
from .arrays import Float64
from .fp8 import Fp8Products, RowScaled

_PREFIX = "base_model.model."
_SUFFIX_A = ".lora_A.weight"
_SUFFIX_B = ".lora_B.weight"

ATTENTION_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP_MODULES = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True)
class LoraScale:
    """How strongly adapters act: alpha / r, or alpha / sqrt(r) when rank-stabilized (arXiv:2312.03732)."""

    alpha: float
    rank: int
    rank_stabilized: bool = False

    @property
    def factor(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def lora_a_name(module: str) -> str:
    """PEFT's name of the tensor A of a module path such as `model.layers.0.self_attn.q_proj`."""
    return f"{_PREFIX}{module}{_SUFFIX_A}"


def lora_b_name(module: str) -> str:
    """PEFT's name of the tensor B of a module path."""
    return f"{_PREFIX}{module}{_SUFFIX_B}"


def other_of_pair(name: str) -> str:
    """B's name of the module whose A has this name, and the other way round."""
    if name.endswith(_SUFFIX_A):
        return name.removesuffix(_SUFFIX_A) + _SUFFIX_B
    return name.removesuffix(_SUFFIX_B) + _SUFFIX_A


def adapted_modules(adapter: Mapping[str, Float64]) -> tuple[str, ...]:
    """Module paths that have an adapter, sorted. Raises ValueError naming every tensor that is not one of a pair."""
    modules_a = {_module_of(name, _SUFFIX_A) for name in adapter if name.endswith(_SUFFIX_A)}
    expected = {make_name(module) for module in modules_a for make_name in (lora_a_name, lora_b_name)}
    wrong = sorted(expected.symmetric_difference(adapter))
    if wrong:
        raise ValueError(f"adapter tensors that are missing or not of a pair lora_A, lora_B: {wrong}")
    return tuple(sorted(modules_a))


def _module_of(name: str, suffix: str) -> str:
    return name.removeprefix(_PREFIX).removesuffix(suffix)


@dataclass(frozen=True, slots=True, eq=False)
class LinearTrace:
    """What the gradient of one linear layer needs: its input, the input after dropout, and A times that."""

    x: Float64
    dropped: Float64
    low_rank: Float64 | None
    mask: Float64 | None


@dataclass(frozen=True, slots=True)
class BackwardRun:
    """One walk back over the model: how it computes, whether base weights get gradients, and what it has found."""

    arithmetic: Arithmetic
    with_base: bool
    gradients: dict[str, Float64] = field(default_factory=dict)

    def add(self, name: str, gradient: Float64) -> None:
        """Add to the gradient of one tensor."""
        self.gradients[name] = self.gradients[name] + gradient if name in self.gradients else gradient


@dataclass(frozen=True, slots=True, eq=False)
class EightBit:
    """A frozen weight as products in 8-bit floats see it, and how these round the other operand."""

    products: Fp8Products
    weight: RowScaled


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedLinear:
    """One linear layer: frozen weight `[out, in]`, optional bias, optional adapter pair; or a stack of them. With
    `eight_bit` the products with the frozen weight are in 8-bit floats, and the adapter's are not."""

    module: str
    weight: Float64
    bias: Float64 | None
    lora_a: Float64 | None
    lora_b: Float64 | None
    scale: float
    eight_bit: EightBit | None = None

    def forward(self, x: Float64, arithmetic: Arithmetic, mask: Float64 | None = None) -> tuple[Float64, LinearTrace]:
        """(y, trace). `mask` is the dropout mask, its 1/(1-p) already in it; it acts on the adapter's input only."""
        y = self._of_base(x, arithmetic)
        if self.bias is not None:
            y = y + (self.bias if self.weight.ndim == 2 else self.bias[:, None])
        if self.lora_a is None or self.lora_b is None:
            return arithmetic.store(y), LinearTrace(x, x, None, None)
        dropped = x if mask is None else x * mask
        low_rank = arithmetic.product(f"{self.module}.lora_A", dropped, _turned(arithmetic.store(self.lora_a)))
        low_rank = arithmetic.store(low_rank)
        update = arithmetic.product(f"{self.module}.lora_B", low_rank, _turned(arithmetic.store(self.lora_b)))
        return arithmetic.store(y + self.scale * update), LinearTrace(x, dropped, low_rank, mask)

    def backward(self, grad: Float64, trace: LinearTrace, run: BackwardRun) -> Float64:
        """Gradient of the input; those of A and B (and of W and b, if asked for) are added to the run's.

        With g the gradient of y and h = A drop(x): dB = scale g^T h, dh = scale g B, dA = dh^T drop(x),
        dx = g W + mask * (dh A).
        """
        arithmetic = run.arithmetic
        grad_x = self._through_base(grad, arithmetic)
        if run.with_base:
            run.add(f"{self.module}.weight", _turned(self._tokens(grad)) @ self._tokens(trace.x))
            if self.bias is not None:
                run.add(f"{self.module}.bias", self._tokens(grad).sum(axis=-2))
        if self.lora_a is None or self.lora_b is None or trace.low_rank is None:
            return arithmetic.store(grad_x)
        name_a, name_b = lora_a_name(self.module), lora_b_name(self.module)
        scaled = self.scale * grad
        grad_b = arithmetic.product(name_b, _turned(self._tokens(scaled)), self._tokens(trace.low_rank))
        grad_low_rank = arithmetic.product(f"{self.module}.grad_low_rank", scaled, arithmetic.store(self.lora_b))
        grad_low_rank = arithmetic.store(grad_low_rank)
        grad_a = arithmetic.product(name_a, _turned(self._tokens(grad_low_rank)), self._tokens(trace.dropped))
        run.add(name_b, arithmetic.store(grad_b))
        run.add(name_a, arithmetic.store(grad_a))
        through_a = arithmetic.product(f"{self.module}.grad_dropped", grad_low_rank, arithmetic.store(self.lora_a))
        return arithmetic.store(grad_x + (through_a if trace.mask is None else through_a * trace.mask))

    def _of_base(self, x: Float64, arithmetic: Arithmetic) -> Float64:
        if self.eight_bit is None:
            return arithmetic.product(self.module, x, _turned(arithmetic.store(self.weight)))
        rounded = self.eight_bit.products.of_input(x)
        return arithmetic.product(self.module, rounded, _turned(self.eight_bit.weight.values))

    def _through_base(self, grad: Float64, arithmetic: Arithmetic) -> Float64:
        name = f"{self.module}.grad_input"
        if self.eight_bit is None:
            return arithmetic.product(name, grad, arithmetic.store(self.weight))
        weight = self.eight_bit.weight
        return arithmetic.product(name, self.eight_bit.products.of_gradient(grad, weight.scales), weight.elements)

    def _tokens(self, x: Float64) -> Float64:
        """One row to a token; in a stack one to each place of an expert."""
        return x if self.weight.ndim == 3 else x.reshape(-1, x.shape[-1])


def _turned(matrix: Float64) -> Float64:
    return np.swapaxes(matrix, -1, -2)
