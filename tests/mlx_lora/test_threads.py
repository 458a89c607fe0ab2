"""A trainer is of no thread: loaded in one, it works in others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainers import OpenTrainer, random_batch

from qlora_hal.contract.values import StepSettings

Opened = Callable[..., OpenTrainer]


Run = Callable[[Callable[[], Any]], Any]


def here(work: Callable[[], Any]) -> Any:
    return work()


def elsewhere(work: Callable[[], Any]) -> Any:
    """What `work` gives in a thread of its own, which ends with it."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


@pytest.mark.long
@pytest.mark.parametrize("compile", ["off", "auto"])
def test_a_trainer_loaded_in_one_thread_steps_in_others(compile: str, llama: Path, opened: Opened) -> None:
    """The same numbers, bit for bit, as in one thread; the moments travel with the trainer."""
    window = [random_batch(0)]

    def numbers(first: Run, second: Run) -> object:
        """Load and step by turns in the one and the other."""
        ready: OpenTrainer = first(lambda: opened(llama, compile=compile, dropout=0.1, checkpointing=True))
        losses = [run(lambda: ready.step(window, dropout_key=7).loss_sum) for run in (second, first, second)]
        exported = first(ready.trainer.export_optimizer)
        return losses, exported.step, {name: moment.tobytes() for name, moment in exported.moments.items()}

    assert numbers(here, here) == numbers(elsewhere, here)


def test_every_view_is_open_to_another_thread(llama: Path, opened: Opened) -> None:
    ready: OpenTrainer = elsewhere(lambda: opened(llama, weight_format="nf4", block_size=32))
    trainer, batch = ready.trainer, random_batch(0)
    module = next(iter(trainer.linear_modules()))
    views: tuple[Callable[[], Any], ...] = (
        lambda: trainer.logits(batch),
        lambda: trainer.dequantized_weight(module),
        lambda: trainer.generate(batch.input_ids[0, :4], max_new_tokens=3),
        lambda: trainer.gradients([batch])[f"base_model.model.{module}.lora_A.weight"],
    )
    for view in views:
        assert np.array_equal(view(), elsewhere(view))
    snapshot = elsewhere(trainer.export_optimizer)
    trainer.import_optimizer(snapshot)
    assert elsewhere(lambda: trainer.evaluate([batch])).token_count == batch.counted_tokens


def test_a_step_queued_in_one_thread_is_read_in_another(llama: Path, opened: Opened) -> None:
    ready, window = opened(llama), [random_batch(0)]
    settings = StepSettings(1e-2, window[0].counted_tokens)
    pending = elsewhere(lambda: ready.trainer.train_step(window, settings))
    assert pending.resolve().applied


def test_callers_at_once_wait_for_each_other(llama: Path, opened: Opened) -> None:
    trainer, batch = opened(llama).trainer, random_batch(0)
    alone = trainer.logits(batch)
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda _: trainer.logits(batch), range(8)))
    assert all(np.array_equal(alone, found) for found in together)
