"""Which compute dtypes a device really has, found by computing."""

from __future__ import annotations

import torch

from qlora_hal_backends.torch_family.platform import TorchPlatform


def proved_dtypes(platform: TorchPlatform, device: torch.device) -> tuple[str, ...]:
    """The platform's dtypes that a product on this device computes within its own rounding, best first.

    A product of k = 64 terms rounded once is within u of the exact one, u = 2^-8 (bfloat16), 2^-11 (float16); float32
    accumulation adds 64 * 2^-24. Twice that is allowed.
    """
    return tuple(name for name in platform.preferred_dtypes if _computes(name, device))


def _computes(name: str, device: torch.device) -> bool:
    dtype: torch.dtype = getattr(torch, name)
    if (
        dtype is torch.bfloat16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return False  # emulated: right numbers, at a fraction of the speed
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.rand(64, 64, generator=generator).to(dtype) for _ in range(2))
    exact = left.double() @ right.double()
    try:
        found = (left.to(device) @ right.to(device)).cpu().double()
    except RuntimeError:
        return False
    unit_roundoff = torch.finfo(dtype).eps / 2
    return bool(((found - exact).abs() <= 2 * (unit_roundoff + 64 * 2**-24) * exact.abs()).all())
