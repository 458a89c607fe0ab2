"""Routed experts: what transformers and PEFT compute, packed and adapted one by one, in float32 on a CPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from against_transformers import compare, reference_of
from bitsandbytes import functional as codec
from drawn_models import write_drawn_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import open_cpu_trainer, random_batch, source_of

from qlora_hal.adapter.naming import lora_a_key, lora_b_key
from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.errors import ModelError, UnsupportedFeatureError
from qlora_hal.model.expert_stacks import path_of
from qlora_hal_backends.torch_family import optimizer as optimizer_module
from qlora_hal_backends.torch_family.base_weights import quantize
from qlora_hal_backends.torch_family.experts import products as products_module
from qlora_hal_backends.torch_family.experts import proved_products, stacked_weights
from qlora_hal_backends.torch_family.experts.products import GroupedProducts, Groups, LoopOverExperts
from qlora_hal_backends.torch_family.experts.stacked_weights import StackedWeight, stacked
from qlora_hal_backends.torch_family.lora_linear import LoRASwitches, LoRAWeights
from qlora_hal_backends.torch_family.optimizer import BitsandbytesAdamW
from qlora_hal_backends.torch_family.outline import outline
from qlora_hal_backends.torch_family.platform import CPU
from qlora_hal_backends.torch_family.trainer import TorchLoRATrainer

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"]
FURTHER = ["qwen3_next", "deepseek_v2", "glm4_moe", "olmoe", "dots1", "hunyuan_v1_moe", "exaone_moe", "flex_olmo"]
FURTHER += ["granitemoe", "granitemoeshared"]
UP = "model.layers.1.mlp.experts.up_proj"


@pytest.mark.parametrize("model_type", [*MIXTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in FURTHER)])
def test_logits_loss_and_gradients_are_those_of_transformers_and_peft(model_type: str, tmp_path: Path) -> None:
    write_drawn_model(tmp_path, model_type)
    shapes = outline(source_of(tmp_path), {}).linear_modules
    assert any(shape.experts == 4 for shape in shapes.values())
    assert dict(source_of(tmp_path).facts.linear_modules) == dict(shapes), "headers tell what the loaded model has"
    found = compare(tmp_path, reference_of(tmp_path))
    assert found["result"] == "equal", found


@pytest.mark.parametrize("double_quant", [False, True])
def test_each_expert_is_packed_as_its_layer_would_be(double_quant: bool, tmp_path: Path) -> None:
    """Sides that are whole blocks, and sides that are not: bitsandbytes' bits for the two-dimensional weight."""
    for width in (32, 40):
        folder = tmp_path / str(width)
        write_drawn_model(folder, "qwen3_moe", {"moe_intermediate_size": width})
        opened = open_cpu_trainer(folder, weight_format="nf4" if double_quant else "fp4")
        stored = load_file(folder / "model.safetensors")
        found = opened.trainer.dequantized_weight(UP)
        for number in range(4):
            weight = stored[f"{path_of(UP, number)}.weight"].float()
            kind = "nf4" if double_quant else "fp4"
            packed, state = codec.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type=kind)
            expected = codec.dequantize_4bit(packed, state)
            if width % 64 == 0:
                np.testing.assert_array_equal(found[number], expected.numpy())
            stack = opened.trainer._base.linears[UP].base  # type: ignore[attr-defined]
            assert torch.equal(stack.packed[number], packed.flatten())
            np.testing.assert_array_equal(stack.expert(number).numpy(), found[number])


def test_a_checkpoint_with_all_experts_in_one_tensor_is_the_same_model(tmp_path: Path) -> None:
    write_drawn_model(tmp_path / "each", "qwen3_moe")
    stored = load_file(tmp_path / "each" / "model.safetensors")
    joined: dict[str, torch.Tensor] = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"
        by_expert = [
            {leaf: stored[f"{block}.{number}.{leaf}.weight"] for leaf in ("gate_proj", "up_proj", "down_proj")}
            for number in range(4)
        ]
        joined[f"{block}.gate_up_proj"] = torch.stack(
            [torch.cat((expert["gate_proj"], expert["up_proj"])) for expert in by_expert]
        )
        joined[f"{block}.down_proj"] = torch.stack([expert["down_proj"] for expert in by_expert])
    (tmp_path / "joined").mkdir()
    save_file(joined, tmp_path / "joined" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "joined" / "config.json").write_bytes((tmp_path / "each" / "config.json").read_bytes())
    trainers = [open_cpu_trainer(tmp_path / name, weight_format="nf4") for name in ("each", "joined")]
    assert trainers[0].trainer.linear_modules() == trainers[1].trainer.linear_modules()
    batch = random_batch(0)
    np.testing.assert_array_equal(trainers[0].trainer.logits(batch), trainers[1].trainer.logits(batch))


def test_a_checkpoint_that_stores_experts_twice_is_refused(tmp_path: Path) -> None:
    """One by one and in one tensor: nothing says which is meant."""
    write_drawn_model(tmp_path, "qwen3_moe")
    stored = load_file(tmp_path / "model.safetensors")
    block = "model.layers.0.mlp.experts"
    both = torch.stack([stored[f"{block}.{number}.down_proj.weight"] for number in range(4)])
    save_file({**stored, f"{block}.down_proj": both}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as refused:
        open_cpu_trainer(tmp_path)
    assert refused.value.code == "QH-M51"


def test_a_device_without_grouped_products_says_why_it_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("no kernel for this device\nand more")

    device, multiply = torch.device("cpu"), torch.nn.functional.grouped_mm
    assert proved_products.__wrapped__(device, grouped=False).words == "experts one by one"
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lacking, raising=False)
    assert proved_products.__wrapped__(device, grouped=True).words == (
        "experts one by one (grouped products do not run here: RuntimeError: no kernel for this device)"
    )
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *given, **offsets: multiply(*given, **offsets) + 1)
    assert "something else" in proved_products.__wrapped__(device, grouped=True).words


def test_device_facts_say_how_experts_are_computed(tmp_path: Path) -> None:
    write_drawn_model(tmp_path, "qwen3_moe")
    assert open_cpu_trainer(tmp_path).trainer.device_facts().kernel_path.endswith("; experts one by one")


def test_recomputed_layers_have_the_same_gradients(tmp_path: Path) -> None:
    write_drawn_model(tmp_path, "qwen3_moe")
    batch = random_batch(0)
    plain, recomputed = (
        open_cpu_trainer(tmp_path, checkpointing=again).trainer.gradients([batch]) for again in (False, True)
    )
    for name, gradient in plain.items():
        np.testing.assert_array_equal(gradient, recomputed[name])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_an_expert_without_tokens_keeps_its_adapter_and_moments(optimizer: str, tmp_path: Path) -> None:
    """Of 16 experts, 4 tokens of 2 each reach at most 8. Its momentum and its decay would move it otherwise."""
    write_drawn_model(tmp_path, "qwen3_moe", {"num_experts": 16, "num_local_experts": 16})
    opened = open_cpu_trainer(tmp_path, optimizer=optimizer)
    everyone, few = random_batch(0, rows=8), random_batch(1, rows=1, time=4, prompt=1)
    for _ in range(2):
        opened.step([everyone], weight_decay=0.1)
    gradients = opened.trainer.gradients([few])
    before, moments = opened.trainer.export_adapter().tensors, opened.trainer.export_optimizer().moments
    opened.step([few], weight_decay=0.1)
    after, moments_after = opened.trainer.export_adapter().tensors, opened.trainer.export_optimizer().moments
    a, b = lora_a_key(UP), lora_b_key(UP)
    idle = [n for n in range(16) if not gradients[a][n].any() and not gradients[b][n].any()]
    assert 8 <= len(idle) < 16
    assert any(moments[f"{b}.exp_avg"][number].any() for number in idle), "they have momentum"
    for number in range(16):
        unchanged = [
            np.array_equal(old[name][number], new[name][number])
            for old, new, names in (
                (before, after, (a, b)),
                (moments, moments_after, [f"{key}.{kind}" for key in (a, b) for kind in ("exp_avg", "exp_avg_sq")]),
            )
            for name in names
        ]
        assert all(unchanged) if number in idle else not any(unchanged)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("paged", [True, False], ids=["paged", "resident"])
@pytest.mark.parametrize("eight_bit", [True, False], ids=["8 bits", "32 bits"])
def test_what_an_update_keeps_of_idle_experts_is_a_part_of_the_adapter(
    eight_bit: bool, paged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes' update by parts, of which the last is not whole: the same bits as of all at once."""
    write_drawn_model(tmp_path, "qwen3_moe", {"num_experts": 16, "num_local_experts": 16})

    def after_steps() -> tuple[dict[str, Any], dict[str, Any]]:
        opened = open_cpu_trainer(tmp_path)
        trainer = opened.trainer
        trainer._optimizer = BitsandbytesAdamW(trainer._flat, eight_bit=eight_bit, paged=paged)  # type: ignore[attr-defined]
        few = random_batch(1, rows=1, time=4, prompt=1)
        for batch in (few, random_batch(0, rows=8), few, few):
            opened.step([batch], weight_decay=0.1)
        snapshot = trainer.export_optimizer()
        return dict(trainer.export_adapter().tensors), {**snapshot.moments, "step": np.array(snapshot.step)}

    whole = after_steps()
    kept: list[int] = []
    leave = optimizer_module._left_as_they_are

    def watched(blocks: Sequence[torch.Tensor], idle: torch.Tensor) -> Any:
        kept.append(blocks[0].numel())
        return leave(blocks, idle)

    monkeypatch.setattr(optimizer_module, "_left_as_they_are", watched)
    monkeypatch.setattr(optimizer_module, "AT_A_TIME", 40 * 256)
    for expected, found in zip(whole, after_steps(), strict=True):
        for name, tensor in expected.items():
            np.testing.assert_array_equal(found[name], tensor)
    assert len(kept) > 3
    assert max(kept) == 40 * 256


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_parts_of_paged_moments_are_fetched_as_paged_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has none: two attributes are all that bitsandbytes tells them by."""
    write_drawn_model(tmp_path, "qwen3_moe", {"num_experts": 16, "num_local_experts": 16})
    opened = open_cpu_trainer(tmp_path)
    flat = opened.trainer._flat  # type: ignore[attr-defined]
    optimizer = opened.trainer._optimizer = BitsandbytesAdamW(flat, eight_bit=True, paged=True)  # type: ignore[attr-defined]
    batch = random_batch(1, rows=1, time=4, prompt=1)
    opened.step([batch])
    moments = [optimizer._inner.state[optimizer._parameter][key] for key in ("state1", "state2")]
    for moment in moments:
        moment.is_paged, moment.page_deviceid = True, 3
    fetched: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "bitsandbytes.functional.prefetch_tensor", lambda part: fetched.append((part.page_deviceid, part.numel()))
    )
    monkeypatch.setattr(optimizer_module, "AT_A_TIME", 40 * 256)
    opened.step([batch])
    assert len(fetched) > 2
    assert {device for device, _ in fetched} == {3}
    assert max(numbers for _, numbers in fetched) == 40 * 256
    assert sum(numbers for _, numbers in fetched) == sum(moment.numel() for moment in moments)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_of_equal_scores_the_lower_number_wins(model_type: str, tmp_path: Path) -> None:
    """A router whose rows are one row: transformers' choice is whatever torch.topk gives."""
    write_drawn_model(tmp_path, model_type, {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8})
    stored = load_file(tmp_path / "model.safetensors")
    routers = [name for name in stored if name.endswith("mlp.gate.weight")]
    stored |= {name: stored[name][:1].expand_as(stored[name]).contiguous() for name in routers}
    stored |= {name: torch.zeros_like(stored[name]) for name in stored if name.endswith("e_score_correction_bias")}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened = open_cpu_trainer(tmp_path)
    chosen: list[Any] = []
    for block in opened.trainer._base.experts:  # type: ignore[attr-defined]
        block.register_forward_pre_hook(lambda _, given: chosen.append(given[1]))
    opened.trainer.logits(random_batch(0))
    assert chosen
    for experts in chosen:
        first = torch.arange(experts.shape[-1]).expand_as(experts)
        assert torch.equal(experts.sort(dim=-1).values, first)


def test_the_router_and_the_shared_gate_are_neither_packed_nor_trained(tmp_path: Path) -> None:
    write_drawn_model(tmp_path, "qwen2_moe")
    opened = open_cpu_trainer(tmp_path, weight_format="nf4")
    stored = load_file(tmp_path / "model.safetensors")
    held = dict(opened.trainer._base.causal.named_parameters())  # type: ignore[attr-defined]
    for name in ("model.layers.0.mlp.gate.weight", "model.layers.0.mlp.shared_expert_gate.weight"):
        np.testing.assert_array_equal(held[name].detach().numpy(), stored[name].numpy())
        assert not held[name].requires_grad


@pytest.mark.fault("U24")
def test_dropout_on_stacked_experts_is_refused_by_the_trainer_too(tmp_path: Path) -> None:
    write_drawn_model(tmp_path, "qwen3_moe")
    with pytest.raises(UnsupportedFeatureError) as refusal:
        open_cpu_trainer(tmp_path, dropout=0.1)
    assert refusal.value.code == "QH-U24"
    attention = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert open_cpu_trainer(tmp_path, dropout=0.1, targets=attention).step([random_batch(0)]).applied


@pytest.mark.fault("M50")
def test_a_projection_that_is_not_stored_is_named(tmp_path: Path) -> None:
    write_drawn_model(tmp_path, "qwen3_moe")
    stored = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if "layers.1.mlp.experts.2.up_proj" not in name}
    # With the number of the last expert gone, headers alone tell nothing but a smaller stack.
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"Expert 2 of model\.layers\.1\.mlp\.experts\.up_proj") as refusal:
        source_of(tmp_path)
    assert refusal.value.code == "QH-M50"
    kept |= {f"{path_of(UP, number)}.weight": stored[f"{path_of(UP, number)}.weight"] for number in range(4)}
    kept = {name: tensor for name, tensor in kept.items() if "layers.1" not in name or "up_proj" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 tensors missing") as refusal:
        outline(source_of(tmp_path), {})
    assert refusal.value.code == "QH-M50"


def test_an_adapter_switched_off_leaves_the_base(tmp_path: Path) -> None:
    write_drawn_model(tmp_path, "mixtral")
    opened, batch = open_cpu_trainer(tmp_path), random_batch(0)
    base = opened.trainer.token_losses(batch, adapter=False)
    zero = {name: tensor * ("lora_A" in name) for name, tensor in opened.adapter.tensors.items()}
    opened.trainer.attach(replace(opened.adapter, tensors=zero))
    np.testing.assert_allclose(opened.trainer.token_losses(batch), base, rtol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_grouped_products_are_those_of_the_loop(nested: bool) -> None:
    """In bfloat16, as on a GPU; torch has the same call on a CPU. One expert has no rows."""
    generator = torch.Generator().manual_seed(0)
    quantization = Quantization(WeightFormat.NF4, 64, nested)
    layers = [quantize(torch.randn(64, 256, generator=generator), quantization, torch.bfloat16) for _ in range(3)]
    weight = stacked(layers)
    assert torch.equal(weight.dense(), torch.stack([layer.dense() for layer in layers]))
    a, b = (0.1 * torch.randn(sides, generator=generator).bfloat16() for sides in ((3, 8, 256), (3, 64, 8)))
    kept = torch.nn.Parameter(torch.zeros(3, 1))
    lora = LoRAWeights(kept, kept, a, b, 2.0, 0.0, None, LoRASwitches())
    groups = Groups(torch.tensor([10, 10, 24], dtype=torch.int32))
    rows, dy = (torch.randn(24, side, generator=generator).bfloat16() for side in (256, 64))
    loop, grouped = LoopOverExperts(), GroupedProducts()
    pairs = [
        (loop.frozen(rows, weight, groups), grouped.frozen(rows, weight, groups)),
        (loop.frozen_backward(dy, weight, groups), grouped.frozen_backward(dy, weight, groups)),
        *zip(loop.adapted(rows, weight, lora, groups), grouped.adapted(rows, weight, lora, groups), strict=True),
    ]
    low_rank = pairs[-1][0]
    arguments = (dy, rows, low_rank, weight, lora, groups)
    pairs += zip(loop.adapted_backward(*arguments), grouped.adapted_backward(*arguments), strict=True)
    for expected, found in pairs:
        # Both round a float32 sum to bfloat16 once, the gradients of A and B after a product that was rounded before.
        assert expected.shape == found.shape
        assert (found.float() - expected.float()).abs().max() <= 2.0**-7 * expected.float().abs().max()
    assert not pairs[-1][1][1].any(), "an expert without rows has no gradient"


FORMATS = {
    "nf4": Quantization(WeightFormat.NF4, 64, False),
    "nf4, scales quantized": Quantization(WeightFormat.NF4, 64, True),
    "int8": Quantization(WeightFormat.INT8),
    "mxfp4": Quantization(WeightFormat.MXFP4, 32),
    "none": Quantization(WeightFormat.NONE),
}


@pytest.mark.parametrize(
    "ends", [(10, 12, 20, 24, 30), (10, 10, 24, 24, 30), (0, 0, 30, 30, 30), (0, 0, 0, 7, 30)], ids=str
)
@pytest.mark.parametrize("quantization", FORMATS.values(), ids=FORMATS)
def test_a_stack_too_large_to_stand_decoded_is_decoded_by_blocks_of_experts(
    quantization: Quantization, ends: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two experts at a time, a block without rows among them: the same bits, and never more numbers decoded."""
    generator = torch.Generator().manual_seed(0)
    sides = (64, 256)
    layers = [quantize(torch.randn(sides, generator=generator), quantization, torch.bfloat16) for _ in ends]
    weight = stacked(layers)
    a, b = (0.1 * torch.randn(s, generator=generator).bfloat16() for s in ((5, 8, 256), (5, 64, 8)))
    kept = torch.nn.Parameter(torch.zeros(5, 1))
    lora = LoRAWeights(kept, kept, a, b, 2.0, 0.0, None, LoRASwitches())
    rows, dy = (torch.randn(30, side, generator=generator).bfloat16() for side in reversed(sides))
    products = GroupedProducts()

    def computed() -> list[torch.Tensor]:
        groups = Groups(torch.tensor(ends, dtype=torch.int32))
        y, low_rank = products.adapted(rows, weight, lora, groups)
        backward = products.adapted_backward(dy, rows, low_rank, weight, lora, groups)
        frozen = (products.frozen(rows, weight, groups), products.frozen_backward(dy, weight, groups))
        return [y, low_rank, *backward, *frozen]

    whole = computed()
    decoded: list[int] = []
    some = type(weight).some

    def counted(self: StackedWeight, experts: slice) -> torch.Tensor:
        decoded.append(experts.stop - experts.start)
        return some(self, experts)

    monkeypatch.setattr(type(weight), "some", counted)
    monkeypatch.setattr(products_module, "DECODED_AT_ONCE", 2 * 64 * 256)
    for expected, found in zip(whole, computed(), strict=True):
        assert torch.equal(found, expected)
    assert max(decoded) == 2


def test_a_device_without_the_kernel_loops() -> None:
    assert isinstance(proved_products(torch.device("cpu"), grouped=False), LoopOverExperts)
    assert isinstance(proved_products(torch.device("meta"), grouped=True), LoopOverExperts)
    assert isinstance(proved_products(torch.device("cpu"), grouped=True), GroupedProducts)


def test_more_numbers_than_a_decoder_counts_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    quantization = Quantization(WeightFormat.NF4, 64, True)
    layers = [quantize(torch.randn(64, 256, generator=generator), quantization, torch.float32) for _ in range(3)]
    whole = stacked(layers).dense()
    monkeypatch.setattr(stacked_weights, "_LARGEST_COUNT", 2 * 64 * 256)
    assert torch.equal(stacked(layers).dense(), whole)


@pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.MXFP4])
def test_what_stands_between_packed_and_decoded_experts_is_a_part_of_them(
    weight_format: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    quantization = Quantization(weight_format, 32 if weight_format is WeightFormat.MXFP4 else None, False)
    layers = [quantize(torch.randn(64, 256, generator=generator), quantization, torch.bfloat16) for _ in range(5)]
    monkeypatch.setattr(stacked_weights, "_AT_ONCE", 2 * 64 * 256)
    made: list[torch.Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                made.append(found)
            return found

    stack = stacked(layers)
    with Watch():
        whole = stack.dense()
    assert torch.equal(whole, torch.stack([layer.dense() for layer in layers]))
    wide = [tensor for tensor in made if tensor.dtype in (torch.float32, torch.int32)]
    assert wide
    assert max(tensor.numel() for tensor in wide) <= 2 * 64 * 256


def test_a_checkpoint_whose_experts_are_packed_is_the_same_base(tmp_path: Path) -> None:
    """As bitsandbytes saves each layer, before transformers 5: the packed bits are taken as they are."""
    write_drawn_model(tmp_path / "plain", "mixtral")
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    packed: dict[str, torch.Tensor] = {}
    for name, weight in stored.items():
        if weight.dim() != 2 or "embed" in name or "lm_head" in name or name.endswith("gate.weight"):
            packed[name] = weight
            continue
        codes, state = codec.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        packed |= {name: codes, **{f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}}
    (tmp_path / "packed").mkdir()
    save_file(packed, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    described = {**method, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"}
    (tmp_path / "packed" / "config.json").write_text(json.dumps({**config, "quantization_config": described}))
    opened = [open_cpu_trainer(tmp_path / name, weight_format="nf4").trainer for name in ("plain", "packed")]
    module = "model.layers.1.block_sparse_moe.experts.w3"
    weights = [trainer.dequantized_weight(module) for trainer in opened]
    np.testing.assert_array_equal(*weights)
    np.testing.assert_array_equal(*(trainer.logits(random_batch(0)) for trainer in opened))


def test_a_backend_without_experts_refuses_a_mixture_before_it_reads_a_weight(tmp_path: Path) -> None:
    """transformers 4 keeps experts as single layers, of which one could take a mixture for a dense model."""
    from qlora_hal_backends.cpu_torch import SPEC

    def read(*_: object) -> Any:
        raise AssertionError("a weight was read")

    write_drawn_model(tmp_path, "mixtral")
    without = replace(SPEC.capabilities, features=SPEC.capabilities.features - {Feature.EXPERTS})
    trainer = TorchLoRATrainer(replace(SPEC, capabilities=without), CPU, read)
    with pytest.raises(UnsupportedFeatureError, match="experts"):
        trainer.load(source_of(tmp_path), Quantization(WeightFormat.NF4, 64, False), Compute("float32"))
    with pytest.raises(AssertionError, match="a weight was read"):
        TorchLoRATrainer(SPEC, CPU, read).load(
            source_of(tmp_path), Quantization(WeightFormat.NF4, 64, False), Compute("float32")
        )
