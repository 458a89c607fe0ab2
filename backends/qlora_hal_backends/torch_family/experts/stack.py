"""One projection of all experts of a block: packed weights, and the adapter once one is attached."""

from __future__ import annotations

from torch import Tensor

from qlora_hal.contract.values import LinearShape
from qlora_hal_backends.torch_family.experts.products import FrozenStackProduct, Groups, Products, StackProduct
from qlora_hal_backends.torch_family.experts.stacked_weights import StackedWeight
from qlora_hal_backends.torch_family.lora_linear import LoRAWeights


class ExpertStack:
    """`x_e W_e^T` for each expert e and its rows. `name` is the path of the stack in the core
    (`qlora_hal.model.expert_stacks`), which is not that of transformers' module."""

    def __init__(self, name: str, shape: LinearShape) -> None:
        self.name = name
        self.shape = shape
        self.base: StackedWeight | None = None
        self.lora: LoRAWeights | None = None

    @property
    def in_features(self) -> int:
        return self.shape.inputs

    def rows(self, rows: Tensor, groups: Groups, products: Products) -> Tensor:
        """`[rows, in]`, sorted by expert, to `[rows, out]`."""
        assert self.base is not None, "the weights are not loaded"
        lora = self.lora
        if lora is None or not lora.switches.enabled:
            y: Tensor = FrozenStackProduct.apply(rows, self.base, groups, products)  # type: ignore[no-untyped-call]
        else:
            y = StackProduct.apply(rows, lora.a, lora.b, self.base, lora, groups, products)  # type: ignore[no-untyped-call]
        return y
