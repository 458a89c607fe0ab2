"""A report file replaced so that a crash leaves either the old or the new content, never a mixture."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from qlora_hal.files.durable import flush_folder, storage_error, unique_name, write_new


def replace_file(path: Path, content: bytes) -> None:
    """Write beside the target, flush, rename over it. Raises StorageError (S09, S11, S12)."""
    temporary = path.with_name(f".tmp-{path.name}-{unique_name()}")
    try:
        write_new(temporary, [content])
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path, what=path.name, needed_bytes=len(content)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
