"""Values that a template can write: those that JSON has a form for. A table also holds dates, decimals and bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qlora_hal.data.source.row_errors import field_fault, value_fault

if TYPE_CHECKING:
    from qlora_hal.data.source.rows import Row


def refuse_other_values(row: Row, value: object, field: str) -> None:
    """Raise DataError (QH-D03) with the place of a value that JSON has no form for."""
    if isinstance(value, Mapping):
        for key, held in value.items():
            if not isinstance(key, str):
                raise value_fault(row, field, key, "an object whose keys are strings")
            refuse_other_values(row, held, f"{field}.{key}")
    elif isinstance(value, list | tuple):
        for index, held in enumerate(value):
            refuse_other_values(row, held, f"{field}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise value_fault(row, field, value, "a finite number")
    elif not (value is None or isinstance(value, str | int)):
        raise field_fault(row, field, value, "text, a number, a list or an object")
