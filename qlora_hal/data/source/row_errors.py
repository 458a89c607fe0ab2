"""What is told of a row that cannot be read as it is: the field, what it holds, what was expected."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qlora_hal.data.source.row_files import type_name
from qlora_hal.errors import DataError

if TYPE_CHECKING:
    from qlora_hal.data.source.rows import Row

_SHOWN_CHARACTERS = 60


class Missing:
    """Stands for a key that a row does not have."""


MISSING = Missing()

_CORRECT_OR_SKIP = "Correct the row, or set data.on_bad_row to skip, which skips such rows and counts them."


def field_fault(row: Row, field: str, got: object, wanted: str) -> DataError:
    """The error for a field of the wrong kind (QH-D03): told by its type, which is what is wrong with it."""
    return _fault(row, field, _kind_of(got), wanted)


def value_fault(row: Row, field: str, got: object, wanted: str, fix: str = _CORRECT_OR_SKIP) -> DataError:
    """The error for a field of the right kind that holds what cannot be used (QH-D03): told by its value."""
    held = _kind_of(got) if got is MISSING or got is None else shown(got)
    return _fault(row, field, held, wanted, fix)


def _fault(row: Row, field: str, held: str, wanted: str, fix: str = _CORRECT_OR_SKIP) -> DataError:
    return DataError(
        "QH-D03",
        f"The field {_named(row, field)} holds {held}; {wanted} was expected.",
        where=row.where,
        fix=fix,
        context={"field": field, "row": row.number},
    )


def _named(row: Row, field: str) -> str:
    """A field by its name in a format, and by the user's own where that is another one."""
    column = row.columns.get(re.split(r"[.\[]", field, maxsplit=1)[0])
    return field if column is None else f"{field} (column {shown(column)})"


def _kind_of(value: object) -> str:
    if value is MISSING:
        return "nothing (the key is missing)"
    return "an empty list" if isinstance(value, list | tuple) and not value else type_name(value)


def shown(value: object) -> str:
    """A value as a message can hold it: in quotes where it is text, without control characters, and short."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
