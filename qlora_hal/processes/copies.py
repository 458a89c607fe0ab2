"""Whether this process is a copy (fork) of one that computed with a model.

Of a process that is copied one thread lives on. What torch, MLX and the tokenizer library computed with waits in the
copy for threads that are gone: for ever, and without a word. Devices refuse a copy as well.
"""

from __future__ import annotations

import os

from qlora_hal.errors import BackendError

_computed_in: set[int] = set()
"""The process that has opened a trainer; after a fork, the one that this one is a copy of."""


def computes() -> None:
    """From now on copies of this process cannot compute."""
    _computed_in.add(os.getpid())


def refuse_in_copy() -> None:
    """Raises BackendError QH-E67 in a copy of a process that computed."""
    if _computed_in - {os.getpid()}:
        raise BackendError(
            "QH-E67",
            "This process is a copy (fork) of one that has opened a model; what computed there waits here for threads "
            "that were not copied.",
            cause="multiprocessing copies the process by default on Linux up to Python 3.13.",
            fix='Start it anew instead: multiprocessing.get_context("spawn").',
        )
