"""What is recomputed, where a base lives and where activations wait: the same losses and gradients everywhere."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fused_models import with_fused_layers
from published_mxfp4 import write_published_gpt_oss
from tiny_models import HIDDEN, VOCABULARY, write_model
from torch import Tensor, nn
from trainers import moved_adapter, random_batch, source_of

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import AdapterConfig, Float32, StepSettings
from qlora_hal.contract.world import World
from qlora_hal.errors import StorageError, UnsupportedFeatureError, figures
from qlora_hal.memory.placement import HOST_SPARED
from qlora_hal_backends import cpu_torch, cuda_bnb
from qlora_hal_backends.torch_family import host_tables, layers_at_rest, loading, trial
from qlora_hal_backends.torch_family.experts.stacked_weights import SeparateWeights
from qlora_hal_backends.torch_family.layer_slots import SlotStack
from qlora_hal_backends.torch_family.layers_at_rest import DiskLayers, HostLayers
from qlora_hal_backends.torch_family.platform import CPU, CUDA
from qlora_hal_backends.torch_family.ranks import most_ranks_here
from qlora_hal_backends.torch_family.streamed_base import StreamedBase
from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer

NF4 = Quantization(WeightFormat.NF4, 64, True)
SAME_FUNCTION = 1e-5
"""Some hundred float32 terms in another order, 2^-24 each."""
EVERYWHERE: Any = ("embeddings", "layers", "head")


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def trainer_of(path: Path, compute: Compute, quantization: Quantization = NF4) -> TorchLoRATrainer:
    """On a GPU where there is one: float32 and 16 tokens a row leave its attention nothing to add in another order."""
    trainer = TorchLoRATrainer(*((cuda_bnb.SPEC, CUDA) if DEVICE.type == "cuda" else (cpu_torch.SPEC, CPU)))
    trainer.load(source_of(path), quantization, compute)
    shapes = trainer.linear_modules()
    trainer.attach(moved_adapter(AdapterConfig(4, 8.0, 0.0, False, tuple(sorted(shapes))), shapes))
    return trainer


def layers_of(trainer: TorchLoRATrainer) -> StreamedBase:
    base = trainer._loaded.streamed
    assert base is not None
    return base


def losses_and_adapter(trainer: TorchLoRATrainer) -> tuple[list[float], Mapping[str, Float32]]:
    """Three steps of two micro-batches, an evaluation between them."""
    losses = []
    for number in range(3):
        window = [random_batch(2 * number), random_batch(2 * number + 1)]
        denominator = float(sum(batch.counted_tokens for batch in window))
        losses.append(trainer.train_step(window, StepSettings(1e-2, denominator, max_grad_norm=1.0)).resolve().loss)
        losses.append(trainer.evaluate(window).loss)
    return losses, trainer.export_adapter().tensors


@pytest.mark.parametrize("recompute", ["selective", "full", "offload"])
def test_recomputation_changes_nothing(recompute: Any, tmp_path: Path) -> None:
    path = write_model(tmp_path, "llama")
    kept, again = (trainer_of(path, compute) for compute in (Compute(), Compute("float32", True, recompute=recompute)))
    window = [random_batch(0), random_batch(1)]
    expected, found = kept.gradients(window), again.gradients(window)
    # A CPU repeats the very operations; the fused layers of a GPU compute the gated product once more in the kernel
    # of its backward, which may round otherwise.
    bound = SAME_FUNCTION if DEVICE.type == "cuda" else 0.0
    for name, gradient in expected.items():
        assert np.linalg.norm(found[name] - gradient) <= bound * np.linalg.norm(gradient), name
    assert again.evaluate(window) == kept.evaluate(window)


@pytest.mark.parametrize("weight_format", [WeightFormat.NF4, WeightFormat.INT8, WeightFormat.NONE])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rest", ["host", "disk"])
def test_streamed_base_gives_the_bits_of_a_resident_one(
    rest: str, weight_format: WeightFormat, checkpointing: bool, tmp_path: Path
) -> None:
    path = write_model(tmp_path, "llama", num_hidden_layers=5)
    four_bit = weight_format is WeightFormat.NF4
    quantization = Quantization(weight_format, 64 if four_bit else None, four_bit)
    resident = losses_and_adapter(trainer_of(path, Compute("float32", checkpointing), quantization))
    compute = Compute("float32", checkpointing, {"offloaded_layers": rest}, base_offload=("embeddings", "layers"))
    trainer = trainer_of(path, compute, quantization)
    assert isinstance(layers_of(trainer).at_rest, DiskLayers if rest == "disk" else HostLayers)
    streamed = losses_and_adapter(trainer)
    assert streamed[0] == resident[0]
    for name, tensor in resident[1].items():
        np.testing.assert_array_equal(streamed[1][name], tensor)


MIXTURES: Mapping[str, Mapping[str, Any]] = {
    # 40 tokens of two experts each leave some of 64 idle.
    "qwen3_moe": {"num_experts": 64, "num_local_experts": 64},
    "qwen2_moe": {},  # with a shared expert
    "mixtral": {},
    "deepseek_v3": {},  # the lowest layer is dense, and smaller than those above it
    "glm4_moe": {},  # the same
    "olmoe": {},
}
MXFP4 = Quantization(WeightFormat.MXFP4, None, False)
OTHER_FORMATS: Mapping[str, Quantization] = {
    "int8": Quantization(WeightFormat.INT8, None, False),
    "none": Quantization(WeightFormat.NONE, None, False),
    "fp4": Quantization(WeightFormat.FP4, 64, False),
}


def mixture_of(folder: Path, kind: str) -> Path:
    if kind == "gpt_oss":  # experts with biases, in MXFP4 beside attention in 16 bits
        write_published_gpt_oss(folder, num_hidden_layers=5, layer_types=["sliding_attention"] * 4 + ["full_attention"])
        return folder
    return write_model(folder, kind, num_hidden_layers=5, **MIXTURES[kind])


def assert_same_bits(
    streamed: tuple[list[float], Mapping[str, Float32]], resident: tuple[list[float], Mapping[str, Float32]]
) -> None:
    assert streamed[0] == resident[0]
    for name, tensor in resident[1].items():
        np.testing.assert_array_equal(streamed[1][name], tensor)


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [
        *((kind, NF4) for kind in MIXTURES),
        ("gpt_oss", MXFP4),
        *(("qwen3_moe", quantization) for quantization in OTHER_FORMATS.values()),
    ],
    ids=[*MIXTURES, "gpt_oss", *(f"qwen3_moe in {name}" for name in OTHER_FORMATS)],
)
@pytest.mark.parametrize(("checkpointing", "rest"), [(False, "host"), (True, "disk")])
def test_streamed_experts_give_the_bits_of_resident_ones(
    kind: str, quantization: Quantization, checkpointing: bool, rest: str, tmp_path: Path
) -> None:
    path = mixture_of(tmp_path, kind)
    resident = losses_and_adapter(trainer_of(path, Compute("float32", checkpointing), quantization))
    compute = Compute("float32", checkpointing, {"offloaded_layers": rest}, base_offload=("embeddings", "layers"))
    trainer = trainer_of(path, compute, quantization)
    assert all(isinstance(stack.base, SlotStack) for block in trainer._loaded.experts for stack in block.stacks)
    assert_same_bits(losses_and_adapter(trainer), resident)


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "mixtral", "glm4_moe", "olmoe", "llama"])
@pytest.mark.parametrize("recompute", [None, "selective", "full", "offload"])
def test_the_fused_schedule_reads_streamed_layers_as_resident_ones(kind: str, recompute: Any, tmp_path: Path) -> None:
    path = write_model(tmp_path, kind, num_hidden_layers=5, **MIXTURES.get(kind, {}))
    resident = Compute("float32", recompute is not None, recompute=recompute or "full")
    streamed = replace(resident, base_offload=("embeddings", "layers"))
    assert_same_bits(
        *(losses_and_adapter(with_fused_layers(trainer_of(path, compute))) for compute in (streamed, resident))
    )


@pytest.mark.parametrize("schedule", [lambda trainer: trainer, with_fused_layers], ids=["plain layers", "fused"])
def test_experts_of_another_layer_in_the_slot_are_seen(
    schedule: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the equalities above rest on. Attention is on the device: it is the stacks that are wrong."""
    path = mixture_of(tmp_path, "qwen3_moe")
    expected = schedule(trainer_of(path, Compute())).gradients([random_batch(0)])
    add = StreamedBase.add

    def stacks_alone(store: StreamedBase, weights: Any) -> Any:
        stacks = iter(add(store, [weight for weight in weights if len(weight.shape) == 3]))
        return [next(stacks) if len(weight.shape) == 3 else weight for weight in weights]

    monkeypatch.setattr(StreamedBase, "add", stacks_alone)
    trainer = schedule(trainer_of(path, Compute(base_offload=LAYERS)))
    found = trainer.gradients([random_batch(0)])
    assert all(np.array_equal(found[name], gradient) for name, gradient in expected.items())
    monkeypatch.setattr(layers_of(trainer)._queue, "copy", lambda target, source: None)
    found = trainer.gradients([random_batch(0)])
    assert any(not np.array_equal(found[name], gradient) for name, gradient in expected.items())


def test_an_expert_is_that_of_its_layer_whichever_was_read_before(tmp_path: Path) -> None:
    """Backward reads a layer's experts before anything else of it."""
    path = mixture_of(tmp_path, "mixtral")
    resident, streamed = (trainer_of(path, Compute(base_offload=parts))._loaded for parts in ((), LAYERS))
    for layer in (0, 4, 1, 3, 2, 0):
        for theirs, ours in zip(resident.experts[layer].stacks, streamed.experts[layer].stacks, strict=True):
            assert theirs.base is not None
            assert ours.base is not None
            assert torch.equal(ours.base.expert(1), theirs.base.expert(1))
            assert torch.equal(ours.base.dense(), theirs.base.dense())


def test_of_streamed_experts_two_layers_are_on_the_device(tmp_path: Path) -> None:
    trainer = trainer_of(mixture_of(tmp_path, "qwen3_moe"), Compute(base_offload=EVERYWHERE))
    base = layers_of(trainer)
    largest = max(size for size, _ in base._layers)
    slots = {slot.memory.untyped_storage().data_ptr() for slot in base._slots}
    assert [slot.memory.numel() for slot in base._slots] == [largest] * 2
    for block in trainer._loaded.experts:
        for stack in block.stacks:
            weight: Any = stack.base.weight  # type: ignore[union-attr]
            held = {part.untyped_storage().data_ptr() for part in (weight.packed, weight.absmax, weight.nested)}
            assert held <= slots


def test_experts_in_formats_of_their_own_are_streamed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one stack that a checkpoint packed in several ways."""
    path = mixture_of(tmp_path, "mixtral")
    monkeypatch.setattr("qlora_hal_backends.torch_family.experts.reading.stacked", SeparateWeights)
    resident, streamed = (trainer_of(path, Compute(base_offload=parts)) for parts in ((), LAYERS))
    assert_same_bits(losses_and_adapter(streamed), losses_and_adapter(resident))


def test_memory_that_all_layers_need_is_not_told_from_a_small_first_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of DeepSeek the lowest layers have no experts."""
    path = write_model(tmp_path, "deepseek_v3", num_hidden_layers=5, n_routed_experts=16)
    sizes = [size for size, _ in layers_of(trainer_of(path, Compute(base_offload=LAYERS)))._layers]
    assert 2 * sizes[0] < sizes[1]
    monkeypatch.setattr(layers_at_rest, "memory_available_here", lambda: int(sum(sizes) * 0.9 / (1 - HOST_SPARED)))
    assert isinstance(layers_of(trainer_of(path, Compute(base_offload=LAYERS))).at_rest, DiskLayers)


def test_streamed_mxfp4_is_named_in_the_kernel_path(tmp_path: Path) -> None:
    trainer = trainer_of(mixture_of(tmp_path, "gpt_oss"), Compute(base_offload=LAYERS), MXFP4)
    assert "MXFP4 by torch" in trainer.device_facts().kernel_path


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])  # a plain head; a capped one; a multiplied one
def test_head_in_pieces_gives_the_loss_of_a_whole_one(
    family: str, weighted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_tables, "PIECE_BYTES", 15 * HIDDEN * 4)  # fifteen rows a piece; the last is shorter
    assert VOCABULARY % 15
    path = write_model(tmp_path, family)
    batch = random_batch(0)
    if weighted:
        weights = np.linspace(-1, 2, batch.labels.size, dtype=np.float32)
        batch = replace(batch, weights=weights.reshape(batch.labels.shape))
    whole, in_pieces = (trainer_of(path, Compute("float32", base_offload=parts)) for parts in ((), ("head",)))
    assert in_pieces.evaluate([batch]).loss == pytest.approx(whole.evaluate([batch]).loss, rel=SAME_FUNCTION)
    np.testing.assert_allclose(in_pieces.logits(batch), whole.logits(batch), rtol=SAME_FUNCTION, atol=1e-5)
    expected, found = whole.gradients([batch]), in_pieces.gradients([batch])
    # The same logits; their exponentials, and the gradient's terms, are added piece by piece in float32.
    for name, gradient in expected.items():
        assert np.linalg.norm(found[name] - gradient) <= SAME_FUNCTION * np.linalg.norm(gradient), name


def test_architecture_that_makes_its_own_logits_of_a_head_in_pieces_is_differentiated_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_tables, "PIECE_BYTES", 15 * HIDDEN * 4)  # twenty-two pieces take turns in two slots
    monkeypatch.setattr(trial, "_head", lambda *given: None)
    path = write_model(tmp_path, "llama")
    whole, in_pieces = (trainer_of(path, Compute(base_offload=parts)) for parts in ((), ("head",)))
    assert in_pieces._loaded.head is None
    expected, found = whole.gradients([random_batch(0)]), in_pieces.gradients([random_batch(0)])
    for name, gradient in expected.items():
        assert np.linalg.norm(found[name] - gradient) <= SAME_FUNCTION * np.linalg.norm(gradient), name


def test_embeddings_and_layers_on_the_host_leave_their_slots_alone_on_the_device(tmp_path: Path) -> None:
    trainer = trainer_of(write_model(tmp_path, "llama", num_hidden_layers=5), Compute(base_offload=EVERYWHERE))
    assert len(layers_of(trainer)._slots) == 2
    assert not any(parameter.numel() > HIDDEN for parameter in trainer._loaded.causal.parameters())


def test_cost_of_streaming_is_said_when_the_base_is_loaded(tmp_path: Path) -> None:
    path = write_model(tmp_path, "llama", num_hidden_layers=5)
    trainer = trainer_of(path, Compute(base_offload=("layers",)))
    all_bytes = figures.size(sum(size for size, _ in layers_of(trainer)._layers))
    assert any(f"{all_bytes} cross to the device" in note and "/s measured now" in note for note in trainer.load_notes)
    assert not trainer_of(path, Compute()).load_notes


def test_copy_that_is_not_awaited_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the equalities above rest on: a slot that still holds another layer gives other numbers."""
    path = write_model(tmp_path, "llama", num_hidden_layers=5)
    expected = trainer_of(path, Compute()).gradients([random_batch(0)])
    trainer = trainer_of(path, Compute(base_offload=("layers",)))
    base = layers_of(trainer)
    monkeypatch.setattr(base._queue, "copy", lambda target, source: None)
    found = trainer.gradients([random_batch(0)])
    assert any(not np.array_equal(found[name], gradient) for name, gradient in expected.items())


def test_each_pass_copies_each_layer_once_in_each_direction(tmp_path: Path) -> None:
    trainer = trainer_of(write_model(tmp_path, "llama", num_hidden_layers=5), Compute(base_offload=("layers",)))
    base = layers_of(trainer)
    trainer.gradients([random_batch(0)])
    before = base.copied_bytes
    trainer.gradients([random_batch(0)])
    layer, _ = base._layers[0]
    # Up: all but the two lowest, which are there from the pass before; down: all but the two highest.
    assert base.copied_bytes - before == 2 * (5 - 2) * layer


LAYERS: Any = ("layers",)
ON_DISK: Any = {"offloaded_layers": "disk"}


def test_layers_go_to_the_disk_where_the_memory_left_is_too_little_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path, "llama", num_hidden_layers=5)
    needed = sum(size for size, _ in layers_of(trainer_of(path, Compute(base_offload=LAYERS)))._layers)
    for left, kind, words in (
        (int(needed / (1 - HOST_SPARED)) + 1, HostLayers, "are in the host's memory:"),
        (int(needed / (1 - HOST_SPARED)) - 1, DiskLayers, f"they take {figures.size(needed)} and the host has"),
    ):
        monkeypatch.setattr(layers_at_rest, "memory_available_here", lambda left=left: left)
        trainer = trainer_of(path, Compute(base_offload=LAYERS))
        assert isinstance(layers_of(trainer).at_rest, kind)
        assert any(words in note for note in trainer.load_notes)


def test_layers_share_blocks_of_page_locked_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's allocator takes powers of two: 512 MiB for each layer of Qwen3-30B-A3B, which has 307."""
    for size in range(1, 4000):
        block = layers_at_rest.block_for(size)
        assert block == 1 << (block.bit_length() - 1)
        assert block - block // size * size <= block / 8
    assert layers_at_rest.block_for(307 * 2**20) == 2**30
    path = write_model(tmp_path, "llama", num_hidden_layers=5)
    expected = losses_and_adapter(trainer_of(path, Compute(base_offload=LAYERS)))
    monkeypatch.setattr(layers_at_rest, "has_queue", lambda device: True)
    trainer = trainer_of(path, Compute(base_offload=LAYERS))
    size, _ = layers_of(trainer)._layers[0]
    layers = [layers_of(trainer).at_rest.take(number) for number in range(5)]
    blocks = {layer.untyped_storage().data_ptr() for layer in layers}
    assert len(blocks) == -(-5 // (layers_at_rest.block_for(size) // size)) < 5
    assert_same_bits(losses_and_adapter(trainer), expected)


def test_memory_left_is_enough_for_all_ranks_of_the_host_or_layers_go_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They load at the same time: each sees the memory that the others are about to take."""
    path = write_model(tmp_path, "llama", num_hidden_layers=5)
    needed = sum(size for size, _ in layers_of(trainer_of(path, Compute(base_offload=LAYERS)))._layers)
    monkeypatch.setattr(loading, "most_ranks_here", lambda world, device: world.size)
    for ranks, kind in ((1, HostLayers), (3, HostLayers), (4, DiskLayers)):
        left = int(3 * needed / (1 - HOST_SPARED)) + 1
        monkeypatch.setattr(layers_at_rest, "memory_available_here", lambda left=left: left)
        trainer = trainer_of(path, Compute(base_offload=LAYERS, world=World(0, ranks)))
        assert isinstance(layers_of(trainer).at_rest, kind)
    assert any("for each of 4 ranks" in note for note in trainer.load_notes)


def test_a_host_has_no_more_ranks_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_ranks_here(World(3, 8), torch.device("cpu")) == 8
    assert most_ranks_here(World(3, 8, local_size=2), torch.device("cpu")) == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert most_ranks_here(World(3, 8), torch.device("cuda")) == 4
    assert most_ranks_here(World(0, 2), torch.device("cuda")) == 2
    assert most_ranks_here(World(3, 8, local_size=2), torch.device("cuda")) == 2


def test_layers_on_the_disk_leave_two_buffers_in_memory_and_no_file_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_HAL_CACHE", str(tmp_path / "cache"))
    trainer = trainer_of(
        write_model(tmp_path / "model", "llama", num_hidden_layers=7),
        Compute("float32", False, ON_DISK, base_offload=LAYERS),
    )
    trainer.gradients([random_batch(0)])
    at_rest = layers_of(trainer).at_rest
    assert isinstance(at_rest, DiskLayers)
    largest = max(size for size, _ in layers_of(trainer)._layers)
    assert [buffer.memory.numel() for buffer in at_rest._buffers] == [largest, largest]
    assert at_rest._end == sum(size for size, _ in layers_of(trainer)._layers)
    assert list((tmp_path / "cache").iterdir()) == []


def test_layer_is_read_while_the_one_before_the_last_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up, and down again; at the turn the third layer from the top is the only one that is waited for."""
    path = write_model(tmp_path, "llama", num_hidden_layers=6)
    base = layers_of(trainer_of(path, Compute("float32", False, ON_DISK, base_offload=LAYERS)))
    for number in (0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0):
        base.present(number)
    events = list[tuple[str, int]]()
    ahead = base.at_rest.ahead
    monkeypatch.setattr(base.at_rest, "ahead", lambda number: (events.append(("read", number)), ahead(number)))
    for direction, ends in ((1, range(6)), (-1, range(4, -1, -1))):
        events.clear()
        for number in ends:
            events.append(("computes", number))
            base.present(number)
        for number in (3, 4, 5) if direction == 1 else (2, 1, 0):
            assert events.index(("read", number)) < events.index(("computes", number - direction))


def test_wrong_bytes_on_the_disk_are_seen(tmp_path: Path) -> None:
    """What the equality with a resident base rests on: the file is what is computed with."""
    path = write_model(tmp_path, "llama", num_hidden_layers=5)
    expected = trainer_of(path, Compute()).gradients([random_batch(0)])
    trainer = trainer_of(path, Compute("float32", False, ON_DISK, base_offload=LAYERS))
    at_rest = layers_of(trainer).at_rest
    assert isinstance(at_rest, DiskLayers)
    at_rest._places[3] = at_rest._places[4]
    found = trainer.gradients([random_batch(0)])
    assert any(not np.array_equal(found[name], gradient) for name, gradient in expected.items())


def test_file_that_cannot_grow_is_an_error_with_its_way_out(tmp_path: Path) -> None:
    path = write_model(tmp_path, "llama", num_hidden_layers=5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StorageError, match="packed layers") as refused:
            trainer_of(path, Compute("float32", False, ON_DISK, base_offload=LAYERS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.value.code == "QH-S09"


def test_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    path = write_model(tmp_path, "llama", num_hidden_layers=5)
    trainer = trainer_of(path, Compute("float32", False, ON_DISK, base_offload=LAYERS))
    at_rest = layers_of(trainer).at_rest
    assert isinstance(at_rest, DiskLayers)
    at_rest._file.truncate(at_rest._places[2][0])
    with pytest.raises(StorageError, match="could not be read again") as refused:
        trainer.gradients([random_batch(0)])
    assert refused.value.code == "QH-S11"


def test_read_ahead_that_failed_is_no_matter_where_its_layer_is_not_wanted(tmp_path: Path) -> None:
    path = write_model(tmp_path, "llama", num_hidden_layers=5)
    trainer = trainer_of(path, Compute("float32", False, ON_DISK, base_offload=LAYERS))
    at_rest = layers_of(trainer).at_rest
    assert isinstance(at_rest, DiskLayers)
    expected = at_rest.take(1).clone()
    at_rest._file.truncate(at_rest._places[2][0])
    at_rest.ahead(3)
    assert torch.equal(at_rest.take(1), expected)
    with pytest.raises(StorageError, match="could not be read again"):
        at_rest.take(3)


def test_option_without_layers_to_move_is_told(tmp_path: Path) -> None:
    trainer = trainer_of(write_model(tmp_path, "llama"), Compute("float32", False, ON_DISK))
    assert any("offloaded_layers has no effect" in note for note in trainer.load_notes)


def test_layers_on_the_host_and_spread_over_ranks_are_refused_together(tmp_path: Path) -> None:
    compute = Compute(shard_base=True, base_offload=("layers",))
    with pytest.raises(UnsupportedFeatureError, match="not both"):
        trainer_of(write_model(tmp_path, "llama"), compute)


class Shifted(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1


class Model(nn.Module):
    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embeddings

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.parametrize("layer", [Shifted(9, 4), nn.Linear(9, 4)])
def test_embeddings_that_are_more_than_a_table_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedFeatureError, match="embeddings of this model"):
        host_tables.Tables.of(Model(layer), ("embeddings",)).move_to_host(Model(layer), DEVICE)


@pytest.mark.parametrize(
    ("parts", "where"), [(("embeddings",), "stays on the device"), (("head",), "goes to the host")]
)
def test_tied_table_goes_where_the_head_goes_and_that_is_said(parts: Any, where: str, tmp_path: Path) -> None:
    path = write_model(tmp_path, "llama", tie_word_embeddings=True)
    trainer = trainer_of(path, Compute(base_offload=parts))
    assert any(f"it {where}" in note for note in trainer.load_notes)
    assert (trainer._loaded.host_embedding is None) == (parts == ("embeddings",))
    expected = trainer_of(path, Compute()).evaluate([random_batch(0)]).loss
    assert trainer.evaluate([random_batch(0)]).loss == pytest.approx(expected, rel=SAME_FUNCTION)
