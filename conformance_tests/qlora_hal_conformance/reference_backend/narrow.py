"""The reference backend on devices that compute in one half-precision dtype alone: float16 or bfloat16."""

from __future__ import annotations

from dataclasses import replace

from qlora_hal.contract.backend import BackendSpec
from qlora_hal.contract.values import ComputeDtype

from . import SPEC, probe
from .trainer import ReferenceTrainer


def _of(dtype: ComputeDtype) -> BackendSpec:
    name = f"reference_{dtype}"
    return replace(
        SPEC,
        name=name,
        title=f"NumPy reference that computes in {dtype} alone",
        trainer=f"{__name__}:open_{dtype}",
        capabilities=replace(SPEC.capabilities, compute_dtypes=frozenset({dtype})),
        probe=lambda: replace(probe(), backend=name),
    )


BFLOAT16, FLOAT16 = _of("bfloat16"), _of("float16")


def open_bfloat16() -> ReferenceTrainer:
    return ReferenceTrainer(spec=BFLOAT16)


def open_float16() -> ReferenceTrainer:
    return ReferenceTrainer(spec=FLOAT16)
