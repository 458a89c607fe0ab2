"""One of several ranks of the CPU backend, which tries what a base in parts must do: `python one_torch_rank.py TRIAL
OPTIONS OUT`, with torchrun's variables. What it found is left as JSON. Tests only."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fused_models import with_fused_layers
from trainers import moved_adapter, random_batch, source_of

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import AdapterConfig, Batch, StepSettings
from qlora_hal.data.tokens.batching import without_labels
from qlora_hal.demo import model_path
from qlora_hal.errors import OutOfMemoryError, QloraHalError
from qlora_hal.ranks.identity import world_here
from qlora_hal_backends.cpu_torch.trainer import open_trainer
from qlora_hal_backends.torch_family.sharded_base import ShardedBase

TIMEOUT_SECONDS = 20.0
WORLD = world_here()


def opened(
    *,
    shard: bool,
    weight_format: str = "nf4",
    dtype: str = "float32",
    checkpointing: bool = False,
    targets: Sequence[str] | None = None,
    optimizer: str = "adamw",
    recompute: str = "full",
    base_offload: Sequence[str] = (),
    model: str = "",
    dropout: float = 0.1,
    fused: bool = False,
) -> Any:
    """Of the demo's model, or of that in a folder; with the `fused` schedule of a GPU."""
    trainer = open_trainer()
    trainer.join_ranks(WORLD, TIMEOUT_SECONDS)
    four_bit = weight_format in ("nf4", "fp4")
    quantization = Quantization(WeightFormat(weight_format), 64 if four_bit else None, four_bit)
    compute = Compute(dtype, checkpointing, {}, WORLD, shard, recompute, tuple(base_offload))  # type: ignore[arg-type]
    trainer.load(source_of(Path(model) if model else model_path()), quantization, compute)
    modules = trainer.linear_modules()
    names = [name for name in sorted(modules) if targets is None or any(part in name for part in targets)]
    trainer.attach(moved_adapter(AdapterConfig(4, 8.0, dropout, False, tuple(names)), modules), optimizer)
    return with_fused_layers(trainer) if fused else trainer


def own_window(step: int, counts: Sequence[int] = (2, 2)) -> list[Batch]:
    return [
        placed(random_batch(100 * step + 10 * WORLD.rank + number, padding=2), 4 * number + 2 * WORLD.rank)
        for number in range(counts[WORLD.rank % 2])
    ]


def placed(batch: Batch, first: int) -> Batch:
    return replace(batch, rows=np.arange(first, first + len(batch.labels), dtype=np.int32))


def taken(trainer: Any, step: int, window: Sequence[Batch]) -> float:
    [denominator] = trainer.sum_over_ranks(np.array([sum(batch.counted_tokens for batch in window)], np.float64))
    settings = StepSettings(1e-2, float(denominator), dropout_key=step + 5, max_grad_norm=1.0)
    return float(trainer.train_step(window, settings).resolve().loss_sum)


def digest(trainer: Any) -> str:
    tensors = trainer.export_adapter().tensors
    return hashlib.sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors))).hexdigest()


def story(trainer: Any) -> dict[str, Any]:
    """Steps of unequal shares, evaluations and answers between them."""
    found: dict[str, Any] = {"losses": [], "evaluations": [], "answers": []}
    for step, counts in enumerate([(2, 2), (3, 1), (0, 1), (1, 0), (2, 2)]):
        window = own_window(step, counts) or [no_labels(step)]
        found["losses"].append(taken(trainer, step, window))
        held_out = own_window(50 + step, counts[::-1])
        found["evaluations"].append(trainer.evaluate(held_out).loss_sum)
        answer = trainer.generate(np.arange(3, 9, dtype=np.int32), max_new_tokens=3 + step % 2, adapter=bool(step % 2))
        found["answers"].append(answer.tolist())
    return {**found, "adapter": digest(trainer)}


def no_labels(step: int) -> Batch:
    return placed(without_labels(random_batch(step)), 0)


def alike(**options: Any) -> dict[str, Any]:
    """The same story with a whole base and with one in parts."""
    found = {}
    for mode in ("data", "shard"):
        trainer = opened(shard=mode == "shard", **options)
        found[mode] = story(trainer)
        trainer._release()
    return found


def short_of_memory(at: int, **options: Any) -> dict[str, Any]:
    """Rank 1 has no memory left the `at`-th time that it asks for a layer in a step, which is then taken again."""
    found: dict[str, Any] = {}
    for fails in (False, True):
        trainer = opened(shard=True, **options)
        taken(trainer, 0, own_window(0))
        said = short(trainer, at) if fails else ""
        found["again" if fails else "undisturbed"] = {
            "losses": [taken(trainer, step, own_window(step)) for step in (1, 2)],
            "evaluation": trainer.evaluate(own_window(60)).loss_sum,
            "adapter": digest(trainer),
        }
        found["said"] = said
        trainer._release()
    return found


def short(trainer: Any, at: int) -> str:
    calls = itertools.count(1)
    present = ShardedBase.present

    def no_memory_left(store: ShardedBase, number: int) -> None:
        if WORLD.rank == 1 and next(calls) == at:
            raise torch.OutOfMemoryError("out of memory")
        present(store, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedBase, "present", no_memory_left)
        try:
            taken(trainer, 1, own_window(1))
        except OutOfMemoryError as problem:
            return problem.code
    return ""


def gone(**options: Any) -> dict[str, Any]:
    """Rank 1 ends without a word in the midst of a step."""
    trainer = opened(shard=True, **options)
    if WORLD.rank == 1:
        calls = itertools.count(1)
        present = ShardedBase.present

        def ended(store: ShardedBase, number: int) -> None:
            if next(calls) == 15:
                os._exit(9)
            present(store, number)

        pytest.MonkeyPatch().setattr(ShardedBase, "present", ended)
    taken(trainer, 0, own_window(0))
    return {}


TRIALS = {trial.__name__: trial for trial in (alike, short_of_memory, gone)}

if __name__ == "__main__":
    out, found = Path(sys.argv[3]), []
    for options in json.loads(sys.argv[2]):
        try:
            found.append(TRIALS[sys.argv[1]](**options))
        except QloraHalError as problem:
            found.append({"error": problem.code, "cause": problem.cause})
        out.write_text(json.dumps(found), encoding="utf-8")
