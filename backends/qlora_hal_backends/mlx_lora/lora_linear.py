"""A frozen linear layer with a LoRA adapter.

    y = x W^T + scale * drop(x) A^T B^T + bias                    (Hu et al. 2021, equation 3)

is summed in float32 and rounded to the compute dtype once. Added onto an output that is already bfloat16, a young
update is under half a unit in the last place and vanishes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx

from qlora_hal.contract import dropout
from qlora_hal_backends.mlx_lora.base_weights import BaseWeight


@dataclass(slots=True)
class LoRASlots:
    """What all adapted layers of one model read while a function is traced.

    `tensors` maps a tensor's name to its array. `token_words` None means no dropout.
    """

    tensors: Mapping[str, mx.array] = field(default_factory=dict)
    token_words: mx.array | None = None  # uint32 [batch * time], `qlora_hal.contract.dropout.token_words`
    enabled: bool = True
    recompute: bool = False

    @contextmanager
    def holding(
        self, tensors: Mapping[str, mx.array], *, token_words: mx.array | None = None, recompute: bool = False
    ) -> Iterator[None]:
        """Let the layers read these for a while."""
        before = self.tensors, self.token_words, self.recompute
        self.tensors, self.token_words, self.recompute = tensors, token_words, recompute
        try:
            yield
        finally:
            self.tensors, self.token_words, self.recompute = before


@dataclass(frozen=True, slots=True)
class LoRAPlace:
    """Where one layer finds its adapter."""

    a_name: str  # [r, in]
    b_name: str  # [out, r]
    scale: float
    dropout: float
    channel_words: mx.array | None  # uint32 [in]; None without dropout


class FrozenLinear:
    """A packed, frozen weight, plus the adapter once one is attached. Stands in the place of an `nn.Linear`; it is no
    module itself, so that its arrays are nobody's parameters."""

    def __init__(self, base: BaseWeight, bias: mx.array | None, slots: LoRASlots) -> None:
        self.base = base
        self.bias = bias
        self.slots = slots
        self.place: LoRAPlace | None = None

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        y = self.base.product(rows)
        if self.place is not None and self.slots.enabled:
            y = y + self._adapter_product(rows, self.place)
        if self.bias is not None:
            y = y + self.bias
        return y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])

    def _adapter_product(self, rows: mx.array, place: LoRAPlace) -> mx.array:
        a, b = self.slots.tensors[place.a_name], self.slots.tensors[place.b_name]
        words = self.slots.token_words
        if words is not None and place.channel_words is not None:
            kept = kept_inputs(words, place.channel_words, place.dropout)
            rows = mx.where(kept, rows * (1.0 / (1.0 - place.dropout)), 0.0)
        return ((rows @ a.T) * place.scale) @ b.T


def kept_inputs(token_words: mx.array, channel_words: mx.array, rate: float) -> mx.array:
    """`qlora_hal.contract.dropout.kept` for words `[tokens]` and `[channels]`: bool `[tokens, channels]`."""
    words = token_words[:, None] + channel_words[None, :]
    for shift, factor in zip(dropout.SHIFTS, (dropout.FIRST_FACTOR, dropout.SECOND_FACTOR, None), strict=True):
        words = words ^ (words >> shift)
        if factor is not None:
            words = words * mx.array(factor, dtype=mx.uint32)
    return (words >> 1) >= dropout.drop_below(rate)
