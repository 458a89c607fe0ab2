"""Parameters of cases. Each carries what it needs, so an undeclared one must be refused and none is left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from _pytest.mark.structures import ParameterSet

from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal_conformance.opening import Opened
from qlora_hal_oracle import MicroscalingFormat, OracleTrainer
from qlora_hal_oracle.random_models import AFFINE_BITS, MICROSCALING_FORMATS

OracleOf = Callable[[Opened], OracleTrainer]
"""The fixture `oracle`."""

DTYPES = ("float32", "float16", "bfloat16")
HALF_DTYPES = ("float16", "bfloat16")
FOUR_BIT_FORMATS = (WeightFormat.NF4, WeightFormat.FP4)
AFFINE_FORMATS = tuple(AFFINE_BITS)
GROUPED_FORMATS = (*AFFINE_FORMATS, *MICROSCALING_FORMATS, WeightFormat.INT4_GPTQ)
"""Their groups lie within rows, and must divide them."""
BLOCK_SIZES = {
    **dict.fromkeys(FOUR_BIT_FORMATS, (32, 64, 128, 256, 4096)),
    **dict.fromkeys(AFFINE_FORMATS, (32, 64, 128)),
    **{f: (MicroscalingFormat(f.value).group_size,) for f in MICROSCALING_FORMATS},
}
"""The sizes that are tried; a backend may declare more."""


def each_format(*formats: WeightFormat, also: tuple[Feature, ...] = ()) -> list[ParameterSet]:
    """One parameter for each weight format, by default all."""
    chosen = formats or tuple(WeightFormat)
    return [pytest.param(f, id=f.value, marks=pytest.mark.needs(f, *also)) for f in chosen]


def each_dtype(*dtypes: str) -> list[ParameterSet]:
    """One parameter for each compute dtype, by default all."""
    return [pytest.param(dtype, id=dtype, marks=pytest.mark.needs(dtype)) for dtype in dtypes or DTYPES]


def each_format_and_dtype() -> list[ParameterSet]:
    """Every weight format in every compute dtype."""
    return [
        pytest.param(f, dtype, id=f"{f.value}-{dtype}", marks=pytest.mark.needs(f, dtype))
        for f in WeightFormat
        for dtype in DTYPES
    ]


def each_block_size() -> list[ParameterSet]:
    """Every format that has blocks with each size."""
    return [
        pytest.param(f, size, id=f"{f.value}-{size}", marks=pytest.mark.needs((f, size)))
        for f, sizes in BLOCK_SIZES.items()
        for size in sizes
    ]
