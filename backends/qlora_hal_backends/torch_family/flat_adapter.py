"""All LoRA parameters of a model in one flat float32 buffer, their gradients in another.

One norm, one optimizer update and one cast serve every layer; each layer sees views.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qlora_hal.contract import dropout
from qlora_hal.contract.values import Adapter, Float32
from qlora_hal_backends.torch_family.lora_linear import FrozenLinear, LoRASwitches, LoRAWeights, words_on

# Each tensor starts at a multiple of this many elements: 64 bytes in bfloat16, what matrix kernels want of a pointer.
ALIGNMENT = 32


@dataclass(slots=True)
class FlatAdapter:
    """`parameters`, `gradients` float32 and `compute` (in the compute dtype) share one layout, `slices`."""

    adapter: Adapter
    slices: Mapping[str, tuple[int, tuple[int, int]]]  # tensor name -> (start, shape)
    parameters: Tensor
    gradients: Tensor
    compute: Tensor
    switches: LoRASwitches

    @classmethod
    def place(
        cls, adapter: Adapter, linears: Mapping[str, FrozenLinear], dtype: torch.dtype, device: torch.device
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
        )
        for name, tensor in adapter.tensors.items():
            flat.view(parameters, name).copy_(torch.from_numpy(np.ascontiguousarray(tensor)))
        flat.refresh_compute()
        flat._hand_to_layers(linears)
        return flat

    def view(self, buffer: Tensor, name: str) -> Tensor:
        start, shape = self.slices[name]
        return buffer[start : start + shape[0] * shape[1]].view(shape)

    def refresh_compute(self) -> None:
        """Cast the master parameters; called after every update."""
        if self.compute is not self.parameters:
            self.compute.copy_(self.parameters)

    def to_host(self, buffer: Tensor) -> dict[str, Float32]:
        """One transfer, then named float32 arrays."""
        host = buffer.detach().float().cpu().numpy()
        return {
            name: host[start : start + shape[0] * shape[1]].reshape(shape).copy()
            for name, (start, shape) in self.slices.items()
        }

    def from_host(self, tensors: Mapping[str, Float32]) -> Tensor:
        """The inverse of `to_host`: a new flat buffer on the device."""
        buffer = torch.zeros(self.parameters.shape, dtype=torch.float32)
        for name in self.slices:
            self.view(buffer, name).copy_(torch.from_numpy(np.ascontiguousarray(tensors[name])))
        return buffer.to(self.parameters.device)

    def detach_from(self, linears: Mapping[str, FrozenLinear]) -> None:
        for linear in linears.values():
            linear.lora = None

    def _hand_to_layers(self, linears: Mapping[str, FrozenLinear]) -> None:
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
        parameter = nn.Parameter(self.view(self.parameters, name))
        parameter.grad = self.view(self.gradients, name)  # autograd adds into it in place
        return parameter


def _layout(adapter: Adapter) -> tuple[dict[str, tuple[int, tuple[int, int]]], int]:
    slices: dict[str, tuple[int, tuple[int, int]]] = {}
    start = 0
    for name in sorted(adapter.tensors):
        rows, columns = adapter.tensors[name].shape
        slices[name] = (start, (rows, columns))
        start += -(-rows * columns // ALIGNMENT) * ALIGNMENT
    return slices, start
