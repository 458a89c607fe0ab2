"""Which files of a folder belong to which split, by their names: `train.jsonl`, `test/a.csv`, `dev-00000.parquet`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from qlora_hal.errors import DataError

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Words for a split, and its usual name."""
_LISTED_FILES = 10


def split_names(folder: Path, files: Sequence[Path]) -> tuple[str, ...]:
    """The splits that the files show; none where all are of one kind, so that there is nothing to tell apart."""
    kinds = {_split_of(file.relative_to(folder)) for file in files}
    return tuple(sorted(kinds - {""} if len(kinds) > 1 else ()))


def files_of_split(folder: Path, files: Sequence[Path], split: str) -> tuple[list[Path], str]:
    """(the files of `split`, what to tell the user of it). Without a file named for training, unnamed ones are that.

    Raises DataError (QH-D50) where the folder has splits, and not this one.
    """
    names = split_names(folder, files)
    if not names:
        return list(files), ""
    wanted = SPLIT_WORDS.get(split, split)
    unnamed = "" if wanted == "train" and "train" not in names else wanted
    chosen = [file for file in files if _split_of(file.relative_to(folder)) in (wanted, unnamed)]
    if not chosen:
        raise DataError(
            "QH-D50",
            f"The folder {str(folder)!r} has no file of split {split!r}; by their names it has {', '.join(names)}.",
            where="data.split",
            fix="Name one of them in data.split.",
        )
    others = [file for file in files if file not in chosen]
    return chosen, f"{folder}: of split {wanted} are {listed(folder, chosen)}; not read: {listed(folder, others)}"


def listed(folder: Path, files: Sequence[Path]) -> str:
    """The files' places below the folder, the first of them by name."""
    shown = ", ".join(str(file.relative_to(folder)) for file in files[:_LISTED_FILES])
    more = len(files) - _LISTED_FILES
    return f"{shown} and {more} more" if more > 0 else shown


def _split_of(file: Path) -> str:
    """The split that a name shows, the file's before its folders'; empty where none does."""
    words = (word for part in reversed(file.with_suffix("").parts) for word in re.split("[^a-z]+", part.lower()))
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")
