"""What attention gave waits with a layer's input: then backward computes the same and attention once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flash_on_a_cpu import cudnn_in_plain_torch, flash_in_plain_torch
from fused_models import load, packed
from torch import Tensor
from trainers import random_batch

from qlora_hal_backends.torch_family.attention import rectangles
from qlora_hal_backends.torch_family.attention.causal import (
    CausalAttention,
    FlashCall,
    FlashVarlen,
    HeadCounts,
    SampleBySample,
    Samples,
    Softmax,
)
from qlora_hal_backends.torch_family.attention.rectangles import CudnnRectangles, proved_rectangles
from qlora_hal_backends.torch_family.attention.varlen import UnevenAttention
from qlora_hal_backends.torch_family.fused import body as fused_body
from qlora_hal_backends.torch_family.fused.attach import attach_with
from qlora_hal_backends.torch_family.fused.body import FusedBody
from qlora_hal_backends.torch_family.fused.layer_inputs import HostMemory
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


def test_what_torch_computes_within_itself_has_to_be_computed_again() -> None:
    parts = drawn(6, 160).split((HEADS.query_columns, HEADS.key_columns, HEADS.key_columns), dim=1)
    query, key, value = (part.unflatten(1, (-1, HEADS.size)) for part in parts)
    for lengths in ((6,), (4, 2)):
        samples = Samples.of(lengths, CPU)
        mixed = CausalAttention(SampleBySample())(query, key, value, samples, Softmax(0.3), with_graph=True)
        assert mixed.attended is None


def test_kernels_that_give_something_else_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = CudnnRectangles()
    forward = CudnnRectangles.forward
    torchs = CausalAttention(SampleBySample())

    def as_torch_rounds(self: CudnnRectangles, query: Tensor, key: Tensor, value: Tensor, scale: float) -> object:
        """The output of torch's own kernel here, to the last bit."""
        rows = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
        samples = Samples.of((query.shape[2],) * query.shape[0], CPU)
        output = torchs(*rows, samples, Softmax(scale), with_graph=False).output
        return replace(forward(self, query, key, value, scale), output=output)

    monkeypatch.setattr(CudnnRectangles, "forward", as_torch_rounds)
    assert rectangles.give_what_torch_gives(kernels, CPU, HEADS, torch.float32)
    monkeypatch.setattr(CudnnRectangles, "backward", lambda self, gradient, q, k, v, attended, scale: (q, k, v))
    assert not rectangles.give_what_torch_gives(kernels, CPU, HEADS, torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr(CudnnRectangles, "serve", lambda self, *parts: False)
    assert not rectangles.give_what_torch_gives(kernels, CPU, HEADS, torch.float32)


def test_no_kernels_are_proved_where_there_is_no_gpu() -> None:
    assert proved_rectangles(CPU, HEADS, torch.bfloat16) is None


# the fused body -------------------------------------------------------------------------------------------------------
class Bodies:
    """One tiny model whose layers are recomputed, their inputs on the host."""

    def __init__(self, folder: Path, family: str = "llama") -> None:
        self.model = load(folder, family)
        self.compute = replace(self.model.compute, gradient_checkpointing=True, recompute="offload")

    def body(self, *, tile_rows: int = 15) -> FusedBody:
        return attach_with(
            ReferenceOperations(), self.model.base, self.model.flat, self.compute, tile_rows=tile_rows,
            uneven=UnevenAttention(FlashVarlen(), "packed rows by flash attention"), rectangles=CudnnRectangles(),
        )  # fmt: skip


@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packed"])
def test_attention_over_long_samples_is_computed_once_and_every_gradient_is_the_same(
    is_packed: bool, computed: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bodies = Bodies(tmp_path)
    batches = [packed(random_batch(seed)) if is_packed else random_batch(seed) for seed in (3, 4)]
    expected = bodies.model.gradient(bodies.body().batch_loss, *batches)
    assert computed.total() == 2 * len(batches) * LAYERS
    computed.clear()
    monkeypatch.setattr(fused_body, "LONG_SAMPLE", 5)
    body = bodies.body()
    for _ in range(2):  # what one pass leaves on the host must not reach the next
        loss, gradient = bodies.model.gradient(body.batch_loss, *batches)
        assert loss == expected[0]
        assert torch.equal(gradient, expected[1])
    assert computed.total() == 2 * len(batches) * LAYERS


@pytest.mark.parametrize(
    ("family", "has_room"), [("mistral", True), ("llama", False)], ids=["a window", "a host without room"]
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


def test_a_host_has_room_for_what_it_has_already_and_for_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_hal_backends.torch_family.fused import layer_inputs

    monkeypatch.setattr(layer_inputs, "host_memory_left", lambda: 1000)
    memory = HostMemory(CPU, block=64)
    assert memory.has_room(1000)
    assert not memory.has_room(1001)
    assert not HostMemory(CPU, block=64, ranks=2).has_room(1000)
    list(memory.pieces(0, 100))
    assert memory.has_room(1000 + 128)


def test_what_is_kept_is_said(tmp_path: Path) -> None:
    assert "attention over 8192 tokens and more kept where the host has room" in Bodies(tmp_path).body().words
