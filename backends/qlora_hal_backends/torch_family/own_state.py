"""What a program has set for all of torch does not reach what a trainer computes.

A notebook that begins with `torch.set_grad_enabled(False)`, a call inside `torch.autocast`, products that may be
rounded (`torch.set_float32_matmul_precision("medium")`), a default device: a run would end, or compute something else
than the same run in a program of its own, and than a resume of it in another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class _OnDevice(Protocol):
    _device: torch.device


_Trainer = TypeVar("_Trainer", bound=_OnDevice)


def in_own_state(
    method: Callable[Concatenate[_Trainer, _Arguments], _Result],
) -> Callable[Concatenate[_Trainer, _Arguments], _Result]:
    """A method of a trainer that computes as in a fresh process."""

    @wraps(method)
    def computed(self: _Trainer, /, *arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        with own_state(self._device):
            return method(self, *arguments, **named)

    return computed


@contextmanager
def own_state(device: torch.device) -> Iterator[None]:
    """torch as it is when a process starts, for this thread; the precision of products, which is the whole process's,
    is put back when the last trainer leaves."""
    with ExitStack() as state:
        state.enter_context(torch.inference_mode(False))
        state.enter_context(torch.enable_grad())
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                state.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            state.enter_context(torch.device("cpu"))
        state.enter_context(_FULL_PRECISION.kept())
        yield


class _FullPrecision:
    """Products of float32 in float32, while any trainer computes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._put_back: Callable[[], object] = _nothing

    @contextmanager
    def kept(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._put_back = _made_full()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._put_back()


def _made_full() -> Callable[[], object]:
    """Returns what puts back what was there."""
    try:
        found = torch.get_float32_matmul_precision()
    except RuntimeError:  # what was set by device since torch 2.9, the older call does not tell
        return _made_full_by_device()
    if found == "highest":
        return _nothing
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(found)


def _made_full_by_device() -> Callable[[], object]:
    backends: Any = torch.backends  # whose stubs lag behind
    products = (backends.cuda.matmul, backends.mkldnn.matmul)
    found = [each.fp32_precision for each in products]

    def put(precisions: list[str]) -> None:
        for each, precision in zip(products, precisions, strict=True):
            each.fp32_precision = precision

    put(["ieee"] * len(products))
    return lambda: put(found)


def _nothing() -> None:
    """Full precision was there."""


_FULL_PRECISION = _FullPrecision()
