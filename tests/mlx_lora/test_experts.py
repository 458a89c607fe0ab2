"""Mixtures of experts on MLX: routing, mlx-lm's own loss and gradients, the torch family's, layouts, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapter_mlx.both_tools import logits_in_mlx
from drawn_models import write_drawn_model
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model, save_config, save_model
from safetensors.numpy import load_file, save_file
from tiny_models import write_model
from trainers import OpenTrainer, largest_difference, open_cpu_trainer, random_batch, source_of

from qlora_hal.adapter import write_mlx_adapter
from qlora_hal.adapter.mlx_experts import mlx_path
from qlora_hal.adapter.naming import module_of
from qlora_hal.adapter.targets import require_experts_served
from qlora_hal.contract.values import Batch, Float32
from qlora_hal.errors import ModelError, UnsupportedFeatureError
from qlora_hal.model.expert_stacks import path_of
from qlora_hal.model.facts import read_facts
from qlora_hal_backends.mlx_lora.capabilities import MIXTURES
from qlora_hal_backends.mlx_lora.experts import FAMILIES
from qlora_hal_backends.mlx_lora.gradient_checkpointing import RecomputedLayer
from qlora_hal_backends.mlx_lora.outline import outline
from qlora_hal_backends.mlx_lora.routing import Routing, best

Opened = Callable[..., OpenTrainer]
# Two float32 programs of the same products in another order: see test_architectures.
FLOAT32 = 8 * 2048**0.5 * 2**-24
OF_MLX_LM = ["mixtral", "qwen2_moe", "qwen3_moe"]


def drawn(folder: Path, model_type: str, **changes: Any) -> Path:
    """With the keys of config.json that mlx-lm reads and transformers 5 names otherwise."""
    model = write_drawn_model(folder, model_type, changes)
    config = json.loads((folder / "config.json").read_text())
    older = {
        "num_experts": config.get("num_local_experts"),
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "rope_theta": model.config.rope_parameters["rope_theta"],
    }
    (folder / "config.json").write_text(json.dumps({**older, **config}))
    return folder


def test_what_is_declared_is_what_is_computed() -> None:
    assert FAMILIES.keys() == MIXTURES


# routing --------------------------------------------------------------------------------------------------------------
def test_the_first_of_equal_values_is_the_best() -> None:
    """What `best` rests on: on rows short and long, with ties at the front, in the middle and everywhere."""
    random = np.random.default_rng(0)
    for width in (4, 8, 60, 128, 256):
        values = random.integers(0, 3, (50, width)).astype(np.float32)
        values[0] = 1.0
        expected = np.argsort(-values, axis=-1, kind="stable")[:, :4]
        assert np.array_equal(np.array(best(mx.array(values), 4)), expected)


def test_experts_of_other_groups_are_not_chosen_whatever_their_scores() -> None:
    """Corrected scores below zero: mlx-lm gives experts of other groups a zero, which is more."""
    routing = Routing(2, True, is_sigmoid=True, groups=2, groups_chosen=1)
    chosen, weights = routing(mx.zeros((1, 4)), mx.array([-3.0, -3.0, -2.0, -2.5]))
    assert np.array(chosen).tolist() == [[2, 3]]
    assert np.array(weights).tolist() == [[0.5, 0.5]]


# beside others --------------------------------------------------------------------------------------------------------
def of_mlx_lm(base: Path, adapter: Path, batch: Batch) -> tuple[float, dict[str, Float32]]:
    """Loss sum and gradients of mlx-lm's model with its own LoRA layers, under our names."""
    model, _ = load_model(base)
    model = load_adapters(model, str(adapter))
    model.train()

    def loss(parameters: Any) -> mx.array:
        model.update(parameters)
        logits = model(mx.array(batch.input_ids)).astype(mx.float32)[:, :-1]
        targets = mx.array(np.where(batch.labels[:, 1:] >= 0, batch.labels[:, 1:], 0))
        picked = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        losses = mx.logsumexp(logits, axis=-1) - picked
        return mx.where(mx.array(batch.labels[:, 1:] >= 0), losses, 0.0).sum()

    value, gradients = mx.value_and_grad(loss)(model.trainable_parameters())
    return float(value), {name: np.array(gradient) for name, gradient in tree_flatten(gradients)}


@pytest.mark.parametrize("model_type", OF_MLX_LM)
def test_loss_gradients_and_logits_are_those_of_mlx_lm(model_type: str, tmp_path: Path, opened: Opened) -> None:
    base = drawn(tmp_path / "base", model_type)
    ready, batch = opened(base), random_batch(3, rows=3, time=30)
    modules = ready.trainer.linear_modules()
    assert dict(modules) == dict(read_facts(base).linear_modules)
    where = tmp_path / "adapter"
    facts: dict[str, Any] = {"base_name": str(base), "base_revision": None, "provenance": {}}
    write_mlx_adapter(where, ready.adapter, linear_modules=modules, **facts)
    loss, theirs = of_mlx_lm(base, where, batch)
    assert ready.trainer.evaluate([batch]).loss_sum == pytest.approx(loss, rel=FLOAT32)
    found = ready.trainer.gradients([batch])
    expected = {}
    for name, gradient in found.items():
        module, half = module_of(name)
        theirs_name = f"{mlx_path(module)}.lora_{half.lower()}"
        shared = theirs[theirs_name] / batch.counted_tokens
        expected[name] = shared if gradient.ndim == 3 else shared.T
    assert largest_difference(dict(found), expected) <= FLOAT32
    assert any(tensor.ndim == 3 and tensor.any() for tensor in found.values())
    tokens = np.array([[5, 17, 210, 33, 8, 150, 64]], np.int32)
    places = np.arange(tokens.shape[1], dtype=np.int32)[None]
    logits = ready.trainer.logits(Batch(tokens, tokens, places, np.ones_like(tokens)))
    reopened = logits_in_mlx(base, where)
    assert np.abs(logits - reopened).max() <= FLOAT32 * np.abs(reopened).max()


@pytest.mark.parametrize("model_type", sorted(MIXTURES))
def test_gradients_and_a_step_are_those_of_the_torch_family(model_type: str, tmp_path: Path, opened: Opened) -> None:
    """Of DeepSeek-V3 too, which the suite draws no model of: from the same adapter the same step."""
    write_drawn_model(tmp_path, model_type)
    ours = opened(tmp_path)
    other = open_cpu_trainer(tmp_path, targets=list(ours.trainer.linear_modules()))
    ours.trainer.attach(other.adapter)
    window = [random_batch(4), random_batch(5, time=12)]
    assert largest_difference(dict(ours.trainer.gradients(window)), dict(other.trainer.gradients(window))) <= FLOAT32
    moments = []
    for ready in (ours, other):
        ready.step(window, weight_decay=0.1)
        moments.append({n: m for n, m in ready.trainer.export_optimizer().moments.items() if n.endswith(".exp_avg")})
    assert largest_difference(*moments) <= 2 * FLOAT32, "gradients, and the norm that clips them"


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", ["none", "nf4", "int4_affine"])
@pytest.mark.parametrize("compile", ["off", "auto"])
def test_recomputation_changes_nothing(compile: str, weight_format: str, tmp_path: Path, opened: Opened) -> None:
    write_drawn_model(tmp_path, "qwen3_moe")
    size = None if weight_format == "none" else 32
    window, found = [random_batch(6), random_batch(7, time=9)], []
    for checkpointing in (False, True):
        ready = opened(
            tmp_path, weight_format=weight_format, block_size=size, checkpointing=checkpointing, compile=compile
        )
        layers = ready.trainer._base.causal.model.layers  # type: ignore[attr-defined]
        assert all(isinstance(layer, RecomputedLayer) is checkpointing for layer in layers)
        ready.step(window, 0.0, beta1=0.0, max_grad_norm=None)
        found.append(dict(ready.trainer.export_optimizer().moments))
    assert largest_difference(*found) <= FLOAT32


# storage --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("width", [32, 40])
def test_a_stack_in_nf4_has_the_bits_of_its_experts(
    width: int, double_quant: bool, tmp_path: Path, opened: Opened
) -> None:
    """Each expert packed as a linear layer of its own: rows of whole blocks, and rows that end in half of one."""
    write_drawn_model(tmp_path, "qwen3_moe", {"moe_intermediate_size": width})
    ready = opened(tmp_path, weight_format="nf4", block_size=64, double_quant=double_quant)
    stored = load_file(tmp_path / "model.safetensors")
    from qlora_hal_backends.mlx_lora.nf4 import quantize_nf4

    for projection in ("gate_proj", "up_proj", "down_proj"):
        stack = f"model.layers.1.mlp.experts.{projection}"
        found = ready.trainer.dequantized_weight(stack)
        for number in range(4):
            alone = quantize_nf4(
                mx.array(stored[f"{path_of(stack, number)}.weight"]), block_size=64, double_quant=double_quant
            )
            assert np.array_equal(found[number], np.array(alone.dequantize(mx.float32))), (stack, number)


def test_experts_in_one_tensor_are_the_same_model(tmp_path: Path, opened: Opened) -> None:
    """As transformers 5 holds them in memory: gate and up in one, `[experts, 2 * inner, hidden]`."""
    write_drawn_model(tmp_path / "each", "qwen3_moe")
    tensors = load_file(tmp_path / "each" / "model.safetensors")
    joined = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"

        def all_of(projection: str, block: str = block) -> Float32:
            return np.stack([tensors[f"{block}.{number}.{projection}.weight"] for number in range(4)])

        joined[f"{block}.gate_up_proj"] = np.concatenate([all_of("gate_proj"), all_of("up_proj")], axis=1)
        joined[f"{block}.down_proj"] = all_of("down_proj")
    (tmp_path / "joined").mkdir()
    save_file(joined, tmp_path / "joined" / "model.safetensors", {"format": "pt"})
    (tmp_path / "joined" / "config.json").write_bytes((tmp_path / "each" / "config.json").read_bytes())
    one, other = (opened(tmp_path / name) for name in ("each", "joined"))
    batch = random_batch(8)
    assert one.trainer.linear_modules() == other.trainer.linear_modules()
    assert np.array_equal(one.trainer.logits(batch), other.trainer.logits(batch))


def test_experts_as_mlx_lm_stacks_them_are_refused_and_not_left_as_they_are(tmp_path: Path) -> None:
    base = drawn(tmp_path / "base", "qwen3_moe")
    model, config = load_model(base)
    (tmp_path / "stacked").mkdir()
    save_model(tmp_path / "stacked", model)
    save_config(config, tmp_path / "stacked" / "config.json")
    with pytest.raises(ModelError, match="not stored as on the hub") as refused:
        outline(source_of(tmp_path / "stacked"), {})
    assert refused.value.code == "QH-M51"


# what is not trained --------------------------------------------------------------------------------------------------
@pytest.mark.fault("U25")
def test_experts_that_are_not_trained_here_are_refused_unless_none_is_asked_for(tmp_path: Path) -> None:
    source = source_of(write_model(tmp_path, "afmoe"))
    found = outline(source, {})
    served = found.linear_modules
    assert served, "the other layers are"
    assert any("stacks of experts carry no LoRA here" in note for note in found.notes)
    stored = source.facts.linear_modules
    with pytest.raises(UnsupportedFeatureError, match=r"mlx_lora does not train the experts") as refused:
        require_experts_served("all", stored, served, "mlx_lora")
    assert (refused.value.code, refused.value.where) == ("QH-U25", "lora.experts")
    require_experts_served("none", stored, served, "mlx_lora")
    require_experts_served("all", {n: s for n, s in stored.items() if s.experts == 1}, served, "mlx_lora")
