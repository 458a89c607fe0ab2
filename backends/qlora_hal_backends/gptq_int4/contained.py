"""Importing a library that changes its surroundings, and putting the surroundings back.

gptqmodel 7.6 sets environment variables (among them HF_HOME and PYTORCH_ALLOC_CONF), replaces functions of
transformers, accelerate and safetensors, installs log handlers and warning filters, and prints a banner. A process
that has trained with this backend must compute what it would have computed without it, so all of that is undone.
What stays: its modules, and two idle threads of its logger.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

PATCHED = (
    "accelerate.utils.modeling",
    "safetensors.torch",
    "transformers.generation.utils",
    "transformers.integrations",
    "transformers.integrations.hub_kernels",
    "transformers.modeling_rope_utils",
    "transformers.modeling_utils",
    "transformers.quantizers.auto",
    "transformers.quantizers.quantizer_gptq",
)
"""Modules whose functions, classes or tables gptqmodel 7.6 or what it imports changes. Only these are compared before
and after: transformers' lazy modules fill in their own tables whenever they are used."""

PLANTED = ("causal_conv1d",)
"""Modules that gptqmodel puts under another package's name."""

Snapshot = list[tuple[object, dict[str, object]]]


@contextmanager
def surroundings_kept() -> Iterator[None]:
    """Undo what the imports inside do to the process. Nothing is printed or logged meanwhile."""
    environment, path, filters = dict(os.environ), list(sys.path), list(warnings.filters)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    planted = [name for name in PLANTED if name not in sys.modules]
    with _quiet():
        before = _snapshot()
        try:
            yield
        finally:
            _restore(before)
            for name in planted:
                sys.modules.pop(name, None)
            root.handlers[:] = handlers
            root.setLevel(level)
            sys.path[:] = path
            os.environ.clear()
            os.environ.update(environment)
    warnings.filters[:] = filters  # type: ignore[index]  # a list that is typed as a sequence


@contextmanager
def _quiet() -> Iterator[None]:
    """Handlers that libraries made before write past a redirection, so logging is off too."""
    disabled, said = logging.root.manager.disable, io.StringIO()
    logging.disable()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _snapshot() -> Snapshot:
    """Every patched module, its own classes and its tables, each with what it holds now."""
    held: Snapshot = []
    for name in PATCHED:
        module = importlib.import_module(name)
        values = dict(vars(module))
        held.append((module, values))
        for key, value in values.items():
            if isinstance(value, type) and value.__module__ == name:
                held.append((value, dict(vars(value))))
            elif isinstance(value, dict) and key.isupper():
                held.append((value, dict(value)))
    return held


def _restore(before: Snapshot) -> None:
    for owner, values in before:
        if isinstance(owner, dict):
            if owner.keys() != values.keys():
                owner.clear()
                owner.update(values)
            continue
        now = vars(owner)
        for key in [key for key, value in values.items() if key in now and now[key] is not value]:
            # What the interpreter itself fills in later (a class's cached `__doc__`, an annotations table) is no patch.
            if not key.startswith("__"):
                setattr(owner, key, values[key])
