"""One run on a mixture of experts, all of it together: its storage, dtype, packing, dropout, recomputation and adapter.

Where a token goes is no continuous function of rounding, so tokens are drawn that are far from another choice. Long
rows, idle experts and what 8-bit moments learn are judged where all experts tie, which no rounding changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from qlora_hal.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import Feature, WeightFormat
from qlora_hal.contract.values import Adapter, Batch, Float32
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.combination import MOST_TOKENS, Combination
from qlora_hal_conformance.comparing import judge_evaluation, judge_gradients, judge_logits
from qlora_hal_conformance.dropout_oracle import DropoutOracle
from qlora_hal_conformance.fixtures import Opened, Opener, oracle_step
from qlora_hal_conformance.random_inputs import draw_adapter, stream
from qlora_hal_conformance.request import Request
from qlora_hal_conformance.routed_inputs import tokens_of_experts
from qlora_hal_conformance.stored_weights import (
    each_matrix,
    judge_format_error,
    judge_stored,
    record_in,
    weight_to_store,
)
from qlora_hal_conformance.tolerances import (
    UpdateSettings,
    decoded_exactly,
    eight_bit_drift,
    gradient_noise,
    is_coarse,
    learning_shortfall,
    resumed_bounds,
)
from qlora_hal_conformance.updating import drawn_moments, judge_step
from qlora_hal_conformance_runs.drawn_runs import draw_routed_window, draw_window
from qlora_hal_conformance_runs.mixture import Mixture, tied_experts
from qlora_hal_oracle import LlamaShape, OracleTrainer, read_shape
from qlora_hal_oracle.families import Config
from qlora_hal_oracle.random_models import TinyModel, draw_tensors, linear_shapes

KEYS = (7, 2**45 + 7)
STEPS = 2
LEARNING_RATE, DECAY, LEARNING_STEPS = 1e-2, 0.5, 8
SHOWS_GRADIENTS = "adamw"
"""The gradient that a step trains with is read from the first moments: experts' are so many numbers that an optimizer
with 8 bits rounds them."""
DRAWN, TIED = "mixture", "mixture whose experts tie"


@dataclass(frozen=True, slots=True)
class OneRun:
    """Opens trainers on drawn relatives of the run's model, as the run would."""

    opener: Opener
    run: Combination
    mixture: Mixture
    seeded: np.random.Generator

    def opened(self, name: str = DRAWN, *, optimizer: str = "") -> Opened:
        """On the run's storage, with the run's adapter in mid-training, and its optimizer where none is given."""
        return self.opened_with(self.adapter(name), name, optimizer=optimizer)

    def opened_with(self, adapter: Adapter, name: str = DRAWN, *, optimizer: str = "") -> Opened:
        return self.opener(self._model(name), adapter=adapter, optimizer=optimizer or self.run.optimizer)

    def adapter(self, name: str = DRAWN) -> Adapter:
        """The run's own alpha; B shrinks or grows with it, so that the adapter's part stays a quarter of the base's."""
        run, shape = self.run, read_shape(self._config(name))
        targets = [module for module in linear_shapes(shape) if in_layer(module) in run.target_kinds]
        assert targets, f"the drawn {self.mixture.family} has none of {run.target_kinds}"
        drawn = draw_adapter(
            self.seeded,
            shape,
            targets=targets,
            dropout=run.dropout,
            use_rslora=run.use_rslora,
            rank=run.judged_rank,
        )
        config = replace(drawn.config, alpha=run.judged_alpha)
        share = np.float32(drawn.config.scale / config.scale)
        return Adapter({n: t * share if "lora_B" in n else t for n, t in drawn.tensors.items()}, config)

    def settings(self) -> UpdateSettings:
        run = self.run
        return UpdateSettings(run.learning_rate, run.weight_decay, run.max_grad_norm, run.beta1, run.beta2, run.epsilon)

    def _config(self, name: str) -> Config:
        return self.mixture.draw(stream(self.opener.models.seed, f"config/{self.mixture.family}/{name}"))

    def _model(self, name: str) -> TinyModel:
        """As the run's checkpoint holds it: packed, or plain in its dtype."""
        models, run, config = self.opener.models, self.run, self._config(name)
        shape = read_shape(config)
        tensors = draw_tensors(shape, stream(models.seed, f"model/{name}"))
        models.define(name, shape, tied_experts(shape, tensors) if name == TIED else tensors, config)
        if run.prequantized:
            storage = Quantization(run.stored_as, run.block_size, run.double_quant)
            return models.quantized(name, storage, stored_dtype=run.stored_dtype)
        return models.plain(name, stored_dtype=run.stored_dtype)


def in_layer(module: str) -> str:
    """`mlp.experts.up_proj` of `model.layers.1.mlp.experts.up_proj`."""
    return module.partition(".layers.")[2].partition(".")[2]


@pytest.fixture
def one_run(opened: Opener, run_request: Request, seeded: np.random.Generator) -> OneRun:
    assert opened.subject.combination is not None, "this section is about a run, and none was named"
    lanes_folder = Path(run_request.folder).parent
    return OneRun(opened, opened.subject.combination, Mixture.read(lanes_folder), seeded)


# what is computed -----------------------------------------------------------------------------------------------------
def test_weights_of_every_expert_are_those_of_the_format(one_run: OneRun, judging: Judge) -> None:
    """Made from the checkpoint's own dtype, or as its codes say; scales that are quantized themselves really are."""
    ready = one_run.opened()
    if ready.model.stored is not None:
        judge_stored(ready, judging)
        for module in linear_shapes(ready.model.shape).keys() - ready.model.stored.keys():
            weight = weight_to_store(module, ready)
            found = ready.trainer.dequantized_weight(module)
            judging.within(module, found, weight, decoded_exactly(weight.astype(np.float64), ready.dtype))
        return
    nearer_to_plain = []
    for module in linear_shapes(ready.model.shape):
        judge_format_error(module, ready, judging)
        for name, weight, decoded in each_matrix(module, ready):
            if one_run.run.stored_as is not WeightFormat.NONE:
                assert not np.array_equal(decoded, weight), f"{name} is not quantized"
            if one_run.run.double_quant and is_nearer_to_plain_scales(ready, weight, decoded):
                nearer_to_plain.append(name)
    assert not nearer_to_plain, f"the scales of {nearer_to_plain[:3]} are not quantized"


def test_logits_and_losses(one_run: OneRun, judging: Judge) -> None:
    """Without dropout, whatever the adapter has."""
    ready = one_run.opened()
    window, reference = draw_routed_window(one_run.seeded, ready, one_run.run), ready.oracle()
    for batch in window:
        judge_logits(ready, reference, batch, judging)
    judge_evaluation(ready, reference, window, judging)


@pytest.mark.parametrize("key", KEYS, ids=["low_key", "high_key"])
def test_gradient_that_a_step_trains_with(key: int, one_run: OneRun, judging: Judge) -> None:
    """Every adapter tensor's, experts' included, with the masks of the step's key; looking first changes nothing."""
    ready = one_run.opened(optimizer=SHOWS_GRADIENTS)
    window = draw_routed_window(one_run.seeded, ready, one_run.run, key=key)
    ready.trainer.evaluate(window)
    ready.trainer.logits(window[0])
    _judge_trained_gradient(ready, window, key, judging)


def test_gradient_without_dropout(one_run: OneRun, judging: Judge) -> None:
    ready = one_run.opened()
    window = draw_routed_window(one_run.seeded, ready, one_run.run)
    _judge(ready.trainer.gradients(window), ready.oracle(), window, ready, judging)


def test_long_rows_that_all_go_to_the_same_experts(one_run: OneRun, judging: Judge) -> None:
    """As long as the run's, where other kernels may be taken; of experts that tie those with the lower index."""
    ready, run = one_run.opened(TIED, optimizer=SHOWS_GRADIENTS), one_run.run
    long = min(run.row_length, MOST_TOKENS)
    window = draw_window(one_run.seeded, ready.model.shape, run, tokens=long, micro_batches=1, rows=1)
    _judge_trained_gradient(ready, window, 5, judging)


# steps ----------------------------------------------------------------------------------------------------------------
def test_steps_with_the_settings_of_the_run(one_run: OneRun, judging: Judge) -> None:
    """Each from the state that the one before left."""
    if not one_run.run.has_exact_moments:
        _judge_learning(one_run, judging)
        return
    ready = one_run.opened()
    for key in range(100, 100 + STEPS):
        window = draw_routed_window(one_run.seeded, ready, one_run.run, key=key)
        judge_step(
            ready,
            DropoutOracle.at_state_of(ready, key),
            window,
            one_run.settings(),
            judging,
            dropout_key=key,
        )


def test_steps_move_experts_with_tokens_and_nothing_else(one_run: OneRun) -> None:
    """The base keeps every bit, and so do adapter and moments of an expert without tokens, whatever decays and however
    far its moments would go on moving it. Moments of 8 bits begin as zeros."""
    ready = one_run.opened(TIED)
    window = draw_window(one_run.seeded, ready.model.shape, one_run.run)
    if one_run.run.has_exact_moments:
        ready.trainer.import_optimizer(drawn_moments(ready, window, 1, one_run.seeded))
    base = {module: ready.trainer.dequantized_weight(module) for module in ready.trainer.linear_modules()}
    busy, before = tokens_of_experts(ready.oracle(), window), _held(ready)
    for key in range(STEPS):
        ready.step(window, LEARNING_RATE, dropout_key=key, weight_decay=DECAY)
    for module, weight in base.items():
        assert np.array_equal(ready.trainer.dequantized_weight(module), weight), f"{module} changed"
    after = _held(ready)
    for name, tensor in before.items():
        if tensor.ndim == 2:
            assert not np.array_equal(tensor, after[name]), f"{name} never changed"
            continue
        for expert, (old, new) in enumerate(zip(tensor, after[name], strict=True)):
            is_busy = expert in busy[_place_of_layer(ready.model.shape, name)]
            assert np.array_equal(old, new) is not is_busy, f"expert {expert} of {name}, which has tokens: {is_busy}"


def test_run_that_was_stopped_goes_on(one_run: OneRun, scratch: Path, judging: Judge) -> None:
    """Through the files of a checkpoint: its further steps are those of the run that never stopped."""
    run = one_run.run
    given = one_run.settings() if run.has_exact_moments else UpdateSettings(LEARNING_RATE)
    adapter = one_run.adapter()
    through, stopped = one_run.opened_with(adapter), one_run.opened_with(adapter)
    windows = [_trained_window(one_run, through, given, key) for key in range(2 * STEPS)]
    for key, window in enumerate(windows[:STEPS]):
        _take(stopped, window, given, key)
    state = TrainingState(STEPS, 0.5, 100, stopped.trainer.export_adapter(), stopped.trainer.export_optimizer())
    kept = load_checkpoint(save_checkpoint(scratch, state, keep=2))
    resumed = one_run.opened_with(kept.adapter)
    resumed.trainer.import_optimizer(kept.optimizer)
    reference = DropoutOracle.at_state_of(resumed, STEPS)
    for key, window in enumerate(windows[STEPS:], start=STEPS):
        _take(resumed, window, given, key)
    found, expected = (each.trainer.export_adapter().tensors for each in (resumed, through))
    if one_run.opener.subject.declares(Feature.BITWISE_DETERMINISM):
        judging.equal("adapter", found, expected)
    elif run.has_exact_moments:
        bounds = resumed_bounds(reference, windows[STEPS:], resumed.dtype, given)
        judging.all_within("adapter", found, expected, bounds)
    else:
        way = np.concatenate([(expected[name] - kept.adapter.tensors[name]).ravel() for name in expected])
        apart = np.concatenate([(expected[name] - found[name]).ravel() for name in expected])
        share = float(np.linalg.norm(apart) / np.linalg.norm(way))
        judging.at_most("distance of the two runs / way they went", share, eight_bit_drift())
    assert resumed.trainer.export_optimizer().step == 2 * STEPS


# what the cases share -------------------------------------------------------------------------------------------------
def is_nearer_to_plain_scales(ready: Opened, weight: Float32, decoded: Float32) -> bool:
    codec, block = record_in(ready).codec, ready.quantization.block_size
    doubled, plain = (codec.dequantize(codec.quantize(weight, block, double)) for double in (True, False))
    return bool(np.linalg.norm(decoded - plain) < np.linalg.norm(decoded - doubled))


def _judge_trained_gradient(ready: Opened, window: Sequence[Batch], key: int, judging: Judge) -> None:
    reference = DropoutOracle.at_state_of(ready, key)
    _judge(ready.trained_gradient(window, dropout_key=key), reference, window, ready, judging)


def _judge(
    found: Mapping[str, Float32], reference: OracleTrainer, window: Sequence[Batch], ready: Opened, judging: Judge
) -> None:
    """As section 33: a coarse dtype has some gates on the other side of their limit, where a slope is zero, and no
    entry of theirs a bound. Their gradients are judged as a whole, beside a run rounded at random."""
    mixture = ready.model.shape.mixture
    if mixture is not None and mixture.limit is not None and is_coarse(ready.dtype):
        expected = reference.window_gradients(window).gradients
        judging.all_whole("gradients", found, expected, gradient_noise(reference, window, ready.dtype))
        return
    judge_gradients(found, reference, window, ready, judging)


def _judge_learning(one_run: OneRun, judging: Judge) -> None:
    """Moments of 8 bits have no number to compare: the loss falls about as far as with exact ones."""
    ready = one_run.opened(TIED)
    window = draw_window(one_run.seeded, ready.model.shape, one_run.run)
    exact = DropoutOracle.at_state_of(ready, 3)
    before = exact.evaluate(window)[0]
    for _ in range(LEARNING_STEPS):
        ready.step(window, LEARNING_RATE, dropout_key=3)
        oracle_step(exact, window, LEARNING_RATE)
    found, expected = before - ready.trainer.evaluate(window).loss_sum, before - exact.evaluate(window)[0]
    judging.at_most("part of the exact fall that is missing", max(1.0 - found / expected, 0.0), learning_shortfall())


def _trained_window(one_run: OneRun, ready: Opened, given: UpdateSettings, key: int) -> list[Batch]:
    """A window of the step of this key, which is taken."""
    window = draw_routed_window(one_run.seeded, ready, one_run.run, key=key)
    _take(ready, window, given, key)
    return window


def _take(ready: Opened, window: Sequence[Batch], given: UpdateSettings, key: int) -> None:
    ready.step(
        window,
        given.learning_rate,
        dropout_key=key,
        weight_decay=given.weight_decay,
        max_grad_norm=given.max_grad_norm,
        beta1=given.beta1,
        beta2=given.beta2,
        epsilon=given.epsilon,
    )


def _held(ready: Opened) -> dict[str, Float32]:
    """Adapter and moments as they are."""
    return {**ready.trainer.export_adapter().tensors, **ready.trainer.export_optimizer().moments}


def _place_of_layer(shape: LlamaShape, name: str) -> int:
    """Which of the layers with experts an adapter tensor is of."""
    layer = int(name.partition(".layers.")[2].partition(".")[0])
    return [at for at in range(shape.num_hidden_layers) if shape.mixture_of(at) is not None].index(layer)
