"""Mixtures in the fused schedule against transformers' own layers, on tiny real models: one function, two schedules.

With plain torch in place of the kernels these run anywhere; with the kernels, on a GPU or in Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from against_transformers import compare, reference_of
from drawn_models import write_drawn_model
from fused_models import DEVICE, SAME_FUNCTION, Model, load, packed, relative
from trainers import open_cpu_trainer, random_batch

from qlora_hal.contract import dropout
from qlora_hal.contract.backend import Compute
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Batch
from qlora_hal_backends.torch_family import fused, step
from qlora_hal_backends.torch_family.experts import GroupedProducts, TiesByNumber, proved_products
from qlora_hal_backends.torch_family.flat_adapter import FlatAdapter, StackOfExperts
from qlora_hal_backends.torch_family.fused.attach import attach_with
from qlora_hal_backends.torch_family.fused.body import FusedBody
from qlora_hal_backends.torch_family.fused.families import activation_of
from qlora_hal_backends.torch_family.fused.mixture.collecting import router_of
from qlora_hal_backends.torch_family.fused.mixture.operations import MixtureOperations, Router, Scores
from qlora_hal_backends.torch_family.fused.mixture.reference import ReferenceMixture
from qlora_hal_backends.torch_family.fused.operations import Operations
from qlora_hal_backends.torch_family.fused.reference import ReferenceOperations
from qlora_hal_backends.torch_family.fused.supported import experts_refusal, model_refusal
from qlora_hal_backends.torch_family.fused.tape import Keep
from qlora_hal_backends.torch_family.loading import BaseModel
from qlora_hal_backends.torch_family.lora_linear import words_on

pytestmark = pytest.mark.filterwarnings(
    # Triton's interpreter on NumPy 2.
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
)

MIXTURES: Mapping[str, Mapping[str, object]] = {
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_moe as it is": {"norm_topk_prob": False, "num_local_experts": 5, "num_experts_per_tok": 3},
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "norm_topk_prob": False,
    },
    "qwen2_moe of windows": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "mixtral of windows": {"sliding_window": 4, "hidden_act": "gelu_pytorch_tanh"},
    "qwen3_moe among dense layers": {"decoder_sparse_step": 2, "num_hidden_layers": 4, "norm_topk_prob": True},
    "qwen2_moe after a dense layer": {
        "mlp_only_layers": [0],
        "shared_expert_intermediate_size": 48,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "glm4_moe": {"routed_scaling_factor": 2.5},
    "glm4_moe in groups": {
        "num_hidden_layers": 3,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": False,
        "n_shared_experts": 2,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "olmoe": {"norm_topk_prob": False},
    "olmoe with limits": {"norm_topk_prob": True, "clip_qkv": 3.0, "attention_bias": True},
}


@dataclass(frozen=True)
class Both:
    """The two sets of operations that a mixture needs."""

    dense: Operations
    mixture: MixtureOperations

    def of(self, base: BaseModel) -> Both:
        activation = activation_of(base)
        return Both(type(self.dense)(activation), type(self.mixture)(activation))  # type: ignore[call-arg]


IN_TORCH = Both(ReferenceOperations(), ReferenceMixture())


@pytest.fixture(params=["torch", pytest.param("triton", marks=[pytest.mark.needs_triton, pytest.mark.long])])
def operations(request: pytest.FixtureRequest) -> Both:
    """A layer in Triton's interpreter takes a minute: of those, `make test` has one, of few tokens."""
    return IN_TORCH if request.param == "torch" else in_triton()


def in_triton() -> Both:
    assert DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1", "without a GPU, set TRITON_INTERPRET=1"
    from qlora_hal_backends.torch_family.fused.mixture.triton_operations import TritonMixture
    from qlora_hal_backends.torch_family.fused.triton_operations import TritonOperations

    return Both(TritonOperations(), TritonMixture())


def mixture(folder: Path, family: str = "qwen3_moe", **choices: object) -> Model:
    changes = choices.pop("changes", MIXTURES.get(family))
    return load(folder, family.partition(" ")[0], changes=changes, **choices)  # type: ignore[arg-type]


def fused_body(
    model: Model, operations: Both = IN_TORCH, compute: Compute | None = None, **choices: object
) -> FusedBody:
    assert model_refusal(model.base, model.flat, model.compute) is None
    both = operations.of(model.base)
    compute = compute or model.compute
    return attach_with(both.dense, model.base, model.flat, compute, mixture=both.mixture, **choices)  # type: ignore[arg-type]


def assert_same(model: Model, body: FusedBody, *batches: Batch) -> None:
    """Loss and gradients of the fused schedule are those of the plain layers."""
    expected_loss, expected = model.gradient(model.plain, *batches)
    loss, found = model.gradient(body.batch_loss, *batches)
    assert loss == pytest.approx(expected_loss, rel=SAME_FUNCTION)
    assert relative(found, expected) < SAME_FUNCTION
    assert expected.any()


def experts_only(flat: FlatAdapter, gradients: torch.Tensor) -> list[torch.Tensor]:
    """Of each stack which experts have a gradient, bool `[experts]`."""
    return [torch.cat(halves_of(stack, gradients), dim=1).any(dim=1) for stack in flat.stacks]


def halves_of(stack: StackOfExperts, buffer: torch.Tensor) -> list[torch.Tensor]:
    """A's and B's part of a flat buffer, `[experts, elements]`."""
    parts = [buffer[start : start + stack.experts * size] for start, size in stack.parts]
    return [part.view(stack.experts, -1) for part in parts]


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("arrange", [lambda batch: batch, packed], ids=["one sample a row", "packed"])
def test_loss_and_gradients_equal_those_of_the_plain_layers(
    family: str, arrange: Callable[[Batch], Batch], operations: Both, tmp_path: Path
) -> None:
    model = mixture(tmp_path, family)
    for keep in Keep:
        assert_same(model, fused_body(model, operations, keep=keep), arrange(random_batch(3)))


@pytest.mark.needs_triton
@pytest.mark.parametrize("family", ["qwen3_moe as it is", "qwen2_moe", "olmoe with limits", "glm4_moe in groups"])
def test_kernels_give_loss_and_gradients_of_the_plain_layers(family: str, tmp_path: Path) -> None:
    model = mixture(tmp_path, family)
    assert_same(model, fused_body(model, in_triton()), random_batch(3, rows=1, time=4, prompt=1))


@pytest.mark.parametrize("family", [family for family in MIXTURES if "windows" not in family])
def test_fused_mixtures_are_those_of_transformers_and_peft(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Logits, loss, gradients, and the loss of packed rows, all by the fused schedule."""
    attached: list[FusedBody] = []

    def attach(base: BaseModel, flat: FlatAdapter, compute: Compute, device: torch.device) -> FusedBody:
        attached.append(fused_body(Model(base, flat, compute)))
        return attached[-1]

    write_drawn_model(tmp_path, family.partition(" ")[0], MIXTURES[family] if " " in family else None)
    monkeypatch.setattr(fused, "try_attach", attach)
    found = compare(tmp_path, reference_of(tmp_path))
    assert found["result"] == "equal", found
    assert attached


@pytest.mark.parametrize("experts", ["all", "none"])
def test_several_steps_are_those_of_the_plain_layers(experts: str, tmp_path: Path) -> None:
    write_drawn_model(tmp_path, "qwen3_moe", {"norm_topk_prob": True})
    attention = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkvo"]
    targets = None if experts == "all" else attention
    plain, by_hand = (open_cpu_trainer(tmp_path, weight_format="nf4", targets=targets) for _ in range(2))
    inside = by_hand.trainer
    model = Model(inside._base, inside._flat, inside._compute)  # type: ignore[attr-defined]
    inside._fused = fused_body(model)  # type: ignore[attr-defined]
    for seed in range(4):
        window = [random_batch(seed), packed(random_batch(seed + 10))]
        expected, found = plain.step(window, weight_decay=0.1), by_hand.step(window, weight_decay=0.1)
        # Of each step the rounding of the one before is part; Adam divides it by the size of a gradient.
        assert found.loss == pytest.approx(expected.loss, rel=10 * SAME_FUNCTION)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=100 * SAME_FUNCTION)
    before, after = plain.adapter.tensors, plain.trainer.export_adapter().tensors
    for name, tensor in by_hand.trainer.export_adapter().tensors.items():
        moved = np.abs(after[name] - before[name]).max()
        assert moved > 0
        assert np.abs(tensor - after[name]).max() < 1e-2 * moved


@pytest.mark.parametrize(
    ("family", "recompute"),
    [
        ("qwen3_moe", "selective"),
        ("qwen3_moe", "full"),
        ("qwen3_moe", "offload"),
        ("qwen2_moe", "full"),
        ("qwen2_moe after a dense layer", "selective"),
        ("qwen3_moe among dense layers", "offload"),
        ("olmoe with limits", "full"),
        ("glm4_moe in groups", "full"),
    ],
)
def test_recomputing_in_tiles_equals_keeping_everything(
    family: str, recompute: str, operations: Both, tmp_path: Path
) -> None:
    model = mixture(tmp_path, family, targets=lambda module: "layers.0." in module or "o_proj" in module, r=3)
    batches = [random_batch(3, rows=1, time=10), packed(random_batch(4, rows=1, time=10))]
    compute = replace(model.compute, gradient_checkpointing=True, recompute=recompute)  # type: ignore[arg-type]
    for tile_rows in (10, 3, 1):  # in one piece; in four, the last shorter; a token at a time
        body = fused_body(model, operations, compute, tile_rows=tile_rows)
        for _ in range(2):
            assert_same(model, body, *batches)


@pytest.mark.parametrize(
    "targets",
    [
        lambda module: "experts" not in module,
        lambda module: "experts" in module,
        lambda module: "down_proj" in module,
        lambda module: "layers.1." in module and "up_proj" in module,  # layer 0 has ranks of zeros
        lambda module: "layers.0." in module,
    ],
    ids=["attention", "experts", "down", "one layer's up", "the lowest layer"],
)
def test_any_choice_of_projections_can_be_adapted(
    targets: Callable[[str], bool], operations: Both, tmp_path: Path
) -> None:
    model = mixture(tmp_path, targets=targets, r=3)  # three ranks, of two projections: padded to eight
    assert_same(model, fused_body(model, operations), random_batch(3))


@pytest.mark.parametrize(
    "targets",
    [
        lambda module: "mlp.gate_proj" in module or "mlp.up_proj" in module,
        lambda module: "experts" in module or "q_proj" in module,
        lambda module: "layers.1." in module,
        lambda module: "layers.0." in module,
    ],
    ids=["the dense layers' gate and up", "experts", "one layer of experts", "the lowest layer, which is dense"],
)
def test_layers_of_either_kind_can_be_adapted_alone(
    targets: Callable[[str], bool], operations: Both, tmp_path: Path
) -> None:
    model = mixture(tmp_path, "qwen3_moe among dense layers", targets=targets, r=3)
    body = fused_body(model, operations)
    for _ in range(2):  # what one kind of layer holds is there still when another has been
        assert_same(model, body, random_batch(3))


def test_a_mixture_all_of_whose_layers_are_dense_needs_no_operations_of_one(tmp_path: Path) -> None:
    model = mixture(tmp_path, changes={"mlp_only_layers": [0, 1]})
    assert model_refusal(model.base, model.flat, model.compute) is None
    operations = ReferenceOperations(activation_of(model.base))  # type: ignore[arg-type]
    for compute in (model.compute, replace(model.compute, gradient_checkpointing=True)):
        assert_same(model, attach_with(operations, model.base, model.flat, compute), random_batch(3))


@pytest.mark.parametrize("weight_format", [WeightFormat.NONE, WeightFormat.INT8])
def test_other_weight_formats_are_served_too(weight_format: WeightFormat, operations: Both, tmp_path: Path) -> None:
    model = mixture(tmp_path, weight_format=weight_format)
    assert_same(model, fused_body(model, operations), random_batch(3))


@pytest.mark.parametrize("dense", [False, True], ids=["two experts a token", "all experts a token"])
def test_an_expert_without_tokens_has_no_gradient(dense: bool, operations: Both, tmp_path: Path) -> None:
    """Two rows of one token of 16 experts, and of one whole row each: nothing of an idle expert is touched."""
    each = 16 if dense else 2
    model = mixture(tmp_path, changes={"num_local_experts": 16, "num_experts_per_tok": each, "norm_topk_prob": True})
    few = random_batch(3, rows=1, time=2, prompt=1)
    body = fused_body(model, operations)
    assert_same(model, body, few)
    trained = experts_only(model.flat, model.gradient(body.batch_loss, few)[1])
    assert all(found.all() if dense else 0 < found.sum() <= 4 for found in trained)
    model.flat.gradients.fill_(-0.0)
    body.batch_loss(step.to_device(few, DEVICE), 1.0).backward()
    for stack, found in zip(model.flat.stacks, trained, strict=True):
        for part in halves_of(stack, model.flat.gradients):
            assert not part[~found].any()


@pytest.mark.parametrize("favourite", [0, 3])
def test_one_expert_may_take_all_tokens(favourite: int, operations: Both, tmp_path: Path) -> None:
    model = mixture(tmp_path, changes={"num_experts_per_tok": 1, "norm_topk_prob": False})
    for block in (layer.mlp for layer in model.base.layers):
        # Scores that no token moves: all of its row in one direction, in which all of the hidden states have a part.
        block.gate.weight.data.zero_()
        block.gate.weight.data[favourite] = 3.0
    flip = [layer.post_attention_layernorm.weight for layer in model.base.layers]
    chosen: list[torch.Tensor] = []
    for block in model.base.experts:
        block.register_forward_pre_hook(lambda _, given: chosen.append(given[1]))
    for weight in flip:
        weight.data.abs_()
    model.base.body.embed_tokens.weight.data.abs_()
    body = fused_body(model, operations)
    assert_same(model, body, random_batch(3))
    assert any(bool((experts == favourite).all()) for experts in chosen)


def test_of_equal_scores_the_lower_number_wins(operations: Both, tmp_path: Path) -> None:
    """A router whose rows are one row, but for one that is never better."""
    model = mixture(tmp_path, changes={"num_local_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True})
    for layer in model.base.layers:
        weight = layer.mlp.gate.weight.data
        weight.copy_(weight[:1].expand_as(weight))
    body = fused_body(model, operations)
    assert_same(model, body, random_batch(3))
    trained = experts_only(model.flat, model.gradient(body.batch_loss, random_batch(3))[1])
    assert all(found.tolist() == [True] * 3 + [False] * 5 for found in trained)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "qwen2_moe after a dense layer", "glm4_moe"])
def test_dropout_is_that_of_the_plain_layers(family: str, operations: Both, tmp_path: Path) -> None:
    """Of the attention, of the shared expert and of dense layers; routed experts have none."""
    model = mixture(tmp_path, family, targets=lambda module: ".experts." not in module, dropout=0.4)
    without_loss, without = model.gradient(model.plain, random_batch(3))
    words = dropout.token_words(2**40 + 3, np.arange(2, dtype=np.int32), 20)
    model.flat.switches.token_words = words_on(words.reshape(-1), DEVICE)
    for recompute in (None, "full"):
        compute = replace(model.compute, gradient_checkpointing=recompute is not None, recompute=recompute or "full")
        assert_same(model, fused_body(model, operations, compute, tile_rows=15), random_batch(3))
    assert model.gradient(model.plain, random_batch(3))[0] != without_loss
    assert without.any()


def test_updated_adapter_is_used_at_the_next_forward(tmp_path: Path) -> None:
    model = mixture(tmp_path)
    body = fused_body(model)
    model.gradient(body.batch_loss, random_batch(1))
    model.flat.parameters.mul_(1.5)
    model.flat.refresh_compute()
    assert_same(model, body, random_batch(1))


def test_weights_that_did_not_all_arrive_are_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's gate and up took the place of another's when memory ran out for its down: that other is not there."""
    model = mixture(tmp_path)
    body = fused_body(model)
    stacks = body.schedule.mixture.buffers  # type: ignore[attr-defined]
    body.schedule.hold(body.layers[0])
    expected = stacks.into.memory.clone()

    def no_memory(weights: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(stacks.out, "decode", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            body.schedule.hold(body.layers[1])
    body.schedule.hold(body.layers[0])
    assert torch.equal(stacks.into.memory, expected)


def test_evaluation_gives_the_same_loss_and_touches_no_gradient(tmp_path: Path) -> None:
    model = mixture(tmp_path)
    body = fused_body(model)
    loss, gradient = model.gradient(body.batch_loss, random_batch(1))
    with torch.no_grad():
        evaluated = body.batch_loss(step.to_device(random_batch(1), DEVICE), 1.0)
    # Nothing is kept, so the feed-forward goes through its rows in tiles: of one tile, the same products.
    assert evaluated.item() == loss
    assert torch.equal(model.flat.gradients, gradient)


def test_bfloat16_gradients_are_no_worse_than_those_of_the_plain_layers(tmp_path: Path) -> None:
    """With the choices of the exact router, whose scores differ by more than bfloat16 does."""
    changes = {"num_local_experts": 2, "num_experts_per_tok": 2, "norm_topk_prob": True}
    exact = mixture(tmp_path / "exact", weight_format=WeightFormat.NONE, changes=changes)
    rounded = mixture(tmp_path / "rounded", weight_format=WeightFormat.NONE, dtype="bfloat16", changes=changes)
    for parameter, source in zip(exact.base.causal.parameters(), rounded.base.causal.parameters(), strict=True):
        parameter.data.copy_(source.data)
    for name, linear in exact.base.linears.items():
        linear.base.weight.copy_(rounded.base.linears[name].base.weight)  # type: ignore[union-attr]
    exact.flat.parameters.copy_(rounded.flat.compute)
    batches = [random_batch(seed) for seed in range(4)]
    _, expected = exact.gradient(exact.plain, *batches)
    _, plain = rounded.gradient(rounded.plain, *batches)
    _, found = rounded.gradient(fused_body(rounded).batch_loss, *batches)
    # Both errors are draws of rounding noise; half as much again is a bound on the draw, not on the method.
    assert relative(found, expected) < 1.5 * relative(plain, expected)
    assert relative(found, expected) < 0.1


@pytest.mark.needs_cuda
@pytest.mark.parametrize("family", [family for family in MIXTURES if "windows" not in family])
def test_a_gpu_takes_the_fused_schedule(family: str, tmp_path: Path) -> None:
    """As the trainer asks for it, in bfloat16. All tokens go to all experts: no choice falls otherwise by rounding."""
    name = "n_routed_experts" if family.startswith("glm4") else "num_local_experts"
    everywhere: dict[str, object] = {name: 4, "num_experts_per_tok": 4}
    if "n_group" in MIXTURES[family]:
        everywhere |= {"n_group": 2, "topk_group": 2}
    model = mixture(tmp_path, family, dtype="bfloat16", r=8, changes={**MIXTURES[family], **everywhere})
    for block in model.base.experts:
        block.products = proved_products(DEVICE, grouped=True)
    body = fused.try_attach(model.base, model.flat, model.compute, DEVICE)
    assert isinstance(body, FusedBody), body
    expected_loss, expected = model.gradient(model.plain, random_batch(3), packed(random_batch(4)))
    loss, found = model.gradient(body.batch_loss, random_batch(3), packed(random_batch(4)))
    assert loss == pytest.approx(expected_loss, rel=0.01)
    # Two draws of bfloat16's rounding; with plain torch in place of the kernels they are up to 0.03 apart.
    assert relative(found, expected) < 0.1


def test_routers_are_known_by_what_they_compute(tmp_path: Path) -> None:
    model = mixture(tmp_path / "1")
    layer = model.base.layers[0]
    gate = layer.mlp.gate
    assert router_of(layer) == Router(2, True, torch.float32)
    gate.norm_topk_prob = False
    assert router_of(layer) == Router(2, False, torch.float32)
    for parameter in gate.parameters():
        parameter.data = parameter.data.bfloat16()
    assert router_of(layer) == Router(2, False, torch.bfloat16)
    scaled = gate.forward
    gate.forward = lambda x: (scaled(x)[0], 1.01 * scaled(x)[1], scaled(x)[2])
    assert router_of(layer) is None
    assert "a router that is none of those" in str(model_refusal(model.base, model.flat, model.compute))


def test_routers_of_sigmoids_are_known_by_what_they_compute(tmp_path: Path) -> None:
    """With logits in float32, whatever the dtype, and weights that stay in it."""
    model = mixture(tmp_path, "glm4_moe in groups", changes={**MIXTURES["glm4_moe in groups"], **MIXTURES["glm4_moe"]})
    layer = model.base.layers[1]
    gate = layer.mlp.gate
    expected = Router(2, False, torch.float32, Scores.SIGMOID, factor=2.5, groups=4, groups_kept=2)
    assert router_of(layer) == expected
    gate.norm_topk_prob = True
    assert router_of(layer) == replace(expected, normalizes=True)
    gate.weight.data = gate.weight.data.bfloat16()
    assert router_of(layer) == replace(expected, normalizes=True, exact_logits=True)
    gate.routed_scaling_factor = 2.6  # what config.json does not say
    assert router_of(layer) is None


def test_logits_are_as_exact_as_those_of_the_router(tmp_path: Path) -> None:
    """In float32 from inputs and weights of 16 bits: of scores so near one another, rounding would choose others."""
    model = mixture(tmp_path, "glm4_moe", dtype="bfloat16", weight_format=WeightFormat.NONE)
    body = fused_body(model)
    layer = model.base.layers[1]
    h = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    body.schedule.hold(body.layers[1])
    _, products = body.schedule.feed_forward_of(body.layers[1]).inner(body.layers[1], h, None, None)
    assert products.routed is not None
    x, norm = torch.empty_like(h), layer.post_attention_layernorm
    ReferenceOperations().add_norm(h, None, norm.weight.detach(), norm.variance_epsilon, x)
    with torch.no_grad(), TiesByNumber():
        expected, weights, experts = layer.mlp.gate(x)
    assert products.routed.logits.dtype == torch.float32
    torch.testing.assert_close(products.routed.logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(products.routed.experts.long(), experts)
    torch.testing.assert_close(products.routed.weights, weights, rtol=1e-5, atol=0)


def test_a_choice_that_the_block_makes_of_logits_is_known_as_well(tmp_path: Path) -> None:
    """As transformers 5.10 has it."""
    layer = mixture(tmp_path, "glm4_moe").base.layers[1]
    block, expected = layer.mlp, router_of(layer)
    assert expected is not None
    whole = block.gate.forward
    block.gate.forward = lambda x: whole(x)[0]
    block.forward = lambda x: block.experts(x[0], *reversed(whole(x[0])[1:]))
    assert router_of(layer) == expected
    block.forward = lambda x: block.experts(x[0], whole(x[0])[2], 2.0 * whole(x[0])[1])
    assert router_of(layer) is None


def test_a_router_is_known_though_its_scores_are_rounded_to_the_neighbour(tmp_path: Path) -> None:
    """As another kernel may: in 16 bits, where a neighbour is not near."""
    layer = mixture(tmp_path).base.layers[0]
    gate = layer.mlp.gate
    gate.weight.data = gate.weight.data.bfloat16()
    whole = gate.forward

    def upwards(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, weights, experts = whole(x)
        return logits, torch.nextafter(weights, torch.ones_like(weights) * 2), experts

    gate.forward = upwards
    assert router_of(layer) == Router(2, True, torch.bfloat16)


def test_a_router_that_has_to_choose_outside_the_best_groups_is_not_known(tmp_path: Path) -> None:
    """Which of those it takes, all of which count for nothing, torch does not promise."""
    groups = {"n_routed_experts": 8, "n_group": 4, "topk_group": 1}
    layers = [
        mixture(tmp_path / str(each), "glm4_moe", changes={**groups, "num_experts_per_tok": each}).base.layers[1]
        for each in (2, 3)
    ]
    within, beyond = map(router_of, layers)
    assert within is not None
    assert beyond is None


def test_a_block_that_gives_its_experts_something_else_is_not_known(tmp_path: Path) -> None:
    layer = mixture(tmp_path, "glm4_moe").base.layers[1]
    block = layer.mlp
    whole = block.gate.forward
    block.gate.forward = lambda x: whole(x)[0]
    block.forward = lambda x: block.experts(x[0])
    assert router_of(layer) is None
    block.forward = lambda x: block.experts(x[0], whole(x[0])[2], whole(x[0])[1][:, :1])
    assert router_of(layer) is None


def test_a_block_that_was_asked_for_its_choice_computes_as_before(tmp_path: Path) -> None:
    layer = mixture(tmp_path, "glm4_moe").base.layers[1]
    block = layer.mlp
    whole = block.gate.forward
    block.gate.forward = lambda x: whole(x)[0]
    block.forward = lambda x: block.experts(x[0], *reversed(whole(x[0])[1:]))
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(DEVICE)
    with torch.no_grad():
        expected = block(x)
        assert router_of(layer) is not None
        assert torch.equal(block(x), expected)


def test_biases_that_the_schedule_does_not_add_are_refused(tmp_path: Path) -> None:
    gate = mixture(tmp_path / "gate", "qwen2_moe")
    gate.base.layers[1].mlp.shared_expert_gate.bias = torch.nn.Parameter(torch.ones(1))
    assert model_refusal(gate.base, gate.flat, gate.compute) == "a gate of the shared expert with a bias"
    experts = mixture(tmp_path / "experts")
    experts.base.experts[1].gate_up_proj_bias = torch.nn.Parameter(torch.ones(4, 1))
    assert model_refusal(experts.base, experts.flat, experts.compute) == "experts with biases"


def test_layers_of_two_activations_are_refused(tmp_path: Path) -> None:
    model = mixture(tmp_path, "qwen2_moe after a dense layer")
    model.base.layers[0].mlp.act_fn = torch.nn.GELU(approximate="tanh")
    assert "activation" in str(model_refusal(model.base, model.flat, model.compute))


def test_refusals_name_their_reason(tmp_path: Path) -> None:
    write_drawn_model(tmp_path / "gpt_oss", "gpt_oss")
    write_drawn_model(tmp_path / "deepseek_v3", "deepseek_v3")
    cases = {
        "gpt_oss": "layers of type GptOssDecoderLayer are not in the fused schedule",
        "deepseek_v3": "layers of type DeepseekV3DecoderLayer are not in the fused schedule",
    }
    for name, words in cases.items():
        trainer = open_cpu_trainer(tmp_path / name).trainer
        refusal = model_refusal(trainer._base, trainer._flat, trainer._compute)  # type: ignore[attr-defined]
        assert words in str(refusal)


def test_a_dense_layer_that_is_not_known_is_refused(tmp_path: Path) -> None:
    model = mixture(tmp_path, "qwen2_moe after a dense layer")
    layer = model.base.layers[0]
    layer.mlp.__class__ = type("OtherMLP", (type(layer.mlp),), {})
    refusal = model_refusal(model.base, model.flat, model.compute)
    assert refusal == "feed-forwards of type OtherMLP among those of experts"


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_as_transformers_4_has_them_are_refused(family: str, tmp_path: Path) -> None:
    """A list of modules; Mixtral's, under another name."""
    model = mixture(tmp_path, family)
    layer = model.base.layers[1]
    layer.mlp.experts = torch.nn.ModuleList()
    if family == "mixtral":
        layer.block_sparse_moe = layer.mlp
        del layer.mlp
    assert "not stacked" in str(model_refusal(model.base, model.flat, model.compute))


def test_experts_that_are_not_grouped_keep_the_plain_layers(tmp_path: Path) -> None:
    """And the run's kernel path says so, after what the device says."""
    model = mixture(tmp_path)
    assert experts_refusal(model.base, model.compute) == "experts one by one"
    for block in model.base.experts:
        block.products = GroupedProducts()
    assert experts_refusal(model.base, model.compute) == "experts one by one in float32"
    assert experts_refusal(model.base, replace(model.compute, dtype="bfloat16")) is None
    refusal = fused.try_attach(model.base, model.flat, model.compute, torch.device("cpu"))
    assert refusal == fused.Refusal("no Triton kernels on cpu")
