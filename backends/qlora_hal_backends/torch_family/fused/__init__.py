"""The fast step on a GPU: decoder layers scheduled by hand, with few passes over memory and no lost adapter digits.

`try_attach` gives a `FusedBody` for the architectures in `supported`, or a `Refusal` with its reason; then
transformers' own layers compute. Both paths are one function: they differ by rounding.
"""

from qlora_hal_backends.torch_family.fused.attach import Refusal, try_attach
from qlora_hal_backends.torch_family.fused.body import FusedBody
from qlora_hal_backends.torch_family.fused.fp8.refusals import check_fp8, fp8_refused

__all__ = ["FusedBody", "Refusal", "check_fp8", "fp8_refused", "try_attach"]
