"""L1: mixtures of experts: where tokens go, what each expert computes, and what an optimizer step does to them.

A family that is declared must be computed, experts' adapters included; any other mixture, and any unusual key, is
computed as its architecture's code computes it, or refused while it is loaded. Of experts with equal scores those with
the lower index are chosen, no token is dropped, and an expert without tokens is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from _pytest.mark.structures import ParameterSet

from qlora_hal.adapter.peft_files import read_adapter, write_adapter
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.contract.values import LinearShape
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import (
    judge_change,
    judge_evaluation,
    judge_gradients,
    judge_logits,
    must_refuse,
)
from qlora_hal_conformance.fixtures import Opened, Opener
from qlora_hal_conformance.parameters import PACKED_FORMATS, OracleOf, each_dtype, each_format, in_each_dtype
from qlora_hal_conformance.random_inputs import at_real_tokens, draw_adapter, draw_batch, draw_window, packed
from qlora_hal_conformance.routed_inputs import draw_routed, draw_routed_window, tokens_of_experts, without_choice
from qlora_hal_conformance.stored_weights import each_matrix, judge_format_error, judge_stored, weight_to_store
from qlora_hal_conformance.subject import Family, Subject
from qlora_hal_conformance.tolerances import UpdateSettings, decoded_exactly, gradient_noise, is_coarse
from qlora_hal_conformance.updating import drawn_moments, judge_step, oracle_at_state_of
from qlora_hal_oracle import LlamaShape, OracleTrainer, read_shape
from qlora_hal_oracle.families import MIXTURES, VARIATIONS_OF_MIXTURES, Config, draw_config, vary
from qlora_hal_oracle.random_models import draw_tensors, linear_shapes

RATE = 1e-2
DECAY = 0.5
STEPS = 3
MANY_TOKENS = (90, 70, 84)
"""All to the same few experts: several times the share of each in a balanced batch."""

has_experts = pytest.mark.needs(Feature.EXPERTS)


def each_mixture() -> list[ParameterSet]:
    return [pytest.param(name, id=name, marks=pytest.mark.needs(Family(name))) for name in MIXTURES]


def each_variation() -> list[ParameterSet]:
    return [
        pytest.param(name, id=name, marks=pytest.mark.needs(Family(variation.family, varied=True)))
        for name, variation in VARIATIONS_OF_MIXTURES.items()
    ]


Chosen = Callable[[str, LinearShape], bool]
TARGETS: Mapping[str, Chosen] = {
    "experts_alone": lambda module, linear: linear.experts > 1,
    "all_but_experts": lambda module, linear: linear.experts == 1,
    "down_projections_alone": lambda module, linear: module.rpartition(".")[2] in ("down_proj", "w2"),
    "gates_and_ups_alone": lambda module, linear: module.rpartition(".")[2] in ("gate_proj", "up_proj", "w1", "w3"),
}


# what is computed -----------------------------------------------------------------------------------------------------
@in_each_dtype
@pytest.mark.parametrize("family", each_mixture())
def test_a_mixture_equals_the_oracle(
    family: str, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Logits, losses and every gradient, the experts' included; of packed rows too where they are declared."""
    ready = _opened(opened, seeded, draw_config(family, seeded))
    reference = oracle(ready)
    window = draw_routed_window(seeded, reference, ready.dtype)
    judge_logits(ready, reference, window[0], judging)
    judge_evaluation(ready, reference, window, judging)
    judge_gradients(ready.trained_gradient(window), reference, window, ready, judging)
    judge_gradients(ready.trainer.gradients(window), reference, window, ready, judging)
    if opened.subject.declares(Feature.PACKING):
        together = [packed([draw_routed(seeded, reference, ready.dtype, lengths=(13, 7, 16))], time=40)]
        judge_gradients(ready.trained_gradient(together), reference, together, ready, judging)


@pytest.mark.parametrize("name", each_variation())
def test_an_unusual_key_of_a_mixture_is_computed_or_refused(
    name: str, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    ready = _opened(opened, seeded, vary(name, seeded))
    _judge_products(ready, oracle(ready), seeded, judging)


@has_experts
@pytest.mark.parametrize("chosen", TARGETS.values(), ids=TARGETS)
@in_each_dtype
def test_only_some_modules_of_a_mixture_are_adapted(
    chosen: Chosen, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """What carries no adapter computes with its own weights, and passes the gradient on."""
    shape = _drawn(opened, seeded, draw_config(main_mixture(opened.subject), seeded))
    targets = [module for module, linear in linear_shapes(shape).items() if chosen(module, linear)]
    ready = opened("drawn", adapter=draw_adapter(seeded, shape, targets=targets))
    _judge_products(ready, oracle(ready), seeded, judging)


@has_experts
@pytest.mark.needs(Feature.GRADIENT_CHECKPOINTING)
@in_each_dtype
def test_checkpointing_changes_no_gradient_of_a_mixture(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """The second forward pass sends every token where the first one sent it."""
    shape = _drawn(opened, seeded, draw_config(main_mixture(opened.subject), seeded))
    ready = opened("drawn", checkpointing=True, adapter=draw_adapter(seeded, shape))
    _judge_products(ready, oracle(ready), seeded, judging)


@has_experts
def test_a_stack_of_experts_is_one_module(opened: Opener, seeded: np.random.Generator) -> None:
    """Under the path that experts have on the hub, less their number; routers are none."""
    ready = _opened(opened, seeded, draw_config(main_mixture(opened.subject), seeded))
    assert dict(ready.trainer.linear_modules()) == linear_shapes(ready.model.shape)
    for module, linear in linear_shapes(ready.model.shape).items():
        found = ready.trainer.dequantized_weight(module)
        assert found.shape == linear.weight, f"{module}: {found.shape}, {linear.weight} is due"


# routing --------------------------------------------------------------------------------------------------------------
@in_each_dtype
@pytest.mark.parametrize("family", each_mixture())
def test_of_equal_experts_those_with_the_lower_index_are_chosen(
    family: str, opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """All scores are equal, to the last bit, in any arithmetic."""
    ready = _opened_without_choice(opened, seeded, draw_config(family, seeded))
    reference, batch = oracle(ready), draw_batch(seeded, ready.model.shape)
    judge_logits(ready, reference, batch, judging)
    judge_gradients(ready.trained_gradient([batch]), reference, [batch], ready, judging)


@has_experts
@in_each_dtype
def test_no_token_is_dropped_at_a_full_expert(
    opened: Opener, oracle: OracleOf, seeded: np.random.Generator, judging: Judge
) -> None:
    """Hundreds of tokens, all for the same experts, while others have none."""
    ready = _opened_without_choice(opened, seeded, draw_config(main_mixture(opened.subject), seeded))
    reference, batch = oracle(ready), draw_batch(seeded, ready.model.shape, lengths=MANY_TOKENS)
    judge_logits(ready, reference, batch, judging)
    judge_gradients(ready.trained_gradient([batch]), reference, [batch], ready, judging)


# steps ----------------------------------------------------------------------------------------------------------------
@has_experts
@in_each_dtype
def test_a_step_of_a_mixture(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """From given moments, with decay and a clip by the norm of all gradients: experts' are part of it."""
    ready = _opened(opened, seeded, draw_config(main_mixture(opened.subject), seeded))
    window = draw_routed_window(seeded, ready.oracle(), ready.dtype)
    ready.trainer.import_optimizer(drawn_moments(ready, window, int(seeded.integers(2, 40)), seeded))
    reference = oracle_at_state_of(ready)
    judge_step(ready, reference, window, UpdateSettings(RATE, DECAY, max_grad_norm=0.05), judging)


@has_experts
@in_each_dtype
def test_an_expert_without_tokens_is_left_as_it_is(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Steps with decay and with moments that would go on moving it: adapter and moments keep every bit, its gradient is
    zero; the others move."""
    ready = _opened_without_choice(opened, seeded, draw_config(main_mixture(opened.subject), seeded))
    window = [draw_batch(seeded, ready.model.shape)]
    ready.trainer.import_optimizer(drawn_moments(ready, window, 1, seeded))
    busy = tokens_of_experts(ready.oracle(), window)
    gradients = ready.trainer.gradients(window)
    before, moments = ready.trainer.export_adapter().tensors, ready.trainer.export_optimizer().moments
    for _ in range(STEPS):
        ready.step(window, RATE, weight_decay=DECAY)
    after, moments_after = ready.trainer.export_adapter().tensors, ready.trainer.export_optimizer()
    assert moments_after.step == 1 + STEPS, f"the optimizer says step {moments_after.step} after {1 + STEPS}"
    for place in _expert_tensors(ready, busy):
        pairs = {
            "adapter": (before[place.name], after[place.name]),
            **{
                kind: (moments[f"{place.name}.{kind}"], moments_after.moments[f"{place.name}.{kind}"])
                for kind in ("exp_avg", "exp_avg_sq")
            },
        }
        for what, (old, new) in pairs.items():
            same = np.array_equal(old[place.expert], new[place.expert])
            assert same is not place.is_busy, f"{what} of expert {place.expert} of {place.name}, busy: {place.is_busy}"
        assert place.is_busy or not gradients[place.name][place.expert].any(), f"{place} has a gradient"


@has_experts
@in_each_dtype
def test_an_expert_that_gets_tokens_again_goes_on(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Few tokens, which hardly reach all experts, then many: each step is AdamW's from the state that it found. Two of
    the few are predicted: a tied head finds one that repeats its predecessor for sure, and nothing is left to learn."""
    ready = _opened(opened, seeded, draw_config(main_mixture(opened.subject), seeded))
    settings = UpdateSettings(RATE, DECAY)
    for lengths in ((3,), (20, 15)):
        reference = oracle_at_state_of(ready)
        window = [draw_routed(seeded, reference, ready.dtype, lengths=lengths, prompt=1)]
        judge_step(ready, reference, window, settings, judging)


@has_experts
@in_each_dtype
def test_logits_follow_the_steps_of_a_mixture(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """After steps the model is the base as it was, routers included, with the adapter that is exported."""
    ready = _opened(opened, seeded, draw_config(main_mixture(opened.subject), seeded))
    reference = ready.oracle()
    batch = draw_routed(seeded, reference, ready.dtype)
    start = at_real_tokens(ready.trainer.logits(batch), batch)
    weights = {module: ready.trainer.dequantized_weight(module) for module in ready.trainer.linear_modules()}
    for _ in range(STEPS):
        ready.step([draw_routed(seeded, oracle_at_state_of(ready), ready.dtype)], RATE)
    for module, weight in weights.items():
        assert np.array_equal(ready.trainer.dequantized_weight(module), weight), f"{module} changed"
    trained = oracle_at_state_of(ready)
    again = draw_routed(seeded, trained, ready.dtype)
    judge_logits(ready, trained, again, judging)
    judge_change(
        "logits of the trained adapter",
        at_real_tokens(ready.trainer.logits(batch), batch),
        start,
        reference,
        batch,
        ready,
        judging,
    )


# storage --------------------------------------------------------------------------------------------------------------
@has_experts
@pytest.mark.parametrize("weight_format", each_format())
def test_every_expert_is_stored_in_the_format(
    weight_format: WeightFormat, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """Within the bound of the format and not closer, expert by expert; and the products are those of these weights."""
    shape = _drawn(opened, seeded, draw_config(main_mixture(opened.subject), seeded))
    ready = opened("drawn", weight_format=weight_format, adapter=draw_adapter(seeded, shape))
    for module in linear_shapes(shape):
        judge_format_error(module, ready, judging)
        if weight_format is not WeightFormat.NONE:
            for name, weight, decoded in each_matrix(module, ready):
                assert not np.array_equal(decoded, weight), f"{name} is not quantized"
    _judge_products(ready, ready.oracle(), seeded, judging)


@has_experts
@pytest.mark.needs(Feature.LOAD_PREQUANTIZED)
@pytest.mark.parametrize("weight_format", each_format(*PACKED_FORMATS))
def test_quantized_checkpoint_of_a_mixture_is_taken_as_it_is(
    weight_format: WeightFormat, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """Each expert's codes, as they lie in the files."""
    shape = _drawn(opened, seeded, draw_config(main_mixture(opened.subject), seeded))
    ready = opened("drawn", weight_format=weight_format, prequantized=True, adapter=draw_adapter(seeded, shape))
    judge_stored(ready, judging)
    _judge_products(ready, ready.oracle(), seeded, judging)


@has_experts
@pytest.mark.needs(Feature.LOAD_PREQUANTIZED, WeightFormat.MXFP4, Family("gpt_oss"))
@in_each_dtype
def test_published_experts_of_gpt_oss_are_kept(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """MXFP4 as the hub has it: the experts' codes are what is computed with, before steps and after them, and all else
    stays as it is stored."""
    shape = _drawn(opened, seeded, draw_config("gpt_oss", seeded))
    ready = opened("drawn", weight_format=WeightFormat.MXFP4, prequantized=True, adapter=draw_adapter(seeded, shape))
    judge_stored(ready, judging)
    assert ready.model.stored is not None
    for module in linear_shapes(shape).keys() - ready.model.stored.keys():
        weight = weight_to_store(module, ready)
        found = ready.trainer.dequantized_weight(module)
        judging.within(module, found, weight, decoded_exactly(weight.astype(np.float64), ready.dtype))
    _judge_products(ready, ready.oracle(), seeded, judging)
    ready.step([draw_routed(seeded, oracle_at_state_of(ready), ready.dtype)], RATE)
    judge_stored(ready, judging)


# adapters -------------------------------------------------------------------------------------------------------------
@has_experts
@pytest.mark.parametrize("dtype", each_dtype())
def test_adapter_of_experts_comes_out_as_it_went_in(
    dtype: str, opened: Opener, seeded: np.random.Generator, judging: Judge
) -> None:
    """Float32 bits of every expert, whatever the compute dtype."""
    shape = _drawn(opened, seeded, draw_config(main_mixture(opened.subject), seeded))
    adapter = draw_adapter(seeded, shape)
    ready = opened("drawn", dtype=dtype, adapter=adapter)
    judging.equal("tensors", ready.trainer.export_adapter().tensors, adapter.tensors)


@pytest.mark.parametrize("family", each_mixture())
def test_adapter_of_experts_through_files(
    family: str, opened: Opener, seeded: np.random.Generator, judging: Judge, scratch: Path
) -> None:
    """Written and read it means the same: tensors bit for bit, and so the logits."""
    ready = _opened(opened, seeded, draw_config(family, seeded))
    ready.step(draw_window(seeded, ready.model.shape), RATE)
    exported = ready.trainer.export_adapter()
    write_adapter(scratch / "adapter", exported, base_name="tiny", base_revision=None, provenance={})
    read = read_adapter(scratch / "adapter")
    judging.equal("tensors", read.tensors, exported.tensors)
    ready.attach(read)
    reference = ready.oracle(exported)
    judge_logits(ready, reference, draw_routed(seeded, reference, ready.dtype), judging)


@has_experts
@pytest.mark.needs(Feature.LORA_DROPOUT)
def test_dropout_of_experts_is_refused(opened: Opener, seeded: np.random.Generator) -> None:
    """No rule says which of an expert's inputs a mask drops; that of all other modules is the contract's."""
    shape = _drawn(opened, seeded, draw_config(main_mixture(opened.subject), seeded))
    ready = opened("drawn")
    must_refuse(lambda: ready.attach(draw_adapter(seeded, shape, dropout=0.1)), "dropout on experts")
    others = [module for module, linear in linear_shapes(shape).items() if linear.experts == 1]
    ready.attach(draw_adapter(seeded, shape, targets=others, dropout=0.1))


# what the cases share -------------------------------------------------------------------------------------------------
def main_mixture(subject: Subject) -> str:
    """The family of the cases that are about something else: the first that the backend declares."""
    return next((family for family in MIXTURES if subject.declares(Family(family))), next(iter(MIXTURES)))


def _drawn(opened: Opener, seeded: np.random.Generator, config: Config) -> LlamaShape:
    shape = read_shape(config)
    opened.models.define("drawn", shape, draw_tensors(shape, seeded), config)
    return shape


def _opened(opened: Opener, seeded: np.random.Generator, config: Config) -> Opened:
    """The drawn model of a config.json, loaded, with an adapter in mid-training."""
    shape = _drawn(opened, seeded, config)
    return opened("drawn", adapter=draw_adapter(seeded, shape))


def _opened_without_choice(opened: Opener, seeded: np.random.Generator, config: Config) -> Opened:
    """The same with routers in which all experts tie, for every token."""
    shape = read_shape(config)
    assert shape.mixture is not None
    routers = shape.mixture.routers(shape.hidden_size)
    opened.models.define("ties", shape, without_choice(draw_tensors(shape, seeded), list(routers)), config)
    return opened("ties", adapter=draw_adapter(seeded, shape))


def _judge_products(ready: Opened, reference: OracleTrainer, seeded: np.random.Generator, judging: Judge) -> None:
    """Logits and every gradient of one batch. The slope of a gate falls to zero at its limit: a coarse dtype has some
    gates on the other side of it, and no entry of theirs a bound. Their gradients are judged as a whole, beside a run
    rounded at random, which has such gates too."""
    batch = draw_routed(seeded, reference, ready.dtype)
    judge_logits(ready, reference, batch, judging)
    mixture = reference.model.shape.mixture
    if mixture is not None and mixture.limit is not None and is_coarse(ready.dtype):
        expected = reference.window_gradients([batch]).gradients
        noise = gradient_noise(reference, [batch], ready.dtype)
        judging.all_whole("gradients", ready.trained_gradient([batch]), expected, noise)
        return
    judge_gradients(ready.trained_gradient([batch]), reference, [batch], ready, judging)


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One expert's part of an adapter tensor."""

    name: str
    expert: int
    is_busy: bool


def _expert_tensors(ready: Opened, busy: list[set[int]]) -> list[ExpertTensor]:
    """Every expert's A and B; `busy` are the experts with tokens of each layer that has experts."""
    assert ready.adapter is not None
    shape, found = ready.model.shape, []
    layers = [layer for layer in range(shape.num_hidden_layers) if shape.mixture_of(layer) is not None]
    for name, tensor in ready.adapter.tensors.items():
        if tensor.ndim == 3:
            layer = int(name.partition(".layers.")[2].partition(".")[0])
            has_tokens = busy[layers.index(layer)]
            found += [ExpertTensor(name, expert, expert in has_tokens) for expert in range(len(tensor))]
    assert {place.is_busy for place in found} == {True, False}, "the case needs experts with tokens and without"
    return found
