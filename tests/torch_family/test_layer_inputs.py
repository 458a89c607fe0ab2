"""Inputs of recomputed layers that wait in the host's memory: each comes back as it left, and no memory lies idle."""

from __future__ import annotations

import pytest
import torch

from qlora_hal_backends.torch_family.copy_queue import CopyQueue
from qlora_hal_backends.torch_family.fused import layer_inputs
from qlora_hal_backends.torch_family.fused.layer_inputs import HostMemory, OffloadedInputs

CPU = torch.device("cpu")
LAYERS = 6


def inputs_of(elements: int) -> list[torch.Tensor]:
    return [
        torch.full((elements,), float(layer), dtype=torch.bfloat16) + torch.arange(elements) for layer in range(LAYERS)
    ]


def through_the_host(memory: HostMemory, kept: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of the lowest layer first."""
    inputs = memory.of_a_pass(LAYERS)
    for layer_input in kept:
        inputs.keep([layer_input.clone()])
    return [inputs.take()[0].clone() for _ in kept][::-1]


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the host that were asked for, in turn."""
    sizes: list[int] = []

    def counted(size: int, device: torch.device) -> torch.Tensor:
        sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(layer_inputs, "host_memory", counted)
    return sizes


@pytest.mark.parametrize("elements", [1, 24, 32, 33, 100], ids="elements={}".format)
def test_an_input_comes_back_bit_for_bit_wherever_blocks_end(elements: int) -> None:
    memory = HostMemory(CPU, block=64)
    kept = inputs_of(elements)
    for back, left in zip(through_the_host(memory, kept), kept, strict=True):
        assert torch.equal(back, left)


def test_what_else_of_a_layer_waits_comes_back_beside_its_input() -> None:
    inputs = OffloadedInputs(HostMemory(CPU, block=64), LAYERS)
    kept = [(left, left.float().view(11, 3) * 3.0) for left in inputs_of(elements=33)]
    for of_layer in kept:
        inputs.keep([tensor.clone() for tensor in of_layer])
    for of_layer in reversed(kept):
        assert all(map(torch.equal, inputs.take(), of_layer))


def test_inputs_of_any_length_take_what_they_are_and_less_than_one_block_more(asked_for: list[int]) -> None:
    memory = HostMemory(CPU, block=64)
    kept = inputs_of(elements=33)
    through_the_host(memory, kept)
    in_host_memory = (LAYERS - 1) * 33 * 2
    assert in_host_memory <= sum(asked_for) < in_host_memory + 64
    # torch's allocator takes the next power of two of each.
    assert set(asked_for) == {64}


def test_memory_goes_from_pass_to_pass_and_grows_with_the_longest(asked_for: list[int]) -> None:
    memory = HostMemory(CPU, block=64)
    for elements in (33, 33, 20, 33):
        kept = inputs_of(elements)
        assert all(map(torch.equal, through_the_host(memory, kept), kept))
    assert len(asked_for) == 6


def test_a_pass_that_broke_off_leaves_nothing_to_the_next(asked_for: list[int]) -> None:
    memory = HostMemory(CPU, block=64)
    kept = inputs_of(elements=33)
    broken = memory.of_a_pass(LAYERS)
    for layer_input in kept[:3]:
        broken.keep([layer_input])
    del broken
    assert all(map(torch.equal, through_the_host(memory, kept), kept))
    assert len(asked_for) == 6


class LateCopies(CopyQueue):
    """Each copy is done when it is waited for and not before, as a device's queue may."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> int:
        self.asked.append((target, source))
        return len(self.asked)

    def arrived(self, copy: int | None) -> None:
        for target, source in self.asked[self.done : copy or 0]:
            target.copy_(source)
        self.done = max(self.done, copy or 0)


def test_a_layer_leaves_while_the_next_computes_and_no_longer() -> None:
    """What it lay in is free from then on."""
    memory = HostMemory(CPU, block=64)
    memory.queue = queue = LateCopies()
    inputs = OffloadedInputs(memory, LAYERS)
    for layer_input in inputs_of(elements=33):
        before = len(queue.asked)
        inputs.keep([layer_input])
        assert queue.done == before


def test_an_input_is_taken_when_it_has_arrived_and_its_place_when_it_was_read() -> None:
    memory = HostMemory(CPU, block=64)
    memory.queue = LateCopies()
    kept = inputs_of(elements=33)
    assert all(map(torch.equal, through_the_host(memory, kept), kept))


def test_two_passes_that_both_wait_for_backward_do_not_write_over_each_other() -> None:
    memory = HostMemory(CPU, block=64)
    first, second = memory.of_a_pass(LAYERS), memory.of_a_pass(LAYERS)
    of_first, of_second = inputs_of(elements=33), [-1.0 * each for each in inputs_of(elements=33)]
    for one, other in zip(of_first, of_second, strict=True):
        first.keep([one.clone()])
        second.keep([other.clone()])
    for inputs, kept in ((first, of_first), (second, of_second)):
        assert all(torch.equal(inputs.take()[0], left) for left in reversed(kept))


def test_a_block_is_what_the_allocator_of_page_locked_memory_gives_whole() -> None:
    assert layer_inputs.BLOCK_BYTES.bit_count() == 1
