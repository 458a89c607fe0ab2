"""MXFP4 (OCP Microscaling Formats 1.0) in torch: 4-bit floats, one power of two to 32 of a row.

Packed bytes are those that checkpoints have, in MLX's folders as in gpt-oss's: the first number of a pair is in the low
four bits. `qlora_hal_oracle.microscaling` says what they mean; the same is computed here, exactly, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import inf

import torch
from torch import Tensor

from qlora_hal_backends.torch_family.device import device_refusal

GROUP_SIZE = 32
NO_NUMBER = 255
"""The scale that stands for NaN."""
LARGEST = 6.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SMALLEST_SCALE_BITS = 1 << 22
"""2^-127 as a float32: the scale 0, which is below the normal numbers."""


@dataclass(slots=True)
class Mxfp4Weight:
    """Codes `[out, in / 2]` and scales `[out, in / 32]`, both bytes."""

    packed: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], 2 * self.packed.shape[1]

    def dense(self) -> Tensor:
        return decoded(self.packed, self.scales, self.dtype)


def decoded(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers `[..., in]` of codes `[..., in / 2]` and scales `[..., in / 32]`."""
    return proved_decoder(packed.device).decode(packed, scales, dtype)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A way to compute `decoded`; `words` say which, for the run's `kernel_path`. `needs_room`: what stands between
    takes more memory than the numbers."""

    decode: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    words: str
    needs_room: bool = True


@cache
def proved_decoder(device: torch.device) -> Decoder:
    """One kernel where the device has Triton and computes with it what torch does, bit for bit; elsewhere torch."""
    reason = device_refusal(device)
    if reason is None:
        try:
            from qlora_hal_backends.torch_family import microscaling_kernel

            if decoder_agrees(microscaling_kernel.decoded, device):
                return Decoder(microscaling_kernel.decoded, "MXFP4 by one kernel", needs_room=False)
            reason = "the kernel computed something else"
        except Exception as error:  # Triton compiles here and now: a missing C compiler or driver shows in many classes
            reason = f"the kernel does not run here: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return Decoder(decoded_by_torch, f"MXFP4 by torch ({reason})")


def decoder_agrees(decode: Callable[[Tensor, Tensor, torch.dtype], Tensor], device: torch.device) -> bool:
    """On every byte of codes, and scales from the smallest to those at which 16 bits still hold every number."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(126).view(3, 42, 256).to(device)
    scales = torch.arange(2016, dtype=torch.int32).remainder(251).to(torch.uint8).view(3, 42, 16).to(device)
    return all(
        torch.equal(decode(packed, of_dtype, dtype), decoded_by_torch(packed, of_dtype, dtype))
        # Triton's interpreter loses numbers below bfloat16's normal ones.
        for dtype, of_dtype in ((torch.float32, scales), (torch.bfloat16, scales.clamp_min(2)))
    )


def decoded_by_torch(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """See `decoded`: a table of the two numbers of each byte."""
    pairs = torch.nn.functional.embedding(packed.int(), _pairs(dtype, packed.device))
    numbers = pairs.view(*scales.shape, GROUP_SIZE)
    return numbers.mul_(_powers_of_two(scales)[..., None]).view(*packed.shape[:-1], 2 * packed.shape[-1])


def encoded(weight: Tensor, dtype: torch.dtype) -> Mxfp4Weight:
    """Pack a `[out, in]` weight: the smallest power of two that cuts no number off, then the nearest codes, ties to the
    even one. Groups must divide the rows."""
    groups = weight.float().view(weight.shape[0], -1, GROUP_SIZE)
    largest = groups.abs().amax(dim=-1)
    mantissa, exponent = torch.frexp(largest / LARGEST)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    scales = torch.where(largest > 0, exponent + 127, 0).clamp(0, NO_NUMBER - 1).to(torch.uint8)
    ratios = groups / _powers_of_two(scales)[..., None]
    codes = torch.bucketize(ratios.abs(), _boundaries(ratios.device))
    codes += 8 * ((ratios < 0) & (codes > 0))
    codes = codes.to(torch.uint8).view(weight.shape[0], -1, 2)
    return Mxfp4Weight(codes[..., 0] | codes[..., 1] << 4, scales, dtype)


def _powers_of_two(scales: Tensor) -> Tensor:
    """2^(scale - 127) in float32, made of its bits: what a device's own power function gives near the smallest numbers
    is its own affair."""
    bits = torch.where(scales == 0, _SMALLEST_SCALE_BITS, scales.int() << 23)
    return bits.view(torch.float32)


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two numbers `[256, 2]` of each byte."""
    numbers = torch.tensor([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)], dtype=dtype)
    codes = torch.arange(256)
    return torch.stack((numbers[codes & 15], numbers[codes >> 4]), dim=1).to(device)


@cache
def _boundaries(device: torch.device) -> Tensor:
    """What a magnitude must be above for the next code. Halfway to an even code it is above."""
    middles = [(low + high) / 2 for low, high in pairwise(_MAGNITUDES)]
    halfway = torch.tensor(middles, dtype=torch.float32)
    below = torch.nextafter(halfway, torch.tensor(-inf))
    is_to_even = torch.arange(1, len(_MAGNITUDES)) % 2 == 0
    return torch.where(is_to_even, below, halfway).to(device)
