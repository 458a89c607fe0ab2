"""The oracle's relatives of Llama beside transformers: logits, and the gradient of every weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_hal.contract.values import Batch
from qlora_hal_conformance.fixtures import make_oracle
from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch, stream, with_zero
from qlora_hal_oracle import LlamaShape, OracleTrainer, read_shape
from qlora_hal_oracle.families import FAMILIES, VARIATIONS, Config, draw_config, vary
from qlora_hal_oracle.random_models import draw_tensors, write_model

# Both sides sum in float64: at most some thousand roundings of 1.1e-16 on numbers below a hundred.
AGREEMENT = 1e-9
# transformers makes yarn's ramp in float32: 2^-24 of a frequency is 1.4e-6 of an angle at position 23, and layers make
# up to some ten times as much of it.
AGREEMENT_WITH_A_FLOAT32_RAMP = 5e-5
LENGTHS = (24, 17)
BEYOND_THE_ORIGINAL_LENGTH = (44, 37)


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers casts to float32 inside norms, rotations and softmax whatever the dtype of the weights."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim=dim))

    def wide(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*given: Any, **named: Any) -> torch.Tensor:
            given = tuple(torch.float64 if value is torch.float32 else value for value in given)
            named = {name: torch.float64 if value is torch.float32 else value for name, value in named.items()}
            return function(*given, **named)

        return call

    monkeypatch.setattr(torch.Tensor, "to", wide(torch.Tensor.to))
    monkeypatch.setattr(torch.Tensor, "type", wide(torch.Tensor.type))


def in_transformers(folder: Path, oracle: OracleTrainer) -> Any:
    """The model of the folder in float64, with the oracle's adapters added into its weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            linear = oracle.model.linear(name.removesuffix(".weight")) if "_proj.weight" in name else None
            if linear is not None and linear.lora_a is not None and linear.lora_b is not None:
                tensor.add_(torch.from_numpy(linear.scale * linear.lora_b @ linear.lora_a))
    return model


def logits_and_gradients(model: Any, batch: Batch) -> tuple[Any, dict[str, Any]]:
    ids = torch.from_numpy(batch.input_ids).long()
    logits = model(
        input_ids=ids,
        attention_mask=torch.from_numpy(batch.segment_ids).long(),
        position_ids=torch.from_numpy(batch.position_ids).long(),
        use_cache=False,
    ).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), torch.from_numpy(batch.labels[:, 1:]).long().flatten(), reduction="sum"
    )
    loss.backward()
    gradients = {name: tensor.grad.numpy() for name, tensor in model.named_parameters() if tensor.grad is not None}
    return logits.detach().numpy(), gradients


def compare(folder: Path, shape: LlamaShape, tensors: Any, config: Config, lengths: tuple[int, ...]) -> None:
    random = stream(11, folder.name)
    write_model(folder, shape, tensors, config=config)
    adapter, batch = draw_adapter(random, shape), draw_batch(random, shape, lengths=lengths)
    oracle = make_oracle(shape, tensors, adapter)
    expected, gradients = logits_and_gradients(in_transformers(folder, oracle), batch)
    real = batch.segment_ids > 0
    agreement = AGREEMENT_WITH_A_FLOAT32_RAMP if "yarn" in str(config.get("rope_scaling")) else AGREEMENT
    assert np.abs(oracle.logits(batch) - expected)[real].max() < agreement
    # With B added into the weights their gradient is that of the base; the rule from it to A and B is Llama's.
    found = oracle.window_gradients([batch], denominator=1.0, with_base=True).gradients
    of_base = {name: gradient for name, gradient in found.items() if "lora_" not in name}
    assert of_base.keys() == gradients.keys()
    for name, gradient in of_base.items():
        assert np.abs(gradient - gradients[name]).max() < agreement * max(1.0, np.abs(gradient).max()), name
    assert any(np.any(found[name]) for name in with_zero(adapter, "B").tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_every_gradient_of_a_family_equal_transformers(family: str, tmp_path: Path) -> None:
    config = draw_config(family, stream(7, family))
    shape = read_shape(config)
    compare(tmp_path / family, shape, draw_tensors(shape, stream(8, family)), config, LENGTHS)


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_changed_key_means_what_transformers_makes_of_it(name: str, tmp_path: Path) -> None:
    config = vary(name, stream(7, name))
    shape = read_shape(config)
    compare(tmp_path / name, shape, draw_tensors(shape, stream(8, name)), config, LENGTHS)


def test_longrope_takes_the_other_factors_beyond_the_original_length(tmp_path: Path) -> None:
    config = draw_config("phi3", stream(7, "phi3"))
    shape = read_shape(config)
    tensors = draw_tensors(shape, stream(8, "phi3"))
    compare(tmp_path / "phi3", shape, tensors, config, BEYOND_THE_ORIGINAL_LENGTH)


def test_a_stored_head_is_used_where_config_json_ties_it(tmp_path: Path) -> None:
    config = {**draw_config("llama", stream(7, "tied")), "tie_word_embeddings": True}
    shape = read_shape(config)
    head = stream(9, "head").normal(size=(shape.vocab_size, shape.hidden_size)).astype(np.float32)
    tensors = {**draw_tensors(shape, stream(8, "tied")), "lm_head.weight": head}
    compare(tmp_path / "tied", shape, tensors, config, LENGTHS)
