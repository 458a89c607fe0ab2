"""What a program has set for all of torch changes nothing of what a trainer computes, and is as it was afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainers import OpenTrainer, open_cpu_trainer, random_batch

from qlora_hal_backends.torch_family.own_state import own_state

HERE = torch.device("cpu")


@contextmanager
def rounded_products() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def rounded_products_by_device() -> Iterator[None]:
    products = torch.backends.mkldnn.matmul
    products.fp32_precision = "bf16"
    try:
        yield
        assert products.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


SURROUNDINGS: Mapping[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default_device": lambda: torch.device("meta"),
    "rounded_products": rounded_products,
}
if hasattr(torch.backends.mkldnn, "matmul"):  # since torch 2.9
    SURROUNDINGS = {**SURROUNDINGS, "rounded_products_by_device": rounded_products_by_device}


def computed(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What every method gives that computes, from loading on."""
    opened: OpenTrainer = open_cpu_trainer(folder, weight_format="nf4", dropout=0.1)
    trainer, batch = opened.trainer, random_batch(1)
    try:
        found = {f"gradient of {name}": array for name, array in trainer.gradients([batch]).items()}
        stats = [opened.step([batch], dropout_key=3) for _ in range(2)]
        found |= {f"adapter {name}": array for name, array in trainer.export_adapter().tensors.items()}
        found["steps"] = np.array([[each.loss_sum, each.grad_norm] for each in stats])
        found["evaluation"] = np.array([trainer.evaluate([batch]).loss_sum])
        found["logits"] = trainer.logits(batch)
        found["token losses"] = trainer.token_losses(batch)
        found["answer"] = trainer.generate(batch.input_ids[0], max_new_tokens=4)
        found["dtypes"] = np.array(trainer.proved_compute_dtypes())
        return found
    finally:
        trainer.close()


@pytest.fixture(scope="module")
def alone(llama: Path) -> dict[str, np.ndarray[Any, Any]]:
    return computed(llama)


@pytest.mark.parametrize("around", list(SURROUNDINGS))
def test_what_a_program_has_set_reaches_no_number(
    around: str, llama: Path, alone: Mapping[str, np.ndarray[Any, Any]]
) -> None:
    with SURROUNDINGS[around]():
        found = computed(llama)
    assert found.keys() == alone.keys()
    assert [name for name in alone if not np.array_equal(found[name], alone[name])] == []


def test_products_are_full_until_the_last_of_two_trainers_leaves() -> None:
    """The setting is the whole process's: the first to leave takes nothing from the other, and nobody leaves it."""
    entered, may_leave = threading.Event(), threading.Event()

    def longer() -> None:
        with own_state(HERE):
            entered.set()
            may_leave.wait(60)

    with rounded_products():
        with own_state(HERE):
            other = threading.Thread(target=longer)
            other.start()
            assert entered.wait(60)
        assert torch.get_float32_matmul_precision() == "highest"
        may_leave.set()
        other.join()
