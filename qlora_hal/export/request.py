"""What a merge is asked for, checked, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from qlora_hal.errors import ConfigError
from qlora_hal.formats.catalogue import names, records

BaseChoice = Literal["auto", "dequantized", "original"]
OutputDtype = Literal["bfloat16", "float16", "float32"]
DEFAULT_ROW_LIMIT = 64


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """One call of merge.

    `target` is a run's folder or an adapter's, `out` a folder that is not there yet. `rows` names a data file to
    compare on. `weight_format` and `double_quant` say how the base was stored in training, for an adapter that does
    not record it. `max_kl` (nats per token) and `min_top1` (0 to 1) replace the limits that are derived from rounding.
    """

    target: Path
    out: Path
    model: str | None = None
    base: str = "auto"
    dtype: str = "bfloat16"
    requantize: str | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    rows: str | None = None
    row_limit: int = DEFAULT_ROW_LIMIT
    weight_format: str | None = None
    double_quant: bool | None = None
    backend: str = "auto"
    allow_base_mismatch: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class MergeResult:
    """A finished merge. `kl` is in nats per token, of the adapter model to the merged one; `top1` the share of tokens
    on which both name the same most likely token; `record` is the content of merge.json."""

    path: Path
    base: str
    dtype: str
    kl: float
    top1: float
    max_kl: float
    min_top1: float
    compared_tokens: int
    record: Mapping[str, object]
    notes: tuple[str, ...] = ()


def requantized_formats() -> tuple[str, ...]:
    """What a merged model can be brought into: by the core itself, or by a backend that calibrates."""
    return tuple(record.name for record in records() if record.writer is not None or record.calibrated)


def check_request(request: MergeRequest) -> None:
    """Raises ConfigError QH-C62 naming every value that cannot be served."""
    wrong = [
        f"{name} is {value!r} (one of {', '.join(known)})"
        for name, value, known in (
            ("base", request.base, get_args(BaseChoice)),
            ("dtype", request.dtype, get_args(OutputDtype)),
            ("requantize", request.requantize, requantized_formats()),
            ("weight_format", request.weight_format, names()),
        )
        if value is not None and value not in known
    ]
    if request.max_kl is not None and not (_is_number(request.max_kl) and 0 <= request.max_kl < math.inf):
        wrong.append(f"max_kl is {request.max_kl!r} (nats per token, 0 or more)")
    if request.min_top1 is not None and not (_is_number(request.min_top1) and 0 <= request.min_top1 <= 1):
        wrong.append(f"min_top1 is {request.min_top1!r} (a share from 0 to 1)")
    if not isinstance(request.row_limit, int) or isinstance(request.row_limit, bool) or request.row_limit < 1:
        wrong.append(f"row_limit is {request.row_limit!r} (a whole number, 1 or more)")
    if not isinstance(request.double_quant, bool | None):
        wrong.append(f"double_quant is {request.double_quant!r} (true or false)")
    if wrong:
        raise ConfigError(
            "QH-C62",
            f"This merge is not possible: {'; '.join(wrong)}.",
            where="merge",
            fix="Use one of the values named.",
            context={"wrong": wrong},
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
