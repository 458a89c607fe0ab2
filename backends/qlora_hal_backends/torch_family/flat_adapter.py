"""All LoRA parameters of a model in one flat float32 buffer, their gradients in another.

One norm, one optimizer update and one cast serve every layer; each layer sees views.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qlora_hal.adapter.naming import lora_a_key, lora_b_key
from qlora_hal.contract import dropout
from qlora_hal.contract.values import Adapter, Float32
from qlora_hal_backends.torch_family.experts import ExpertStack
from qlora_hal_backends.torch_family.lora_linear import FrozenLinear, LoRASwitches, LoRAWeights, words_on

# Each tensor starts at a multiple of this many elements: 64 bytes in bfloat16, what matrix kernels want of a pointer.
ALIGNMENT = 32


STATE_BLOCK = 256
"""An expert's part starts at a multiple of this many elements: an 8-bit optimizer keeps one scale to as many."""

AdaptedLayer = FrozenLinear | ExpertStack


@dataclass(frozen=True, slots=True)
class StackOfExperts:
    """Where A and B of one stack lie: each `(start, elements of one expert)`, the experts behind one another."""

    experts: int
    parts: tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class BlockOwners:
    """Which expert of which stack each block of `STATE_BLOCK` elements belongs to, int32 `[blocks]`: experts are
    numbered through all stacks, and `experts` stands for what belongs to none, as does the rest behind the last whole
    block."""

    owners: Tensor
    experts: int

    @classmethod
    def of(cls, stacks: Sequence[StackOfExperts], elements: int, device: torch.device) -> BlockOwners:
        experts = sum(stack.experts for stack in stacks)
        owners = torch.full((-(-elements // STATE_BLOCK),), experts, dtype=torch.int32)
        first = 0
        for stack in stacks:
            numbers = torch.arange(first, first + stack.experts, dtype=torch.int32)
            for start, size in stack.parts:
                begin, blocks = start // STATE_BLOCK, size // STATE_BLOCK
                owners[begin : begin + stack.experts * blocks] = numbers.repeat_interleave(blocks)
            first += stack.experts
        return cls(owners.to(device), experts)

    def trained(self, gradients: Tensor) -> Tensor:
        """Bool `[blocks]`: which belong to no expert, or to one whose gradient is not zero in every number. NaN is not
        zero."""
        has_gradient = whole_blocks(gradients).any(dim=1)
        found = torch.zeros(self.experts + 1, dtype=torch.int32, device=gradients.device)
        found.index_add_(0, self.owners[: len(has_gradient)], has_gradient.to(torch.int32))
        found[self.experts :].fill_(1)
        return found[self.owners] > 0


def whole_blocks(buffer: Tensor) -> Tensor:
    """`[blocks, STATE_BLOCK]` of a flat buffer, without what is behind the last whole block."""
    return buffer[: len(buffer) // STATE_BLOCK * STATE_BLOCK].view(-1, STATE_BLOCK)


@dataclass(slots=True)
class FlatAdapter:
    """`parameters`, `gradients` float32 and `compute` (in the compute dtype) share one layout, `slices`; `stacks` are
    the parts of it that belong to routed experts."""

    adapter: Adapter
    slices: Mapping[str, tuple[int, tuple[int, ...]]]  # tensor name -> (start, shape)
    parameters: Tensor
    gradients: Tensor
    compute: Tensor
    switches: LoRASwitches
    stacks: tuple[StackOfExperts, ...]

    @classmethod
    def place(
        cls, adapter: Adapter, linears: Mapping[str, AdaptedLayer], dtype: torch.dtype, device: torch.device
    ) -> FlatAdapter:
        """Copy the adapter's tensors beside their layers and let the layers use them."""
        slices, size = _layout(adapter)
        parameters = torch.zeros(size, dtype=torch.float32, device=device)
        flat = cls(
            adapter=adapter,
            slices=slices,
            parameters=parameters,
            gradients=torch.zeros_like(parameters),
            compute=parameters if dtype == torch.float32 else torch.zeros(size, dtype=dtype, device=device),
            switches=LoRASwitches(),
            stacks=tuple(_stacks(adapter, slices)),
        )
        for name, tensor in adapter.tensors.items():
            flat.view(parameters, name).copy_(torch.from_numpy(np.ascontiguousarray(tensor)))
        flat.refresh_compute()
        flat._hand_to_layers(linears)
        return flat

    def view(self, buffer: Tensor, name: str) -> Tensor:
        shape = self.slices[name][1]
        if len(shape) == 3:
            rows, columns = shape[1:]
            stack: Tensor = self._kept(buffer, name)[:, : rows * columns].unflatten(1, (rows, columns))
            return stack
        return self._kept(buffer, name)

    def _kept(self, buffer: Tensor, name: str) -> Tensor:
        """A tensor as it lies in the buffer: of a stack `[experts, numbers]`, padding included."""
        start, shape = self.slices[name]
        if len(shape) == 3:
            shape = (shape[0], _padded(math.prod(shape[1:]), STATE_BLOCK))
        return buffer[start : start + math.prod(shape)].view(shape)

    def refresh_compute(self) -> None:
        """Cast the master parameters; called after every update."""
        if self.compute is not self.parameters:
            self.compute.copy_(self.parameters)

    def to_host(self, buffer: Tensor) -> dict[str, Float32]:
        """One transfer, then named float32 arrays."""
        host = buffer.detach().float().cpu()
        return {name: self.view(host, name).numpy().copy() for name in self.slices}

    def from_host(self, tensors: Mapping[str, Float32]) -> Tensor:
        """The inverse of `to_host`: a new flat buffer on the device."""
        buffer = torch.zeros(self.parameters.shape, dtype=torch.float32)
        for name in self.slices:
            self.view(buffer, name).copy_(torch.from_numpy(np.ascontiguousarray(tensors[name])))
        return buffer.to(self.parameters.device)

    def detach_from(self, linears: Mapping[str, AdaptedLayer]) -> None:
        for linear in linears.values():
            linear.lora = None

    def _hand_to_layers(self, linears: Mapping[str, AdaptedLayer]) -> None:
        config = self.adapter.config
        for module in config.target_modules:
            names = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
            a, b = (self._parameter(name) for name in names)
            linears[module].lora = LoRAWeights(
                a=a,
                b=b,
                a_compute=self.view(self.compute, names[0]),
                b_compute=self.view(self.compute, names[1]),
                scale=config.scale,
                dropout=config.dropout,
                channel_words=self._channel_words(module, linears[module].in_features),
                switches=self.switches,
            )

    def _channel_words(self, module: str, channels: int) -> Tensor | None:
        if self.adapter.config.dropout == 0.0:
            return None
        return words_on(dropout.channel_words(module, channels), self.parameters.device)

    def _parameter(self, name: str) -> nn.Parameter:
        parameter = nn.Parameter(self._kept(self.parameters, name))
        parameter.grad = self._kept(self.gradients, name)  # autograd adds into it in place
        return parameter


def _layout(adapter: Adapter) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
    slices: dict[str, tuple[int, tuple[int, ...]]] = {}
    start = 0
    for name in sorted(adapter.tensors):
        shape = adapter.tensors[name].shape
        if len(shape) == 3:
            start = _padded(start, STATE_BLOCK)
            size = shape[0] * _padded(math.prod(shape[1:]), STATE_BLOCK)
        else:
            size = _padded(math.prod(shape), ALIGNMENT)
        slices[name] = (start, shape)
        start += size
    return slices, start


def _stacks(adapter: Adapter, slices: Mapping[str, tuple[int, tuple[int, ...]]]) -> Iterator[StackOfExperts]:
    for module in adapter.config.target_modules:
        (a, a_shape), (b, b_shape) = (slices[key(module)] for key in (lora_a_key, lora_b_key))
        if len(a_shape) == 3:
            sizes = [_padded(math.prod(shape[1:]), STATE_BLOCK) for shape in (a_shape, b_shape)]
            yield StackOfExperts(a_shape[0], ((a, sizes[0]), (b, sizes[1])))


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
