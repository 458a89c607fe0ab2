"""What attention gave waits with a layer's input: then backward computes the same and attention once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flash_on_a_cpu import cudnn_in_plain_torch, flash_in_plain_torch
from fused_models import FAMILIES, SAME_FUNCTION, load, packed
from torch import Tensor
from trainers import random_batch

from qlora_hal.contract.values import Batch
from qlora_hal.contract.world import World
from qlora_hal_backends.torch_family import step
from qlora_hal_backends.torch_family.attention import rectangles
from qlora_hal_backends.torch_family.attention.causal import (
    Attended,
    CausalAttention,
    FlashCall,
    FlashVarlen,
    Gradients,
    HeadCounts,
    RectangleKernels,
    SampleBySample,
    Samples,
    Softmax,
)
from qlora_hal_backends.torch_family.attention.rectangles import CudnnRectangles, proved_rectangles
from qlora_hal_backends.torch_family.attention.varlen import SAMPLE_BY_SAMPLE, UnevenAttention
from qlora_hal_backends.torch_family.copy_queue import CopyQueue
from qlora_hal_backends.torch_family.fused import body as fused_body
from qlora_hal_backends.torch_family.fused import layer_inputs
from qlora_hal_backends.torch_family.fused.attach import attach_with
from qlora_hal_backends.torch_family.fused.body import FusedBody
from qlora_hal_backends.torch_family.fused.decoder_layer import DecoderLayer
from qlora_hal_backends.torch_family.fused.end_to_end import without_padding
from qlora_hal_backends.torch_family.fused.layer_inputs import HostMemory, OffloadedInputs
from qlora_hal_backends.torch_family.fused.mixture.reference import ReferenceMixture
from qlora_hal_backends.torch_family.fused.reference import ReferenceOperations

CPU = torch.device("cpu")
HEADS = HeadCounts(query=6, key_value=2, size=16)
LAYERS = 2


@pytest.fixture(autouse=True)
def kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """cuDNN and flash attention in plain torch, and a torch that would take cuDNN."""
    monkeypatch.setattr(CudnnRectangles, "serve", lambda self, query, key, value, scale: True)
    with flash_in_plain_torch(), cudnn_in_plain_torch():
        yield


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often attention was computed forward, by whose kernels."""
    found: Counter[str] = Counter()
    cudnn, flash = CudnnRectangles.forward, FlashCall.forward

    def by_cudnn(self: CudnnRectangles, *arguments: object) -> object:
        found["cudnn"] += 1
        return cudnn(self, *arguments)  # type: ignore[arg-type]

    def by_flash(self: FlashCall, *arguments: object) -> object:
        found["flash"] += 1
        return flash(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CudnnRectangles, "forward", by_cudnn)
    monkeypatch.setattr(FlashCall, "forward", by_flash)
    return found


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("lengths", [(6, 6, 6), (9,), (3, 7, 1, 12)], ids=["rows", "one row", "uneven samples"])
def test_attention_goes_on_from_what_it_gave(lengths: tuple[int, ...], computed: Counter[str]) -> None:
    attention = CausalAttention(FlashVarlen(), CudnnRectangles())
    samples, softmax = Samples.of(lengths, CPU), Softmax(0.3)
    parts = drawn(sum(lengths), 160).split((HEADS.query_columns, HEADS.key_columns, HEADS.key_columns), dim=1)
    query, key, value = (part.unflatten(1, (-1, HEADS.size)) for part in parts)
    upstream = drawn(sum(lengths), HEADS.query_columns, seed=1)
    first = attention(query, key, value, samples, softmax, with_graph=True)
    assert first.attended is not None
    elsewhere = first.attended.without_large().with_large([tensor.clone() for tensor in first.attended.large])
    again = attention(query, key, value, samples, softmax, with_graph=True, attended=elsewhere)
    assert computed.total() == 1
    assert torch.equal(again.output, first.output)
    assert all(map(torch.equal, again.backward(upstream), first.backward(upstream)))
    by_torch = CausalAttention(SampleBySample())(query, key, value, samples, softmax, with_graph=True)
    # Sums of some ten float64 terms in two orders.
    torch.testing.assert_close(first.output, by_torch.output, rtol=1e-12, atol=1e-12)
    for found, expected in zip(first.backward(upstream), by_torch.backward(upstream), strict=True):
        torch.testing.assert_close(
            found.transpose(1, 2).flatten(0, 1), expected.transpose(1, 2).flatten(0, 1), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("lengths", [(6, 6), (3, 9)], ids=["rows", "uneven samples"])
def test_evaluation_keeps_nothing_of_attention(lengths: tuple[int, ...]) -> None:
    parts = drawn(12, 160).split((HEADS.query_columns, HEADS.key_columns, HEADS.key_columns), dim=1)
    query, key, value = (part.unflatten(1, (-1, HEADS.size)) for part in parts)
    attention, samples = CausalAttention(FlashVarlen(), CudnnRectangles()), Samples.of(lengths, CPU)
    assert attention(query, key, value, samples, Softmax(0.3), with_graph=True).attended is not None
    assert attention(query, key, value, samples, Softmax(0.3), with_graph=False).attended is None


def test_kernels_that_torch_would_not_take_are_not_called(
    computed: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudnnRectangles, "serve", lambda self, query, key, value, scale: False)
    query, key, value = (part.unflatten(1, (-1, HEADS.size)) for part in drawn(12, 96).split((32, 32, 32), dim=1))
    attention = CausalAttention(FlashVarlen(), CudnnRectangles())
    mixed = attention(query, key, value, Samples.of((6, 6), CPU), Softmax(0.3), with_graph=True)
    assert mixed.attended is None
    assert not computed


def test_what_torch_computes_within_itself_has_to_be_computed_again() -> None:
    parts = drawn(6, 160).split((HEADS.query_columns, HEADS.key_columns, HEADS.key_columns), dim=1)
    query, key, value = (part.unflatten(1, (-1, HEADS.size)) for part in parts)
    for lengths in ((6,), (4, 2)):
        samples = Samples.of(lengths, CPU)
        mixed = CausalAttention(SampleBySample())(query, key, value, samples, Softmax(0.3), with_graph=True)
        assert mixed.attended is None


class AsTorchRounds(CudnnRectangles):
    """With the output of torch's own kernel here, to the last bit."""

    def __init__(self) -> None:
        self.forwards = self.backwards = 0

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Attended:
        self.forwards += 1
        rows = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
        samples = Samples.of((query.shape[2],) * query.shape[0], CPU)
        output = CausalAttention(SampleBySample())(*rows, samples, Softmax(scale), with_graph=False).output  # type: ignore[misc]
        return replace(super().forward(query, key, value, scale), output=output)

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, scale: float
    ) -> Gradients:
        self.backwards += 1
        return super().backward(gradient, query, key, value, attended, scale)


class ABitOff(AsTorchRounds):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Attended:
        found = super().forward(query, key, value, scale)
        return replace(found, output=found.output * (1.0 + 2.0**-20))


class OtherGradients(AsTorchRounds):
    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, scale: float
    ) -> Gradients:
        return query, key, value


class OtherGradientsOfWhatWasGiven(AsTorchRounds):
    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, scale: float
    ) -> Gradients:
        found = super().backward(gradient, query, key, value, attended, scale)
        return found if self.backwards == 1 else (query, key, value)


class NotWhatTorchTakes(AsTorchRounds):
    def serve(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
        return False


def test_kernels_that_give_what_torch_gives_are_taken() -> None:
    """Tried on what was just computed, and on what was given: no third time forward."""
    kernels = AsTorchRounds()
    assert rectangles.give_what_torch_gives(kernels, CPU, HEADS, torch.float32)
    assert (kernels.forwards, kernels.backwards) == (1, 2)


@pytest.mark.parametrize("kernels", [ABitOff, OtherGradients, OtherGradientsOfWhatWasGiven, NotWhatTorchTakes])
def test_kernels_that_give_something_else_are_not_taken(kernels: type[AsTorchRounds]) -> None:
    assert not rectangles.give_what_torch_gives(kernels(), CPU, HEADS, torch.float32)


@pytest.mark.parametrize("device", ["cpu", "cuda:99"])
def test_no_kernels_are_proved_where_there_is_no_such_gpu(device: str) -> None:
    assert proved_rectangles(torch.device(device), HEADS, torch.bfloat16) is None


# the fused body -------------------------------------------------------------------------------------------------------
CUDNN = CudnnRectangles()
FLASH = UnevenAttention(FlashVarlen(), "packed rows by flash attention")


class Bodies:
    """One tiny model whose layers are recomputed, their inputs on the host."""

    def __init__(self, folder: Path, family: str = "llama", **changes: object) -> None:
        self.model = load(folder, family, changes={**FAMILIES.get(family, {}), **changes})
        self.compute = replace(self.model.compute, gradient_checkpointing=True, recompute="offload")

    def body(self, *, uneven: UnevenAttention = FLASH, rectangles: RectangleKernels | None = CUDNN) -> FusedBody:
        return attach_with(
            ReferenceOperations(), self.model.base, self.model.flat, self.compute, tile_rows=15,
            uneven=uneven, rectangles=rectangles, mixture=ReferenceMixture() if self.model.base.experts else None,
        )  # fmt: skip


def one_sample_a_row(seed: int) -> Batch:
    return random_batch(seed)


def two_samples_a_row(seed: int) -> Batch:
    return packed(random_batch(seed))


def of_many_lengths(seed: int) -> Batch:
    """Without its padding: samples of 20 and of 12 tokens."""
    return without_padding(random_batch(seed, padding=8))


@pytest.mark.parametrize("arrange", [one_sample_a_row, two_samples_a_row, of_many_lengths])
def test_attention_over_long_samples_is_computed_once_and_every_gradient_is_the_same(
    arrange: Callable[[int], Batch], computed: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bodies = Bodies(tmp_path, num_hidden_layers=4)
    batches = [arrange(seed) for seed in (3, 4)]
    expected = bodies.model.gradient(bodies.body().batch_loss, *batches)
    assert computed.total() == 2 * len(batches) * 4
    computed.clear()
    monkeypatch.setattr(fused_body, "LONG_SAMPLE", longest_of(batches[0]))
    body = bodies.body()
    for _ in range(2):  # what one pass leaves on the host must not reach the next
        loss, gradient = bodies.model.gradient(body.batch_loss, *batches)
        assert loss == expected[0]
        assert torch.equal(gradient, expected[1])
    assert computed.total() == 2 * len(batches) * 4


def longest_of(batch: Batch) -> int:
    return max(step.to_device(batch, CPU).lengths or (batch.input_ids.shape[1],))


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmoe", "glm4_moe"])
def test_passes_of_every_kind_follow_one_another_in_the_same_memory(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With attention kept, with attention computed again, and evaluation between them."""
    bodies = Bodies(tmp_path, family, num_hidden_layers=4)
    batches = [of_many_lengths(3), random_batch(4, time=10), two_samples_a_row(5), one_sample_a_row(6)]
    by_itself = [bodies.model.gradient(bodies.body().batch_loss, batch) for batch in batches]
    monkeypatch.setattr(fused_body, "LONG_SAMPLE", 15)
    body = bodies.body()
    for _ in range(2):
        for batch, (loss, gradient) in zip(batches, by_itself, strict=True):
            found = bodies.model.gradient(body.batch_loss, batch)
            assert found[0] == loss
            assert torch.equal(found[1], gradient)
            with torch.no_grad():
                evaluated = body.batch_loss(step.to_device(batch, CPU), 1 / 40).item()
            assert evaluated == pytest.approx(loss, rel=SAME_FUNCTION)  # by torch's own kernels


@pytest.mark.parametrize(
    ("family", "has_room"),
    [("mistral", True), ("cwm", True), ("llama", False)],
    ids=["a window", "a window in one layer", "a host without room"],
)
def test_attention_is_computed_again_where_that_is_cheap_or_nothing_else_can_be_kept(
    family: str, has_room: bool, computed: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A window of 8 tokens is never a long sample."""
    monkeypatch.setattr(fused_body, "LONG_SAMPLE", 9)
    monkeypatch.setattr(HostMemory, "has_room", lambda self, size: has_room)
    bodies = Bodies(tmp_path, family)
    bodies.model.gradient(bodies.body().batch_loss, random_batch(3))
    assert computed.total() == 2 * LAYERS


def test_the_host_is_asked_for_the_bytes_that_then_wait_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fused_body, "LONG_SAMPLE", 9)
    asked, taken = [], []
    has_room, pieces = HostMemory.has_room, HostMemory.pieces

    def asked_for(self: HostMemory, size: int) -> bool:
        asked.append(size)
        return has_room(self, size)

    def taken_to(self: HostMemory, begin: int, end: int) -> Iterator[Tensor]:
        taken.append(end)
        return pieces(self, begin, end)

    monkeypatch.setattr(HostMemory, "has_room", asked_for)
    monkeypatch.setattr(HostMemory, "pieces", taken_to)
    bodies = Bodies(tmp_path, num_hidden_layers=4, head_dim=32)
    bodies.model.gradient(bodies.body().batch_loss, random_batch(3))
    assert asked == [max(taken)]


def test_a_pass_holds_nothing_of_what_waits_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fused_body, "LONG_SAMPLE", 9)
    body = Bodies(tmp_path).body()
    _, tape = body._forward(step.to_device(random_batch(3), CPU), body.keep)
    assert isinstance(tape.inputs, OffloadedInputs)
    for layer in tape.layers:
        assert layer.h1 is layer.attention is layer.feed_forward is None
        assert layer.attended is not None
        assert not any(tensor.numel() for tensor in layer.attended.large)
    highest = tape.layers[-1]
    highest.take(tape.inputs.take())
    h1, attended = highest.taken()
    assert attended is not None
    assert all(tensor.numel() for tensor in (h1, *attended.large))
    assert highest.h1 is highest.attended is None


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_copies_of_a_pass_that_breaks_off_end_before_the_next_begins(
    direction: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bodies = Bodies(tmp_path, num_hidden_layers=4)
    expected = bodies.model.gradient(bodies.body().batch_loss, random_batch(3))
    monkeypatch.setattr(fused_body, "LONG_SAMPLE", 9)
    body, whole, calls, settled = bodies.body(), getattr(DecoderLayer, direction), [], []

    def breaks_off(self: DecoderLayer, *arguments: object) -> object:
        calls.append(direction)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return whole(self, *arguments)

    monkeypatch.setattr(CopyQueue, "settle", lambda self: settled.append(self))
    with monkeypatch.context() as patch:
        patch.setattr(DecoderLayer, direction, breaks_off)
        with pytest.raises(torch.OutOfMemoryError):
            bodies.model.gradient(body.batch_loss, random_batch(4))
    assert body.host is not None
    assert settled == [body.host.queue]
    found = bodies.model.gradient(body.batch_loss, random_batch(3))
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])
    assert len(settled) == 1


def test_a_host_has_room_for_what_it_has_already_and_for_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_inputs, "host_memory_left", lambda: 1000)
    memory = HostMemory(CPU, block=64)
    assert memory.has_room(1000)
    assert not memory.has_room(1001)
    assert not HostMemory(CPU, block=64, ranks=2).has_room(1000)
    list(memory.pieces(0, 100))
    assert memory.has_room(1000 + 128)


def test_a_host_is_shared_by_the_ranks_that_are_on_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layer_inputs, "host_memory_left", lambda: 1000)
    bodies = Bodies(tmp_path)
    bodies.compute = replace(bodies.compute, world=World(0, 8, local_size=2))
    host = bodies.body().host
    assert host is not None
    assert host.has_room(500)
    assert not host.has_room(501)


KEPT = "attention over 8192 tokens and more kept where the host has room"


def test_what_is_kept_is_said(tmp_path: Path) -> None:
    """By whichever kernels it can be."""
    bodies = Bodies(tmp_path)
    assert f", {KEPT}" in bodies.body().words
    assert f", of packed rows {KEPT}" in bodies.body(rectangles=None).words
    assert f", of rows that are not packed {KEPT}" in bodies.body(uneven=SAMPLE_BY_SAMPLE).words


def test_what_is_never_kept_is_not_said(tmp_path: Path) -> None:
    assert KEPT not in Bodies(tmp_path / "1").body(uneven=SAMPLE_BY_SAMPLE, rectangles=None).words
    assert KEPT not in Bodies(tmp_path / "2", "cwm").body().words
    assert KEPT in Bodies(tmp_path / "3", "cwm", sliding_window=8192).body().words
    on_device = Bodies(tmp_path / "4")
    on_device.compute = replace(on_device.compute, recompute="full")
    assert KEPT not in on_device.body().words
