"""Hugging Face's Llama with PEFT's LoRA: equal to the oracle in float64, and within its error bounds in float32.

The float32 runs stand for a backend: they show that the bounds hold for honest rounding and catch wrong arithmetic.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from qlora_hal.contract.values import Batch
from qlora_hal_oracle import (
    IGNORE_LABEL,
    UNIT_ROUNDOFF,
    Arithmetic,
    LlamaShape,
    LoraScale,
    OracleTrainer,
    loss_curve_envelope,
    read_shape,
    spread,
)
from qlora_hal_oracle.arrays import Float64
from qlora_hal_oracle.blocks import attention_allowed

with warnings.catch_warnings():
    # Third parties warn about each other while they load (peft loads bitsandbytes and gptqmodel).
    warnings.simplefilter("ignore")
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama import modeling_llama

Tensors = dict[str, Float64]

# Both sides compute in float64 with u = 2^-53 = 1.1e-16, in another order. The longest sums have 23 terms, some 30
# products follow one another forward and back, and logits and gradients stay below 100: 8 u sqrt(23 * 30) 100 = 2e-12.
FLOAT64_AGREEMENT = 2e-12


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another make models this small ten times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hugging_face_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out the two places where Hugging Face goes through float32 whatever the model's dtype."""

    def norm(self: Any, x: torch.Tensor) -> Any:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def angles(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dim, theta = self.config.head_dim, self.config.rope_parameters["rope_theta"]
        frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        half = position_ids[..., None].double() * frequencies
        both = torch.cat([half, half], dim=-1)
        return both.cos(), both.sin()

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", angles)


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def peft_model(
    shape: LlamaShape,
    base: Tensors,
    adapter: Tensors,
    scale: LoraScale,
    *,
    attention_bias: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """The same model built by transformers and PEFT from the same arrays, under their own names."""
    settings: dict[str, Any] = dict(
        **{name: getattr(shape, name) for name in SIZES},
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        attention_bias=attention_bias,
        attn_implementation="sdpa",
    )
    config = LlamaConfig(**settings)
    biased = dataclasses.replace(shape, query_key_value_bias=attention_bias, output_bias=attention_bias)
    assert read_shape(config.to_dict()) == biased
    model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    report = model.load_state_dict({name: torch.from_numpy(weight) for name, weight in base.items()}, strict=False)
    assert not report.unexpected_keys
    assert set(report.missing_keys) <= ({"lm_head.weight"} if shape.tie_word_embeddings else set())
    lora = peft.LoraConfig(
        r=scale.rank,
        lora_alpha=int(scale.alpha),
        use_rslora=scale.rank_stabilized,
        target_modules=sorted({name.split(".")[-3] for name in adapter}),
        lora_dropout=0.0,
    )
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        wrapped = peft.get_peft_model(model, lora, autocast_adapter_dtype=False).to(dtype)
    peft.set_peft_model_state_dict(wrapped, {name: torch.from_numpy(tensor) for name, tensor in adapter.items()})
    for parameter in wrapped.parameters():
        parameter.requires_grad_(True)
    return wrapped


def torch_logits(model: Any, batch: Batch) -> torch.Tensor:
    logits: torch.Tensor = model(
        input_ids=torch.from_numpy(batch.input_ids).long(),
        position_ids=torch.from_numpy(batch.position_ids).long(),
        attention_mask=torch.from_numpy(attention_allowed(batch.segment_ids)),
        use_cache=False,
    ).logits
    return logits


def torch_window_gradients(model: Any, window: list[Batch]) -> tuple[float, dict[str, Float64]]:
    """(loss sum, gradient of the mean by PEFT's saved names and by transformers' names)."""
    losses = []
    for batch in window:
        logits = torch_logits(model, batch)[:, :-1].flatten(0, 1)
        labels = torch.from_numpy(batch.labels[:, 1:]).long().flatten()
        losses.append(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_LABEL, reduction="sum"))
    loss_sum: Any = torch.stack(losses).sum()
    model.zero_grad()
    (loss_sum / sum(batch.counted_tokens for batch in window)).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        saved = name.replace(".default.", ".") if "lora_" in name else name.removeprefix("base_model.model.")
        gradients[saved.replace(".base_layer.", ".")] = parameter.grad.double().numpy()
    return float(loss_sum.detach()), gradients


@pytest.mark.usefixtures("hugging_face_in_float64")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_loss_and_every_gradient_equal_torch_autograd(
    tied: bool,
    attention_bias: bool,
    rank_stabilized: bool,
    shape: LlamaShape,
    make_base: Callable[..., Tensors],
    make_adapter: Callable[..., Tensors],
    window: list[Batch],
) -> None:
    tied_shape = dataclasses.replace(shape, tie_word_embeddings=tied)
    base, adapter = make_base(tied_shape, attention_bias=attention_bias), make_adapter(tied_shape)
    scale = LoraScale(6.0, 3, rank_stabilized=rank_stabilized)
    model = peft_model(tied_shape, base, adapter, scale, attention_bias=attention_bias)
    expected_loss, expected = torch_window_gradients(model, window)

    result = OracleTrainer(tied_shape, base, adapter, scale).window_gradients(window, with_base=True)

    assert result.loss_sum == pytest.approx(expected_loss, abs=FLOAT64_AGREEMENT * result.token_count)
    assert result.gradients.keys() == expected.keys()
    for name, gradient in result.gradients.items():
        assert np.abs(gradient - expected[name]).max() < FLOAT64_AGREEMENT, name


@pytest.mark.usefixtures("hugging_face_in_float64")
def test_logits_equal_those_of_peft_also_on_padding_and_with_adapters_on_some_modules_only(
    shape: LlamaShape, make_base: Callable[..., Tensors], make_adapter: Callable[..., Tensors], window: list[Batch]
) -> None:
    base, adapter, scale = make_base(shape), make_adapter(shape, wanted=("v_proj", "up_proj")), LoraScale(6.0, 3)
    model = peft_model(shape, base, adapter, scale)
    trainer = OracleTrainer(shape, base, adapter, scale)
    for batch in window:
        expected = torch_logits(model, batch).detach().numpy()
        assert np.abs(trainer.logits(batch) - expected).max() < FLOAT64_AGREEMENT


FLOAT32 = UNIT_ROUNDOFF["float32"]
SCALE = LoraScale(6.0, 3)
# The constants of the architecture: 8 for a-priori bounds, 3 for envelopes measured by random roundings.
BOUND_CONSTANT = 8.0
ENVELOPE_WIDENING = 3.0


def float32_values(tensors: Tensors) -> Tensors:
    """The same tensors rounded to float32, so that both sides start from equal numbers."""
    return {name: tensor.astype(np.float32).astype(np.float64) for name, tensor in tensors.items()}


def test_float32_gradients_and_logits_lie_within_the_a_priori_bound_and_a_wrong_scale_far_outside(
    shape: LlamaShape, make_base: Callable[..., Tensors], make_adapter: Callable[..., Tensors], window: list[Batch]
) -> None:
    base, adapter = float32_values(make_base(shape)), float32_values(make_adapter(shape))
    model = peft_model(shape, base, adapter, SCALE, dtype=torch.float32)
    _, measured = torch_window_gradients(model, window)
    trainer = OracleTrainer(shape, base, adapter, SCALE)
    exact, scales = trainer.gradients(window), trainer.error_scales(window)
    wrong = OracleTrainer(shape, base, adapter, LoraScale(SCALE.alpha / 2, SCALE.rank)).gradients(window)
    for name, gradient in exact.items():
        bound = scales[name].bound(FLOAT32, constant=BOUND_CONSTANT)
        assert np.abs(measured[name] - gradient).max() <= bound
        assert np.abs(wrong[name] - gradient).max() > 1000 * bound
    bound = scales["lm_head"].bound(FLOAT32, constant=BOUND_CONSTANT)
    for batch in window:
        assert np.abs(torch_logits(model, batch).detach().numpy() - trainer.logits(batch)).max() <= bound


def test_float32_gradients_lie_within_the_spread_of_random_roundings_and_a_small_error_does_not(
    shape: LlamaShape, make_base: Callable[..., Tensors], make_adapter: Callable[..., Tensors], window: list[Batch]
) -> None:
    base, adapter = float32_values(make_base(shape)), float32_values(make_adapter(shape))
    _, measured = torch_window_gradients(peft_model(shape, base, adapter, SCALE, dtype=torch.float32), window)

    def gradients(arithmetic: Arithmetic) -> Tensors:
        return OracleTrainer(shape, base, adapter, SCALE, arithmetic).gradients(window)

    for name, allowed in spread(gradients, unit_roundoff=FLOAT32, runs=8).items():
        assert allowed.allows(measured[name], widening=ENVELOPE_WIDENING)
        assert not allowed.allows(allowed.exact * 1.001, widening=ENVELOPE_WIDENING)


STEPS = 20
LEARNING_RATE = 0.02
WEIGHT_DECAY = 0.01


def oracle_losses(trainer: OracleTrainer, window: list[Batch]) -> list[float]:
    settings: dict[str, Any] = {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "max_grad_norm": 1.0}
    steps = [trainer.train_step(window, **settings) for _ in range(STEPS)]
    return [step.loss_sum / step.token_count for step in steps]


def torch_losses(model: Any, window: list[Batch], *, first_bias_correction_step: int = 0) -> list[float]:
    """Losses of a float32 run; a later first step is the defect of (almost) no bias correction."""
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for parameter in trained if first_bias_correction_step else []:
        zeros = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        optimizer.state[parameter] = {"step": torch.tensor(float(first_bias_correction_step)), **zeros}
    losses = []
    for _ in range(STEPS):
        loss_sum, _ = torch_window_gradients(model, window)
        losses.append(loss_sum / sum(batch.counted_tokens for batch in window))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return losses


def test_a_float32_loss_curve_lies_within_the_envelope_and_one_without_bias_correction_outside(
    shape: LlamaShape, make_base: Callable[..., Tensors], make_adapter: Callable[..., Tensors], window: list[Batch]
) -> None:
    base, adapter = float32_values(make_base(shape)), float32_values(make_adapter(shape))

    def losses(arithmetic: Arithmetic) -> list[float]:
        return oracle_losses(OracleTrainer(shape, base, adapter, SCALE, arithmetic), window)

    envelope = loss_curve_envelope(losses, unit_roundoff=FLOAT32, runs=6)
    right = torch_losses(peft_model(shape, base, adapter, SCALE, dtype=torch.float32), window)
    uncorrected = torch_losses(
        peft_model(shape, base, adapter, SCALE, dtype=torch.float32), window, first_bias_correction_step=10**6
    )
    assert right[-1] < right[0] / 2
    assert envelope.excess(right, widening=ENVELOPE_WIDENING) <= 1.0
    assert envelope.excess(uncorrected, widening=ENVELOPE_WIDENING) > 1000.0
