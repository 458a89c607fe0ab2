"""The fast step on a GPU: decoder layers scheduled by hand, with few passes over memory and no lost adapter digits.

`try_attach` gives a `FusedBody` for the architectures in `supported`, or a `Refusal` with its reason; then
transformers' own layers compute. Both paths are one function: they differ by rounding.
"""

from qlora_hal_backends.torch_family.fused.attach import Refusal, try_attach
from qlora_hal_backends.torch_family.fused.body import FusedBody

__all__ = ["FusedBody", "Refusal", "try_attach"]
