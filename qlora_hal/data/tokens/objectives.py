"""Columns whose meaning is another objective than the next token of every answer: refused until there is training for
them. A rejected answer must not be trained as an answer, nor a preferred one without what it was preferred to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from qlora_hal.data.source.row_errors import shown, value_fault
from qlora_hal.errors import DataError

if TYPE_CHECKING:
    from qlora_hal.data.source.rows import Row

_COMPARED = frozenset(
    f"{which}{what}"
    for which in ("chosen", "rejected", "score_chosen", "score_rejected")
    for what in (
        "",
        "_response",
        "_responses",
        "_messages",
        "_answer",
        "_output",
        "_score",
        "_rating",
        "_conversations",
    )
) | {"winner", "kto_tag", "desirable", "is_desirable", "undesirable", "preferred", "dispreferred"}
TRAINED_IF = ("weight", "loss_weight", "loss_scale", "loss", "loss_mask", "train", "training", "trainable")
"""Fields that say whether a turn, or a row, is trained: 1 if so."""

UNTRAINED_IF = ("masked",)
"""Fields that say the opposite: 0 if it is trained."""

UNCLEAR = ("mask", "train_detail", "training_detail", "train_details", "training_details")
"""Fields of which some mean the one and some the other."""

PICTURES = frozenset({"image", "images", "video", "videos", "audio", "audios"})
_ROW_WEIGHTS = frozenset({*TRAINED_IF, "sample_weight", "example_weight"})
_RENDERING = frozenset({"chat_template_kwargs"})
_WATCHED = _COMPARED.union(_ROW_WEIGHTS, UNTRAINED_IF, UNCLEAR, PICTURES, _RENDERING, {"label"})
# A CSV holds text alone.
_YES: Collection[object] = (1, "1", "1.0", "true", "True")
_NO: Collection[object] = (0, "0", "0.0", "false", "False")


def refuse_other_objective(row: Row, value: Mapping[str, object], *, is_text: bool) -> None:
    """Raise DataError (QH-D03) for a row that asks for more than its answers to be trained; `is_text` says that it is
    one text, where a label is a class."""
    if _WATCHED.isdisjoint(value):
        return
    held = {name: value[name] for name in value if name in _WATCHED and value[name] not in (None, "", [], {})}
    if compared := sorted(held.keys() & _COMPARED):
        raise _is_preference(row, compared)
    if "label" in held and not is_text and held["label"] in (True, False, "true", "false", "True", "False"):
        raise _is_preference(row, ["label"])
    _refuse_weights(row, held)
    for name in sorted(held.keys() & PICTURES):
        raise value_fault(row, name, held[name], "a row of text alone", "Remove the column to train on the text alone.")
    for name in sorted(held.keys() & _RENDERING):
        fix = (
            "Remove the column, or set the same variables in a template of your own and name it in data.chat_template."
        )
        raise value_fault(row, name, held[name], "the template's own variables alone", fix)


def _refuse_weights(row: Row, held: Mapping[str, object]) -> None:
    """Raise DataError (QH-D03) for columns by which a row asks for another weight than every row has."""
    fix = "Remove rows of weight 0, and repeat those of a higher one; or rename the column if it is not a weight."
    for name in sorted(held.keys() & _ROW_WEIGHTS):
        # A loss that is no flag was measured: a column like any other that is not read.
        if held[name] not in _YES and (name != "loss" or held[name] in _NO) and not _are_rows(held[name]):
            raise value_fault(row, name, held[name], "1, the weight that every row has,", fix)
    for name in sorted(held.keys() & {*UNTRAINED_IF, *UNCLEAR}):
        if held[name] not in _NO and (name in UNTRAINED_IF or held[name] in _YES):
            fix = "Remove rows that are not to be trained; or rename the column if it means something else."
            raise value_fault(row, name, held[name], "0, for every row is trained,", fix)


def _are_rows(value: object) -> bool:
    """Whether it is a list of rows, as of a split that is called `train`, and no flag."""
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def refuse_compared_turn(row: Row, turn: Mapping[str, object], field: str) -> None:
    """Raise DataError (QH-D03) for a turn that carries the answers of a comparison beside its own."""
    if compared := [name for name in turn if name in _COMPARED and turn[name] not in (None, "", [], {})]:
        raise _is_preference(row, [f"{field}.{name}" for name in sorted(compared)])


def _is_preference(row: Row, names: Collection[str]) -> DataError:
    return DataError(
        "QH-D03",
        f"The row compares answers ({', '.join(map(shown, names))}), which is preference training; "
        "plain answers were expected.",
        where=row.where,
        cause="Trained this way, a rejected answer would be learned like a chosen one.",
        fix="Keep the answers that were chosen as messages, or as prompt and completion, and remove these columns.",
        context={"row": row.number, "fields": list(names)},
    )
