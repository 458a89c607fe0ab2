"""The routed experts of a mixture, in the place of transformers' own module for them: packed stacks, products over the
experts that have tokens, an adapter for each expert."""

from qlora_hal_backends.torch_family.experts.block import RoutedExperts, TiesByNumber, place_experts
from qlora_hal_backends.torch_family.experts.products import GroupedProducts, Products, proved_products
from qlora_hal_backends.torch_family.experts.reading import pack_experts
from qlora_hal_backends.torch_family.experts.stack import ExpertStack
from qlora_hal_backends.torch_family.experts.stored import ExpertNames

__all__ = [
    "ExpertNames",
    "ExpertStack",
    "GroupedProducts",
    "Products",
    "RoutedExperts",
    "TiesByNumber",
    "pack_experts",
    "place_experts",
    "proved_products",
]
