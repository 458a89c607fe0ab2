"""QLoRA fine-tuning with one call on NVIDIA, AMD, Apple and CPU; each backend proved by one conformance suite.

Names are loaded on first use: `import qlora_hal` costs milliseconds and imports no tensor library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_hal.api import backends, load, merge, push, resume, train
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.errors import QloraHalError
    from qlora_hal.export.publishing import PushResult
    from qlora_hal.export.request import MergeResult
    from qlora_hal.hooks import Control, hookimpl
    from qlora_hal.inference.loaded_model import LoadedModel
    from qlora_hal.run.result import TrainResult

__version__ = "0.2.0"
__all__ = [
    "Control",
    "LoadedModel",
    "MergeResult",
    "PushResult",
    "QloraHalError",
    "RunConfig",
    "TrainResult",
    "__version__",
    "backends",
    "hookimpl",
    "load",
    "merge",
    "push",
    "resume",
    "train",
]

_HOME = {
    "train": "qlora_hal.api",
    "resume": "qlora_hal.api",
    "merge": "qlora_hal.api",
    "push": "qlora_hal.api",
    "load": "qlora_hal.api",
    "backends": "qlora_hal.api",
    "Control": "qlora_hal.hooks",
    "hookimpl": "qlora_hal.hooks",
    "LoadedModel": "qlora_hal.inference.loaded_model",
    "RunConfig": "qlora_hal.config.schema",
    "QloraHalError": "qlora_hal.errors",
    "MergeResult": "qlora_hal.export.request",
    "PushResult": "qlora_hal.export.publishing",
    "TrainResult": "qlora_hal.run.result",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
