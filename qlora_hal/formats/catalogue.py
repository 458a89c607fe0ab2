"""Which weight formats there are: those of this distribution, and those of others under `qlora_hal.formats`.

An entry point gives one `FormatRecord` and has the record's name. It is imported here, in this process, as hooks are:
NumPy is all that it needs. One that cannot be imported, takes another's name or contradicts its own codec is refused by
name; whoever asks for it learns why, and the other formats go on.
"""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from qlora_hal.contract.capabilities import Capabilities
from qlora_hal.errors import BackendContractError, BackendNotFoundError
from qlora_hal.errors.foreign import told
from qlora_hal.formats.checking import contradictions
from qlora_hal.formats.four_bit import FP4, NF4
from qlora_hal.formats.gptq import GPTQ
from qlora_hal.formats.int8 import INT8
from qlora_hal.formats.microscaling import MICROSCALING
from qlora_hal.formats.mlx_affine import MLX_AFFINE
from qlora_hal.formats.record import LEVELS, CheckpointLayout, FormatRecord
from qlora_hal.formats.unquantized import UNQUANTIZED
from qlora_hal.model.packed_facts import Prequantized
from qlora_hal.processes.turns import alone_in_process

ENTRY_POINT_GROUP = "qlora_hal.formats"

BUILT_IN = (UNQUANTIZED, INT8, NF4, FP4, *GPTQ, *MLX_AFFINE, *MICROSCALING)
"""The records of this distribution, in the order in which they are listed."""

_OURS: Mapping[str, FormatRecord] = {record.name: record for record in BUILT_IN}
_NO_FORMATS = frozenset({"auto", *LEVELS})
"""What a user may write where a format may stand; `none` is a level and our own record."""


@dataclass(frozen=True, slots=True)
class ThirdParties:
    """The records that other distributions offer, and why some are refused, by name."""

    records: Mapping[str, FormatRecord] = field(default_factory=dict)
    refused: Mapping[str, BackendContractError] = field(default_factory=dict)


def records() -> tuple[FormatRecord, ...]:
    """All formats: ours, then those of other distributions by name."""
    return (*BUILT_IN, *third_parties().records.values())


def names() -> tuple[str, ...]:
    """The names of all formats, in the order of `records`."""
    return tuple(record.name for record in records())


def find_record(name: str) -> FormatRecord | None:
    """The record of a format, None where there is none. Raises BackendContractError QH-E80 for a refused one."""
    if name in _OURS:
        return _OURS[name]
    if name in third_parties().refused:
        raise third_parties().refused[name]
    return third_parties().records.get(name)


def record_of(name: str) -> FormatRecord:
    """The record of a format. Raises BackendNotFoundError QH-E82 where there is none, BackendContractError QH-E80 for
    one that is refused."""
    record = find_record(name)
    if record is None:
        close = difflib.get_close_matches(name, names(), n=1)
        raise BackendNotFoundError(
            "QH-E82",
            f"There is no weight format {str(name)!r}; known are {', '.join(names())}.",
            fix=f"Did you mean {close[0]}?" if close else "Install the package that has it.",
        )
    return record


def formats_of_level(level: str) -> frozenset[str]:
    """The names of the formats that a portable level is content with; none for what is no level."""
    return frozenset(record.name for record in records() if record.level == level)


def layout_of(stored: Prequantized) -> CheckpointLayout | None:
    """How a checkpoint that is quantized already holds its packed weights."""
    return record_of(stored.weight_format).layout_of(stored.method)


def layouts() -> Mapping[CheckpointLayout, tuple[FormatRecord, ...]]:
    """The layouts of checkpoints in the order in which they are tried, each with its formats."""
    grouped: dict[CheckpointLayout, tuple[FormatRecord, ...]] = {}
    for record in records():
        for layout in record.layouts:
            grouped[layout] = (*grouped.get(layout, ()), record)
    return grouped


def wrong_claims(capabilities: Capabilities) -> list[str]:
    """What a backend declares otherwise than the catalogue has it, one phrase each."""
    wrong: list[str] = []
    declared = {*capabilities.weight_formats, *capabilities.block_sizes, *capabilities.levels.values()}
    for name in sorted(declared | capabilities.calibrated_formats):
        try:
            record_of(name)
        except (BackendNotFoundError, BackendContractError) as error:
            wrong.append(error.message.rstrip("."))
    if wrong:
        return wrong
    for name, sizes in sorted(capabilities.block_sizes.items()):
        unknown = [size for size in sizes if size not in record_of(name).block_sizes]
        if unknown:
            known = ", ".join(map(str, record_of(name).block_sizes)) or "none"
            wrong.append(f"it declares blocks of {', '.join(map(str, unknown))} for {name}, which has {known}")
    for level, name in sorted(capabilities.levels.items()):
        if record_of(name).level != level:
            wrong.append(
                f"it maps the level {level} to {name}, whose level is {record_of(name).level or 'none of them'}"
            )
    return wrong


# other distributions --------------------------------------------------------------------------------------------------
@cache
def third_parties() -> ThirdParties:
    """Asked once in a process. Never raises."""
    offered: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        # An editable install beside a wheel lists the same entry point twice.
        offered.setdefault(point.name, {})[_distribution(point)] = point
    found: dict[str, FormatRecord] = {}
    refused: dict[str, BackendContractError] = {}
    for name, points in sorted(offered.items()):
        if len(points) > 1:
            refused[name] = _refusal(name, " and ".join(sorted(points)), "they offer the same name; uninstall one")
            continue
        ((distribution, point),) = points.items()
        loaded = _loaded(point)
        if isinstance(loaded, FormatRecord):
            found[name] = loaded
        else:
            refused[name] = _refusal(name, distribution, loaded)
    return ThirdParties(found, refused)


def _loaded(point: EntryPoint) -> FormatRecord | str:
    """The record of an entry point, or why it is refused."""
    if point.name in _NO_FORMATS or point.name in _OURS:
        return "the name is one of qlora-hal's own; give the format another name"
    try:
        with alone_in_process(), contextlib.redirect_stdout(io.StringIO()):  # stdout belongs to --json
            record = point.load()
            if not isinstance(record, FormatRecord):
                return f"{point.value} is a {type(record).__name__}, not a FormatRecord"
            if record.name != point.name:
                return f"its entry point says {point.name}, its record says {record.name!r}"
            return "; ".join(contradictions(record)) or record
    except (Exception, SystemExit) as error:
        return f"{point.value} cannot be used: {told(error)}"


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


def _refusal(name: str, distribution: str, reason: str) -> BackendContractError:
    return BackendContractError(
        "QH-E80",
        f"The weight format {name} of {distribution} is refused: {reason}.",
        fix=f"Update or uninstall {distribution}; for its author, docs/write_a_backend.md says what a record holds.",
        context={"format": name, "distribution": distribution},
    )
