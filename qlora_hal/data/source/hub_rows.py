"""Rows of the `datasets` library: a hub id, or a folder that `save_to_disk` wrote. No dataset script is ever run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from qlora_hal.data.source.row_files import missing_library, nested_columns, not_an_object, without_absent_keys
from qlora_hal.data.source.rows import Row, Source, digest_of_files, digest_of_values
from qlora_hal.errors import DataError, HubError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def could_be_id(name: str) -> bool:
    """Whether a name has the form of a dataset id."""
    return _ID.fullmatch(name) is not None


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` wrote this folder with `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def saved_source(folder: Path, split: str) -> Source:
    """The rows of a folder that `save_to_disk` wrote.

    Raises DataError (QH-D50 cannot be opened or no such split, QH-D51 missing library).
    """
    datasets = _library()
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises whatever a damaged file leads it to
        raise DataError(
            "QH-D50",
            f"The saved dataset {str(folder)!r} cannot be opened ({_first_line(error)}).",
            where="data.path",
            fix="Save it again with save_to_disk.",
        ) from error
    return dataset_source(str(folder), _split_of(loaded, split, str(folder)), split)


def hub_source(name: str, split: str, max_rows: int | None = None) -> Source:
    """The rows of a hub dataset, from the cache when offline. With `max_rows` only so many are fetched, each time they
    are read, and nothing is kept in the cache of `datasets`.

    Raises HubError (QH-E11, QH-D17), DataError (QH-D50 no dataset or no such split, QH-D51 missing library).
    """
    datasets = _library()
    _refuse_kind_of_file(name, datasets)
    if max_rows is not None and "[" in split:
        raise DataError(
            "QH-D50",
            f"The split {split!r} is cut out of the whole dataset, of which data.max_rows fetches only {max_rows}.",
            where="data.split",
            fix="Remove the brackets from data.split, or data.max_rows.",
        )
    try:
        loaded = datasets.load_dataset(name, split=split, streaming=max_rows is not None)
    except Exception as error:  # the library raises whatever a file leads it to
        raise _unreachable(name, split, error) from error
    return dataset_source(name, loaded if max_rows is None else loaded.take(max_rows), split)


def _refuse_kind_of_file(name: str, datasets: Any) -> None:
    """Raise DataError (QH-D50) for json, csv, text and the like: `datasets` would read every file of the working
    directory as one of that kind."""
    if name not in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", ()):
        return
    raise DataError(
        "QH-D50",
        f"There is no file or folder {name!r}; as a dataset, it is the name of a kind of file.",
        where="data.path",
        cause="Every file of the working directory would be read as one of that kind.",
        fix="Name the file itself, its folder, or a dataset as owner/name in data.path.",
    )


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise missing_library("datasets", "a Hugging Face dataset") from error
    return datasets


def _unreachable(name: str, split: str, error: Exception) -> HubError | DataError:
    text = f"{type(error).__name__} {error}"
    if "Unknown split" in text:
        return DataError(
            "QH-D50",
            f"The dataset {name!r} has no split {split!r} ({_first_line(error)}).",
            where="data.split",
            fix="Name one of its splits in data.split.",
        )
    if "DatasetGeneration" in text:
        return DataError(
            "QH-D04",
            f"The files of the dataset {name!r} cannot be read ({_first_line(error.__cause__ or error)}).",
            where=name,
            fix="Download the file that is meant, and name it in data.path.",
        )
    if constants.HF_HUB_OFFLINE or "Offline" in text or "ConnectionError" in text:
        return HubError(
            "QH-E11",
            f"The dataset {name!r} is not in the cache and the hub cannot be reached.",
            where="data.path",
            cause="HF_HUB_OFFLINE is set." if constants.HF_HUB_OFFLINE else _first_line(error),
            fix="Go online once to fill the cache, or name a local file in data.path.",
        )
    return HubError(
        "QH-D17",
        f"The dataset {name!r} is gone, gated, or needs a script that is not run ({_first_line(error)}).",
        where="data.path",
        fix="Run hf auth login if it is gated, or name a local file in data.path.",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _split_of(loaded: Any, split: str, name: str) -> Any:
    if not hasattr(loaded, "keys"):
        return loaded
    if split not in loaded:
        raise DataError(
            "QH-D50",
            f"The saved dataset {name!r} has no split {split!r}; it has {', '.join(loaded)}.",
            where="data.split",
            fix="Name one of them in data.split.",
        )
    return loaded[split]


def dataset_source(name: str, dataset: Any, split: str) -> Source:
    """The rows of what `datasets` loaded as `split`, which may cut rows out (`train[:10%]`)."""

    if dataset.features is None:  # of a stream they are known when the first rows have come
        dataset = dataset._resolve_features()
    nested = nested_columns(dataset.features.arrow_schema)

    def read() -> Iterator[Row]:
        for number, value in enumerate(_rows_of(dataset, name), start=1):
            is_row = isinstance(value, dict)
            found = without_absent_keys(value, nested) if is_row else not_an_object(value, number, name)
            yield Row(number, name, number, found)

    return Source(name, "dataset", read, _digest(dataset, name, split))


def _rows_of(dataset: Any, name: str) -> Iterator[Any]:
    rows, read = iter(dataset), 0
    while True:
        try:
            value = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the library raises whatever a damaged file leads it to
            raise DataError(
                "QH-D04",
                f"Row {read + 1} of the dataset cannot be read ({_first_line(error)}).",
                where=f"{name}:{read + 1}",
                fix="Download the dataset or write it again; it may be damaged.",
            ) from error
        read += 1
        yield value


def _digest(dataset: Any, name: str, split: str) -> Callable[[], str]:
    files = [Path(str(entry["filename"])) for entry in getattr(dataset, "cache_files", ())]
    # A cut, a selection or a filter would not show in the bytes of the files; then the rows themselves are hashed.
    if files and dataset._indices is None and "[" not in split:
        return lambda: digest_of_files(files)
    return lambda: digest_of_values(_rows_of(dataset, name))
