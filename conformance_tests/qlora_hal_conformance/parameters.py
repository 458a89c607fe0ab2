"""Parameters of cases. Each carries what it needs, so an undeclared one must be refused and none is left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from _pytest.mark.structures import ParameterSet

from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.formats.catalogue import BUILT_IN
from qlora_hal_conformance.fixtures import Opened
from qlora_hal_conformance.random_inputs import PACKINGS
from qlora_hal_oracle import FourBitCodec, OracleTrainer

OracleOf = Callable[[Opened], OracleTrainer]
"""The fixture `oracle`."""

DTYPES = ("float32", "float16", "bfloat16")
HALF_DTYPES = ("float16", "bfloat16")
FORMATS = tuple(record.weight_format for record in BUILT_IN)
"""What every run has cases of. A format of another distribution is judged by one case, where a backend declares it."""
PACKED_FORMATS = tuple(record.weight_format for record in BUILT_IN if record.layout is not None)
FOUR_BIT_FORMATS = tuple(record.weight_format for record in BUILT_IN if isinstance(record.codec, FourBitCodec))
ADAPTER_SCALES = {
    "alpha_over_r": (False, 8),
    "alpha_over_root_r-3": (True, 3),
    "alpha_over_root_r-8": (True, 8),
    "alpha_over_root_r-32": (True, 32),
}
"""Whether the scale is rank-stabilized, and the rank."""
TRIED_BLOCK_SIZES = (16, 32, 64, 128, 256, 4096)
"""A backend may declare more."""


def each_format(*formats: WeightFormat, also: tuple[Feature, ...] = ()) -> list[ParameterSet]:
    """One parameter for each weight format, by default all."""
    chosen = formats or FORMATS
    return [pytest.param(f, id=f.value, marks=pytest.mark.needs(f, *also)) for f in chosen]


def each_dtype(*dtypes: str) -> list[ParameterSet]:
    """One parameter for each compute dtype, by default all."""
    return [pytest.param(dtype, id=dtype, marks=pytest.mark.needs(dtype)) for dtype in dtypes or DTYPES]


in_each_dtype = pytest.mark.parametrize("main_dtype", each_dtype(), indirect=True)
"""The case once in each compute dtype: every trainer it opens computes in that one, unless it asks for another. So what
`auto` takes on a device, float32 or a half-precision dtype, is judged by its own name."""


def each_format_and_dtype() -> list[ParameterSet]:
    """Every weight format in every compute dtype."""
    return [
        pytest.param(f, dtype, id=f"{f.value}-{dtype}", marks=pytest.mark.needs(f, dtype))
        for f in FORMATS
        for dtype in DTYPES
    ]


def each_packing(*names: str) -> list[ParameterSet]:
    """Rows of packed samples by the lengths of their samples, by default all."""
    return [pytest.param(PACKINGS[name], id=name) for name in names or PACKINGS]


def each_block_size() -> list[ParameterSet]:
    """Every format that has blocks, and is not calibrated, with each size."""
    return [
        pytest.param(f, size, id=f"{f.value}-{size}", marks=pytest.mark.needs((f, size)))
        for f, sizes in ((record.weight_format, record.block_sizes) for record in BUILT_IN if not record.calibrated)
        for size in TRIED_BLOCK_SIZES
        if size in sizes
    ]
