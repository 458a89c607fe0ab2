"""How many operations a training step of a mixture asks a device for, layer by layer: transformers' layers with our
linear layers and experts, and the fused schedule. Counted on a CPU; nothing is timed.

    PYTHONPATH=.:backends python benchmarks/moe_launches.py

A step is a forward and a backward pass in bfloat16, NF4 with double quantization, r = 16, experts by grouped products.
What is counted is what torch dispatches, but for views and allocations, which launch nothing. Where a GPU has a kernel
of ours (`fused.operations`, `fused.mixture.operations`), plain torch computes here and one is counted. A layer is the
difference between models of four layers and of two, halved. A GPU launches more for a few of both sides: two for a
grouped product, several for a sort.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from moe_step import ALPHA, QUANTIZATION, RANK, SHAPES, drawn_base, drawn_source
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_hal.adapter import initial_adapter, resolve_targets
from qlora_hal.contract.backend import Compute
from qlora_hal.contract.values import AdapterConfig, Batch
from qlora_hal_backends.torch_family import step
from qlora_hal_backends.torch_family.experts import GroupedProducts
from qlora_hal_backends.torch_family.flat_adapter import FlatAdapter
from qlora_hal_backends.torch_family.fused.attach import attach_with
from qlora_hal_backends.torch_family.fused.mixture.operations import MixtureOperations
from qlora_hal_backends.torch_family.fused.mixture.reference import ReferenceMixture
from qlora_hal_backends.torch_family.fused.operations import Operations
from qlora_hal_backends.torch_family.fused.reference import ReferenceOperations

ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"})
ROWS, LENGTH = 4, 32


class Launches(TorchDispatchMode):
    """Counts while it is entered, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        self._is_inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._is_inside and not _launches_nothing(func):
            self.counted[str(func.overloadpacket.__name__)] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def as_one(self, name: str) -> Iterator[None]:
        """What is dispatched inside is one kernel on a GPU."""
        self.counted[name] += 1
        self._is_inside = True
        try:
            yield
        finally:
            self._is_inside = False


def _launches_nothing(func: Any) -> bool:
    is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
    return is_view or func.overloadpacket.__name__ in ALLOCATIONS


class AsKernels:
    """A set of operations in plain torch, each counted as the one kernel that it is on a GPU."""

    def __init__(self, operations: object, launches: Launches) -> None:
        self._operations, self._launches = operations, launches

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._operations, name)
        if not callable(found) or isinstance(found, type):
            return found

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self._launches.as_one(name):
                return found(*args, **kwargs)

        return counted


def counts_of(layers: int, experts: str, recompute: str | None, fused: bool, number: int = 8) -> Counter[str]:
    """Of one step, with so many experts a layer."""
    # So wide that an expert is a whole number of blocks of scales, as in real models: one call decodes a stack.
    shape = {**SHAPES["tiny"], "num_hidden_layers": layers, "moe_intermediate_size": 128, "num_experts": number}
    compute = Compute("bfloat16", recompute is not None, recompute=recompute or "full")  # type: ignore[arg-type]
    with TemporaryDirectory() as folder:
        source = drawn_source(Path(folder), shape)
        with torch.no_grad():
            base = drawn_base(shape)(source, QUANTIZATION, compute, torch.device("cpu"))
    for block in base.experts:
        block.products = GroupedProducts()
    targets = resolve_targets("all-linear", source.facts.linear_modules, experts)
    adapter = initial_adapter(AdapterConfig(RANK, ALPHA, target_modules=targets), source.facts.linear_modules, seed=0)
    flat = FlatAdapter.place(adapter, base.linears, torch.bfloat16, torch.device("cpu"))
    launches = Launches()
    batch_loss: Callable[..., torch.Tensor] = lambda batch, scale: step.batch_loss(base, batch, scale)  # noqa: E731
    if fused:
        dense = cast(Operations, AsKernels(ReferenceOperations(), launches))
        mixture = cast(MixtureOperations, AsKernels(ReferenceMixture(), launches))
        batch_loss = attach_with(dense, base, flat, compute, mixture=mixture).batch_loss
    tokens = np.random.default_rng(0).integers(10, shape["vocab_size"], (ROWS, LENGTH), dtype=np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape).copy()
    batch = step.to_device(Batch(tokens, tokens.copy(), positions, np.ones_like(tokens)), torch.device("cpu"))

    def one_step() -> None:
        if recompute is None or fused:
            batch_loss(batch, 1.0).backward()
        else:
            with step.recomputed_layers(base, compute.recompute, torch.device("cpu")):
                batch_loss(batch, 1.0).backward()

    one_step()  # what is made once is not of a step
    with launches:
        launches.counted.clear()
        one_step()
    return launches.counted


def of_a_layer(experts: str, recompute: str | None, fused: bool) -> Counter[str]:
    more, fewer = (counts_of(layers, experts, recompute, fused) for layers in (4, 2))
    return Counter({name: (count - fewer[name]) // 2 for name, count in more.items() if count > fewer[name]})


def main() -> None:
    print(f"{'':33} operations a layer and step")
    print(f"{'adapters on experts':20} {'recomputed':12} {'plain layers':>12} {'fused':>8}")
    details: list[Counter[str]] = []
    for experts in ("all", "none"):
        for recompute in (None, "full"):
            plain, by_hand = (of_a_layer(experts, recompute, fused) for fused in (False, True))
            details = details or [plain, by_hand]
            print(f"{experts:20} {recompute or 'nothing':12} {plain.total():12} {by_hand.total():8}")
    for title, counts in zip(("plain layers", "fused"), details, strict=True):
        print(f"\n{title}, adapters on all experts, nothing recomputed:")
        print(", ".join(f"{name} {count}" for name, count in counts.most_common()))


if __name__ == "__main__":
    main()
