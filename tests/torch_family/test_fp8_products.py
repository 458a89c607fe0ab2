"""Products with the frozen base in 8-bit floats: the fused layers against their definition (`fp8_emulation`), the
kernels against plain torch, and what is refused.

The kernels run on a GPU, or in Triton's interpreter, which loses the carry where rounding to E4M3 reaches the next
power of two, rounds ties and subnormal values otherwise and multiplies the bits of bfloat16 (Triton 3.7): there such
elements are left out, and operands float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fp8_emulation import plain_layers_in_fp8, quantized, rounded
from fused_models import DEVICE, Model, load, packed, relative
from tiny_models import write_model
from torch import Tensor
from trainers import moved_adapter, random_batch, source_of

from qlora_hal.contract import dropout
from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.contract.values import AdapterConfig, Batch
from qlora_hal.errors import UnsupportedFeatureError
from qlora_hal_backends.cpu_torch import SPEC
from qlora_hal_backends.torch_family import fused
from qlora_hal_backends.torch_family.base_weights import exact, quantize
from qlora_hal_backends.torch_family.fused import attach as attaching
from qlora_hal_backends.torch_family.fused.attach import attach_with
from qlora_hal_backends.torch_family.fused.body import FusedBody
from qlora_hal_backends.torch_family.fused.families import activation_of
from qlora_hal_backends.torch_family.fused.fp8.kernel_trial import are_neighbours, differing
from qlora_hal_backends.torch_family.fused.fp8.operations import E4M3, Fp8Operations, LowRank, ScaledRows
from qlora_hal_backends.torch_family.fused.fp8.products import FP8_WORDS, Fp8Products
from qlora_hal_backends.torch_family.fused.fp8.reference import ReferenceFp8
from qlora_hal_backends.torch_family.fused.layer_weights import GroupBuffer, GroupShape, Slot
from qlora_hal_backends.torch_family.fused.reference import ReferenceOperations
from qlora_hal_backends.torch_family.fused.supported import fp8_device_refusal, fp8_model_refusal
from qlora_hal_backends.torch_family.lora_linear import words_on
from qlora_hal_backends.torch_family.platform import CPU, CUDA
from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer

pytestmark = pytest.mark.filterwarnings(
    # Triton's interpreter on NumPy 2.
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
)

REFERENCE = ReferenceFp8()
SAME_FUNCTION = 1e-5
"""As of `fused_models`. Where float32 rounding takes an element to its other neighbour of E4M3, a sixteenth of it away,
all that is computed from it is rounded otherwise; then there is no telling two draws of that error apart. So several
batches are compared: most meet no such element, and a fault is in all of them."""
NF4 = Quantization(WeightFormat.NF4, 64, True)


def body_of(model: Model, operations: Fp8Operations = REFERENCE, **changes: object) -> FusedBody:
    compute = replace(model.compute, **changes)  # type: ignore[arg-type]
    of_model = ReferenceOperations(activation_of(model.base))  # type: ignore[arg-type]
    return attach_with(of_model, model.base, model.flat, compute, fp8=operations, tile_rows=15)


def assert_is_the_definition(
    model: Model, body: FusedBody, arrange: Callable[[Batch], Batch] = lambda batch: batch
) -> None:
    errors, of_rounding = [], []
    for seed in (3, 4, 5, 6):
        batch = arrange(random_batch(seed))
        with plain_layers_in_fp8(model.base.linears):
            expected_loss, expected = model.gradient(model.plain, batch)
        loss, found = model.gradient(body.batch_loss, batch)
        unrounded_loss, unrounded = model.gradient(model.plain, batch)
        errors.append(max(relative(found, expected), abs(loss / expected_loss - 1.0)))
        of_rounding.append(relative(unrounded, expected))
        assert unrounded_loss != expected_loss
    assert min(errors) < SAME_FUNCTION
    assert max(errors) < 0.5 * min(of_rounding)


# the fused layers -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recompute", [None, "selective", "full", "offload"])
@pytest.mark.parametrize("family", ["llama with biases", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("arrange", [lambda batch: batch, packed], ids=["one sample a row", "packed"])
def test_loss_and_gradients_are_those_of_the_definition(
    arrange: Callable[[Batch], Batch], family: str, recompute: str | None, tmp_path: Path
) -> None:
    """Batch after batch: what one pass leaves in shared memory must not reach the next."""
    model = load(tmp_path, family)
    body = body_of(model, gradient_checkpointing=recompute is not None, recompute=recompute or "full")
    assert_is_the_definition(model, body, arrange)


@pytest.mark.parametrize("recompute", [None, "full"])
def test_one_layer_is_decoded_anew_each_time_it_turns(recompute: str | None, tmp_path: Path) -> None:
    """No other layer takes its place between forward and backward, nor before the next forward."""
    model = load(tmp_path, changes={"num_hidden_layers": 1})
    assert_is_the_definition(model, body_of(model, gradient_checkpointing=recompute is not None))


@pytest.mark.parametrize("recompute", [None, "full"])
def test_dropout_is_of_the_adapters_input_alone(recompute: str | None, tmp_path: Path) -> None:
    model = load(tmp_path, targets=lambda module: "layers.0." in module or "v_proj" in module, dropout=0.3)
    body = body_of(model, gradient_checkpointing=recompute is not None)
    _, without = model.gradient(body.batch_loss, random_batch(3))
    words = dropout.token_words(2**40 + 3, np.arange(2, dtype=np.int32), 20)
    model.flat.switches.token_words = words_on(words.reshape(-1), DEVICE)
    assert_is_the_definition(model, body)
    _, found = model.gradient(body.batch_loss, random_batch(3))
    assert relative(without, found) > 1000 * SAME_FUNCTION


@pytest.mark.parametrize("weight_format", ["nf4", "fp4"])
def test_a_streamed_base_gives_the_bits_of_a_resident_one(weight_format: str, tmp_path: Path) -> None:
    path = write_model(tmp_path, "llama", num_hidden_layers=4)
    results = []
    for parts in ((), ("layers",)):
        trainer = TorchLoRATrainer(SPEC, CPU)
        storage = replace(NF4, weight_format=WeightFormat(weight_format))
        trainer.load(source_of(path), storage, Compute("float32", base_offload=parts))  # type: ignore[arg-type]
        modules = trainer.linear_modules()
        trainer.attach(moved_adapter(AdapterConfig(4, 8.0, target_modules=tuple(sorted(modules))), modules), "adamw")
        base, flat = trainer._loaded, trainer._attached
        model = Model(base, flat, Compute("float32"))
        assert (base.streamed is not None) == bool(parts)
        results.append(model.gradient(body_of(model).batch_loss, random_batch(1), random_batch(2)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_evaluation_computes_as_training_does(tmp_path: Path) -> None:
    from qlora_hal_backends.torch_family import step

    model = load(tmp_path)
    body = body_of(model)
    loss, _ = model.gradient(body.batch_loss, random_batch(1))
    with torch.no_grad():
        assert body.batch_loss(step.to_device(random_batch(1), DEVICE), 1.0).item() == loss
    assert body.words == f"fused layers, {FP8_WORDS}, packed rows sample by sample"


def test_a_young_adapter_is_added_before_the_sum_is_rounded() -> None:
    rows, columns, r = 64, 128, 8
    generator = torch.Generator().manual_seed(0)
    shape = GroupShape([Slot("only", slice(0, rows), slice(0, r))], columns, r)
    base = quantize(torch.randn(rows, columns, generator=generator).bfloat16(), NF4, torch.bfloat16)
    a, b = (torch.randn(*size, generator=generator).bfloat16() for size in ((r, columns), (rows, r)))
    memory = torch.empty(2 * rows * columns, dtype=E4M3)
    products = Fp8Products(shape, memory, a, b * 0.002, REFERENCE)
    group = type("Group", (), {"bases": [base]})()
    products.take(group)
    buffer = GroupBuffer(shape, 2.0, products, ReferenceOperations())
    extended = torch.randn(32, columns + r, generator=generator).bfloat16()
    low_rank = buffer.low_rank(extended[:, :columns], extended[:, columns:])
    assert low_rank is not None
    e, s = quantized(exact(base))
    x, scales = quantized(extended[:, :columns].float())
    expected = (scales * x).double() @ (s * e).double().t() + low_rank.double() @ buffer.b.double().t()
    found = buffer.product(extended, None).double()
    assert ((found - expected).abs() <= 2.0**-8 * expected.abs() + 136 * 2.0**-24 * 16).all()


def test_memory_is_that_of_the_joined_products(tmp_path: Path) -> None:
    model = load(tmp_path, r=8)
    for recomputes, bytes_an_element in ((False, 1), (True, 2)):
        rooms = body_of(model, gradient_checkpointing=recomputes).schedule.buffers._rooms
        for products in rooms.products.values():
            assert isinstance(products, Fp8Products)
            elements = products._e.numel()
            both = {products._e.data_ptr(), products._e_transposed.data_ptr()}
            assert max(both) - min(both) == (bytes_an_element - 1) * elements


def test_each_direction_is_decoded_once_a_layer_and_scales_are_found_once(tmp_path: Path) -> None:
    class Counting(ReferenceFp8):
        scales = decoded = 0

        def row_scales(self, base: object, out: Tensor) -> None:
            self.scales += 1
            super().row_scales(base, out)  # type: ignore[arg-type]

        def decode(self, base: object, scales: Tensor, out: Tensor) -> None:
            self.decoded += 1
            super().decode(base, scales, out)  # type: ignore[arg-type]

    model, operations = load(tmp_path), Counting()
    body = body_of(model, operations)
    model.gradient(body.batch_loss, random_batch(1), random_batch(2))
    layers, linears = len(body.layers), 7
    assert operations.scales == layers * linears
    # Forward and backward of two batches; the input of the lowest layer's first group has no gradient.
    assert operations.decoded == 2 * (2 * layers * linears - 3)


# the kernels ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def kernels() -> Fp8Operations:
    assert DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1", "without a GPU, set TRITON_INTERPRET=1"
    from qlora_hal_backends.torch_family.fused.fp8.triton_operations import TritonFp8

    return TritonFp8()


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_same_values(found: Tensor, expected: Tensor) -> None:
    """On a GPU, but for the last bit of what bitsandbytes decodes; see above of the interpreter."""
    found, expected = found.float(), expected.float()
    assert found.isfinite().all()
    if DEVICE.type == "cuda":
        assert are_neighbours(found, expected)
        return
    judged = (torch.frexp(expected).mantissa.abs() != 0.5) & (expected.abs() >= 2.0**-6)
    differs = judged & (found != expected)
    assert judged.float().mean() > 0.5
    assert differs.float().mean() < 0.01
    assert ((found - expected).abs() <= expected.abs() / 8)[differs].all()


@pytest.mark.needs_triton
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("weight_format", [WeightFormat.NF4, WeightFormat.FP4])
@pytest.mark.parametrize(("block_size", "shape"), [(64, (80, 192)), (256, (48, 512)), (64, (64, 96))])
def test_a_base_is_decoded_to_its_rounded_rows(
    kernels: Fp8Operations, double_quant: bool, weight_format: WeightFormat, block_size: int, shape: tuple[int, int]
) -> None:
    weight = random(*shape)
    weight[5] = 0.0
    base = quantize(weight.bfloat16(), Quantization(weight_format, block_size, double_quant), torch.bfloat16)
    scales, expected_scales = torch.zeros(shape[0], device=DEVICE), torch.zeros(shape[0], device=DEVICE)
    kernels.row_scales(base, scales)
    REFERENCE.row_scales(base, expected_scales)
    torch.testing.assert_close(scales, expected_scales, rtol=2.0**-22, atol=0.0)
    if not double_quant:  # with it, the offset of the blocks' scales is left
        assert scales[5] == 1.0
    expected = torch.zeros(shape, dtype=E4M3, device=DEVICE)
    REFERENCE.decode(base, expected_scales, expected)
    wide = torch.zeros(shape[0] + 16, shape[1], dtype=E4M3, device=DEVICE)
    across = torch.zeros(shape[1], shape[0] + 16, dtype=E4M3, device=DEVICE)
    kernels.decode(base, expected_scales, wide[16:])
    kernels.decode(base, expected_scales, across.t()[16:])
    assert_same_values(wide[16:], expected)
    assert_same_values(across.t()[16:], expected)
    assert not wide[:16].float().any()
    assert not across[:, :16].float().any()


@pytest.mark.needs_triton
@pytest.mark.parametrize("columns", [None, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_by_their_own_scales(kernels: Fp8Operations, dtype: torch.dtype, columns: int | None) -> None:
    x = (random(37, 208) * torch.logspace(-6, 3, 37, device=DEVICE)[:, None]).to(dtype)[:, :192]
    x[4] = 0.0
    column_scales = None if columns is None else random(columns, seed=1).abs() * 1e-3
    found, expected = kernels.quantize_rows(x, column_scales), REFERENCE.quantize_rows(x, column_scales)
    torch.testing.assert_close(found.scales, expected.scales, rtol=2.0**-23, atol=0.0)
    assert found.scales[4] == 1.0
    assert_same_values(found.values, expected.values)


@pytest.mark.needs_triton
@pytest.mark.parametrize("exact_sum", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [0, 8, 24, 168])
@pytest.mark.parametrize("by_rank", [False, True])
def test_products_are_those_of_their_operands(
    kernels: Fp8Operations, by_rank: bool, ranks: int, bias: bool, exact_sum: bool
) -> None:
    """Of more than one tile each way and parts of one, into a part of a wider buffer."""
    from qlora_hal_backends.torch_family.fused.fp8.triton_operations import INTERPRETED, TritonFp8, tiles_for

    rows, columns, inner = (300, 592, 336) if DEVICE.type == "cuda" else (50, 80, 112)
    tiles = replace(tiles_for(DEVICE), exact=True) if DEVICE.type == "cuda" else replace(INTERPRETED, parts=2)
    operations = TritonFp8(tiles) if exact_sum else kernels
    left = REFERENCE.quantize_rows(random(rows, inner), None)
    right, scales = rounded(random(columns, inner, seed=1) * 100).to(E4M3), random(columns, seed=2).abs()
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    low_rank = None
    if ranks:
        adapter = random(ranks, columns, seed=3).to(dtype).t() if by_rank else random(columns, ranks, seed=3).to(dtype)
        low_rank = LowRank(random(rows, inner + ranks, seed=4).to(dtype)[:, inner:], adapter)
    given = left, right, None if by_rank else scales, low_rank, random(columns, seed=5).to(dtype) if bias else None
    wide = torch.full((rows + 2, columns + 16), float("nan"), device=DEVICE)
    expected = torch.zeros(rows, columns, device=DEVICE)
    operations.product(*given, wide[1:-1, :columns])
    REFERENCE.product(*given, expected)
    found = wide[1:-1, :columns]
    # Float32 sums in another order; on Hopper, but for exact sums, those of tensor cores with 14 bits.
    error = 2.0**-13 if DEVICE.type != "cuda" else 2.0**-10 if exact_sum else 2.0**-8
    assert (found - expected).abs().max() <= error * expected.square().mean().sqrt()
    assert wide[[0, -1]].isnan().all()
    assert wide[:, columns:].isnan().all()


# on a GPU -------------------------------------------------------------------------------------------------------------
@pytest.mark.needs_cuda
def test_the_kernels_prove_themselves_on_this_gpu() -> None:
    from qlora_hal_backends.torch_family.fused.fp8.triton_operations import TritonFp8

    assert fp8_device_refusal(torch.device("cuda", 0)) is None
    assert differing(TritonFp8(), REFERENCE, torch.device("cuda")) == []


@pytest.mark.needs_cuda
def test_a_young_adapter_survives_beside_the_base_on_this_gpu(kernels: Fp8Operations) -> None:
    left = REFERENCE.quantize_rows(random(512, 4096), None)
    right = REFERENCE.quantize_rows(random(1024, 4096, seed=1), None)
    low_rank = LowRank(random(512, 16, seed=2).bfloat16(), (random(1024, 16, seed=3) * 2.0**-9).bfloat16())
    alone, joined = (torch.empty(512, 1024, device=DEVICE) for _ in range(2))
    kernels.product(left, right.values, right.scales, None, None, alone)
    kernels.product(left, right.values, right.scales, low_rank, None, joined)
    expected = low_rank.left.float() @ low_rank.right.float().t()
    # The base's sum is of size 64, at most 400, the adapter's 2^-7: of float32's 24 bits, 8 are left below it.
    assert (joined - alone - expected).abs().max() < 0.05 * expected.square().mean().sqrt()


@pytest.mark.needs_cuda
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}], ids=["kept", "recomputed"])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_trained_model_is_that_of_the_reference_on_this_gpu(
    rate: float, changes: dict[str, object], tmp_path: Path
) -> None:
    model = load(tmp_path, "qwen3", dtype="bfloat16", dropout=rate)
    if rate:
        words = dropout.token_words(2**40 + 3, np.arange(2, dtype=np.int32), 20)
        model.flat.switches.token_words = words_on(words.reshape(-1), DEVICE)
    batch = random_batch(3)
    _, in_bfloat16 = model.gradient(model.plain, batch)
    compute = replace(model.compute, fp8_products=True, **changes)  # type: ignore[arg-type]
    body = fused.try_attach(model.base, model.flat, compute, torch.device("cuda"))
    assert isinstance(body, FusedBody), body
    with_reference = attach_with(body.schedule.operations, model.base, model.flat, compute, fp8=REFERENCE)
    expected_loss, expected = model.gradient(with_reference.batch_loss, batch)
    assert FP8_WORDS in body.words
    loss, found = model.gradient(body.batch_loss, batch)
    # Logits of size one are off by E4M3's unit roundoff and more, a tenth of a nat for a token: 0.1 sqrt(40) of the sum
    # of 215 nats is 3e-3 of it, and three times that is allowed.
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    # Sums of 14 bits are now and then another bfloat16, and that another E4M3; a fault is as large as what fp8 costs.
    assert relative(found, expected) < 0.7 * relative(expected, in_bfloat16)


@pytest.mark.needs_cuda
def test_a_trainer_trains_in_fp8_and_says_so(tmp_path: Path) -> None:
    from qlora_hal_backends.cuda_bnb import SPEC as ON_CUDA

    trainer = TorchLoRATrainer(ON_CUDA, CUDA)
    trainer.load(source_of(write_model(tmp_path, "llama")), NF4, Compute("bfloat16", fp8_products=True))
    modules = trainer.linear_modules()
    trainer.attach(moved_adapter(AdapterConfig(4, 8.0, target_modules=tuple(sorted(modules))), modules), "adamw")
    assert FP8_WORDS in trainer.device_facts().kernel_path
    before = trainer.evaluate([random_batch(1)]).loss
    from qlora_hal.contract.values import StepSettings

    for _ in range(8):
        trainer.train_step([random_batch(1)], StepSettings(1e-2, random_batch(1).counted_tokens)).resolve()
    assert trainer.evaluate([random_batch(1)]).loss < before


# what is refused ------------------------------------------------------------------------------------------------------
def refusing_trainer() -> TorchLoRATrainer:
    """On the CPU, with a spec that declares what the device has not."""
    able = replace(SPEC.capabilities, features=SPEC.capabilities.features | {Feature.FP8_PRODUCTS})
    return TorchLoRATrainer(replace(SPEC, capabilities=able), CPU)


def test_a_device_without_them_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    path = write_model(tmp_path, "llama")
    source = source_of(path)
    for file in path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UnsupportedFeatureError, match="not possible: cpu have none here") as refusal:
        refusing_trainer().load(source, NF4, Compute("bfloat16", fp8_products=True))
    assert (refusal.value.code, refusal.value.where) == ("QH-B01", "quantization.compute_dtype")
    assert "bfloat16" in refusal.value.fix


@pytest.mark.parametrize(
    ("capability", "words"), [((8, 6), "of compute capability 8.6, and E4M3 came with 8.9"), ((8, 9), None)]
)
def test_older_gpus_are_refused(
    capability: tuple[int, int], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = fp8_device_refusal(torch.device("cuda", 0))
    assert reason is None if words is None else words in str(reason)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert fp8_device_refusal(torch.device("cuda", 0)) == "AMD GPUs have none here"


@pytest.mark.parametrize(
    ("storage", "compute", "words"),
    [
        (Quantization(WeightFormat.NONE), Compute("bfloat16"), "stored as none, not as nf4 or fp4"),
        (Quantization(WeightFormat.INT8), Compute("bfloat16"), "stored as int8, not as nf4 or fp4"),
        (NF4, Compute("float16"), "in bfloat16, not float16"),
        (NF4, Compute("bfloat16", options={"layers": "plain"}), "backend.options.layers: plain leaves out"),
        (NF4, Compute("bfloat16", options={"attention": "eager"}), "backend.options.attention: eager leaves out"),
    ],
)
def test_settings_without_them_are_refused(
    storage: Quantization, compute: Compute, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_hal_backends.torch_family.fused.fp8 import refusals

    monkeypatch.setattr(refusals, "fp8_device_refusal", lambda device: None)
    facts = source_of(write_model(tmp_path, "llama")).facts
    with pytest.raises(UnsupportedFeatureError, match=words):
        refusals.check_fp8(facts, storage, replace(compute, fp8_products=True), torch.device("cuda", 0))
    refusals.check_fp8(facts, NF4, Compute("bfloat16", fp8_products=True), torch.device("cuda", 0))


def test_mixtures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_hal_backends.torch_family.fused.fp8 import refusals

    monkeypatch.setattr(refusals, "fp8_device_refusal", lambda device: None)
    facts = source_of(write_model(tmp_path, "qwen3_moe")).facts
    with pytest.raises(UnsupportedFeatureError, match="is a mixture of experts"):
        refusals.check_fp8(facts, NF4, Compute("bfloat16", fp8_products=True), torch.device("cuda", 0))


def test_a_base_of_another_format_has_none(tmp_path: Path) -> None:
    model = load(tmp_path / "int8", weight_format=WeightFormat.INT8)
    assert fp8_model_refusal(model.base) == "the base is of Int8Weight, not of nf4 or fp4"
    assert fp8_model_refusal(load(tmp_path / "nf4").base) is None


def test_a_model_that_keeps_its_plain_layers_is_refused_not_trained_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "check_fp8", lambda *given: None)
    monkeypatch.setattr(attaching, "device_refusal", lambda device: None)
    trainer = refusing_trainer()
    trainer.load(source_of(write_model(tmp_path, "cohere")), NF4, Compute("bfloat16", fp8_products=True))
    modules = trainer.linear_modules()
    adapter = moved_adapter(AdapterConfig(4, 8.0, target_modules=tuple(sorted(modules))), modules)
    with pytest.raises(UnsupportedFeatureError, match="layers of type CohereDecoderLayer are not in the fused"):
        trainer.attach(adapter, "adamw")
    assert trainer._flat is None, "it must not train without them after all"


def test_a_scaled_row_is_its_values_by_its_scale() -> None:
    found = REFERENCE.quantize_rows(torch.tensor([[0.0, -3.5, 7.0], [0.0, 0.0, 0.0]]), None)
    assert isinstance(found, ScaledRows)
    assert torch.equal(found.values.float() * found.scales[:, None], torch.tensor([[0.0, -3.5, 7.0], [0.0] * 3]))
