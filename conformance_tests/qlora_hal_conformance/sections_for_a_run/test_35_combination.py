"""One run's combination, all of it together: what is right alone may be wrong beside the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qlora_hal.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.values import Adapter, Batch
from qlora_hal.formats.catalogue import record_of
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.combination import MOST_MICRO_BATCHES, MOST_ROWS, MOST_TOKENS, Combination
from qlora_hal_conformance.comparing import judge_gradients, judge_logits
from qlora_hal_conformance.dropout_oracle import DropoutOracle
from qlora_hal_conformance.fixtures import Opened, Opener, oracle_step, placed
from qlora_hal_conformance.parameters import OracleOf
from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch, packed, stream
from qlora_hal_conformance.tolerances import (
    UpdateSettings,
    decoded_exactly,
    eight_bit_drift,
    format_error,
    learning_shortfall,
    loss_bound,
    resumed_bounds,
)
from qlora_hal_conformance.updating import judge_step
from qlora_hal_oracle import LlamaShape, read_shape
from qlora_hal_oracle.families import MODEL_TYPES, Config, draw_config
from qlora_hal_oracle.random_models import TinyModel, draw_tensors, linear_shapes

KEYS = (7, 2**45 + 7, 2**62 + 11)
STEPS = 3
LEARNING_RATE, LEARNING_STEPS = 1e-2, 8
"""For what is about moments that are stored in 8 bits: far enough to see whether they learn."""
TOKENS_TO_WORK_WITH = 28
SHORTEST_ROW = 16
RELATIVES = {model_type: name for name, model_type in MODEL_TYPES.items() if model_type != "llama"}
"""The name under which each family is drawn, by `model_type`; plain Llamas are those of all other sections."""
NARROW_RANK = 32
"""The largest rank that fits the keys of every drawn shape."""


@pytest.fixture
def run(opened: Opener) -> Combination:
    """What the run that is judged asks for."""
    combination = opened.subject.combination
    assert combination is not None, "this section is about a run, and none was named"
    return combination


@pytest.fixture
def ready(opened: Opener, run: Combination, seeded: np.random.Generator) -> Opened:
    """A trainer on the run's storage, with the run's adapter in mid-training."""
    return _open(opened, run, _adapter(seeded, _shape(opened, run), run))


def test_weights_are_those_of_the_format(ready: Opened, run: Combination, judging: Judge) -> None:
    """Made from the checkpoint's own dtype, or as its codes say; scales that are quantized themselves really are."""
    codec, block = record_of(run.stored_as).codec, ready.quantization.block_size
    nearer_to_plain = []
    for module in ready.trainer.linear_modules():
        decoded, weight = ready.trainer.dequantized_weight(module), ready.model.tensors[f"{module}.weight"]
        if ready.model.stored is not None:
            stored = ready.model.stored[module]
            judging.within(f"weight of {module}", decoded, stored, decoded_exactly(stored, ready.dtype))
            continue
        allowed = codec.error_bound(weight, block, run.double_quant)
        assert allowed is not None, f"{run.weight_format} cannot be made while loading"
        judging.within(f"weight of {module}", decoded, weight, format_error(allowed, weight, ready.dtype))
        if run.double_quant:
            doubled, plain = (codec.dequantize(codec.quantize(weight, block, double)) for double in (True, False))
            nearer_to_plain += [module] * bool(np.linalg.norm(decoded - plain) < np.linalg.norm(decoded - doubled))
    assert not nearer_to_plain, f"the scales of {nearer_to_plain[:3]} are not quantized"


def test_logits_and_losses(
    ready: Opened, oracle: OracleOf, run: Combination, seeded: np.random.Generator, judging: Judge
) -> None:
    """Without dropout, whatever the adapter has."""
    reference, window = oracle(ready), _window(seeded, ready.model.shape, run)
    for batch in window:
        judge_logits(ready, reference, batch, judging)
    found, (expected, tokens) = ready.trainer.evaluate(window), reference.evaluate(window)
    assert found.token_count == tokens, f"{found.token_count} tokens, {tokens} count"
    judging.within("loss sum", np.array(found.loss_sum), np.array(expected), loss_bound(reference, window, ready.dtype))


@pytest.mark.parametrize("key", KEYS, ids=["low_key", "high_key", "other_high_key"])
def test_gradient_that_a_step_trains_with(
    key: int, ready: Opened, run: Combination, seeded: np.random.Generator, judging: Judge
) -> None:
    """Every adapter tensor's, with the masks of the step's key in every layer, row and micro-batch."""
    window = _window(seeded, ready.model.shape, run)
    judge_gradients(_trained(ready, window, key), DropoutOracle.at_state_of(ready, key), window, ready, judging)


def test_gradient_without_dropout(
    ready: Opened, oracle: OracleOf, run: Combination, seeded: np.random.Generator, judging: Judge
) -> None:
    window = _window(seeded, ready.model.shape, run)
    judge_gradients(ready.trainer.gradients(window), oracle(ready), window, ready, judging)


def test_long_rows(ready: Opened, run: Combination, seeded: np.random.Generator, judging: Judge) -> None:
    """As long as the run's, where other kernels may be taken."""
    long = min(run.row_length, MOST_TOKENS)
    window = _window(seeded, ready.model.shape, run, tokens=long, micro_batches=1, rows=1)
    judge_gradients(_trained(ready, window, 5), DropoutOracle.at_state_of(ready, 5), window, ready, judging)


def test_looking_between_steps_changes_nothing(
    ready: Opened, run: Combination, seeded: np.random.Generator, judging: Judge
) -> None:
    window = _window(seeded, ready.model.shape, run)
    ready.trainer.evaluate(window)
    ready.trainer.logits(window[0])
    judge_gradients(_trained(ready, window, 9), DropoutOracle.at_state_of(ready, 9), window, ready, judging)


def test_steps_with_the_settings_of_the_run(
    ready: Opened, opened: Opener, run: Combination, seeded: np.random.Generator, judging: Judge
) -> None:
    """Each from the state that the one before left."""
    given, shape = _settings(run), ready.model.shape
    if not run.has_exact_moments:
        _judge_learning(opened, run, seeded, judging)
        return
    for step in range(STEPS):
        window = _window(seeded, shape, run)
        reference = DropoutOracle.at_state_of(ready, 100 + step)
        judge_step(ready, reference, window, given, judging, dropout_key=100 + step)


def test_base_is_the_same_after_steps(ready: Opened, run: Combination, seeded: np.random.Generator) -> None:
    before = {module: ready.trainer.dequantized_weight(module) for module in ready.trainer.linear_modules()}
    for step in range(STEPS):
        ready.step(_window(seeded, ready.model.shape, run), LEARNING_RATE, dropout_key=step)
    for module, weight in before.items():
        assert np.array_equal(ready.trainer.dequantized_weight(module), weight), f"{module} changed"
    assert ready.adapter is not None
    after = ready.trainer.export_adapter().tensors
    still = [name for name, tensor in ready.adapter.tensors.items() if np.array_equal(tensor, after[name])]
    assert not still, f"{len(still)} tensors never changed: {still[:3]}"


def test_run_that_was_stopped_goes_on(
    opened: Opener, run: Combination, seeded: np.random.Generator, scratch: Path, judging: Judge
) -> None:
    """Through the files of a checkpoint: steps 4 to 6 are those of the run that never stopped."""
    given = _settings(run) if run.has_exact_moments else UpdateSettings(LEARNING_RATE)
    shape = _shape(opened, run)
    adapter, windows = _adapter(seeded, shape, run), [_window(seeded, shape, run) for _ in range(2 * STEPS)]
    through, stopped = _open(opened, run, adapter), _open(opened, run, adapter)
    _train(through, windows, given, 0)
    _train(stopped, windows[:STEPS], given, 0)
    state = TrainingState(STEPS, 0.5, 100, stopped.trainer.export_adapter(), stopped.trainer.export_optimizer())
    kept = load_checkpoint(save_checkpoint(scratch, state, keep=2))
    resumed = _open(opened, run, kept.adapter)
    resumed.trainer.import_optimizer(kept.optimizer)
    reference = DropoutOracle.at_state_of(resumed, STEPS)
    _train(resumed, windows[STEPS:], given, STEPS)
    found, expected = (each.trainer.export_adapter().tensors for each in (resumed, through))
    if opened.subject.declares(Feature.BITWISE_DETERMINISM):
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


def _judge_learning(opened: Opener, run: Combination, seeded: np.random.Generator, judging: Judge) -> None:
    """Moments of 8 bits have no number to compare: the loss falls about as far as with exact ones."""
    shape = _shape(opened, run)
    ready, window = _open(opened, run, _adapter(seeded, shape, run)), _window(seeded, shape, run)
    exact = DropoutOracle.at_state_of(ready, 3)
    before = exact.evaluate(window)[0]
    for _ in range(LEARNING_STEPS):
        ready.step(window, LEARNING_RATE, dropout_key=3)
        oracle_step(exact, window, LEARNING_RATE)
    found, expected = before - ready.trainer.evaluate(window).loss_sum, before - exact.evaluate(window)[0]
    judging.at_most("part of the exact fall that is missing", max(1.0 - found / expected, 0.0), learning_shortfall())


def _train(ready: Opened, windows: Sequence[Sequence[Batch]], given: UpdateSettings, first: int) -> None:
    for step, window in enumerate(windows, start=first):
        ready.step(
            window,
            given.learning_rate,
            dropout_key=step,
            weight_decay=given.weight_decay,
            max_grad_norm=given.max_grad_norm,
            beta1=given.beta1,
            beta2=given.beta2,
            epsilon=given.epsilon,
        )


def _trained(ready: Opened, window: Sequence[Batch], key: int) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return ready.trained_gradient(window, dropout_key=key)


def _settings(run: Combination) -> UpdateSettings:
    return UpdateSettings(run.learning_rate, run.weight_decay, run.max_grad_norm, run.beta1, run.beta2, run.epsilon)


# what the run has -----------------------------------------------------------------------------------------------------
def _shape(opened: Opener, run: Combination) -> LlamaShape:
    """A drawn shape of the run's family; a wider Llama for a high rank, in which every layer can carry it."""
    if run.family in RELATIVES:
        return read_shape(_config(opened, run))
    shape, _ = opened.models.drawn("main")
    if run.judged_rank <= NARROW_RANK:
        return shape
    width = max(128, -(-run.judged_rank // 128) * 128)
    head = 64
    return replace(
        shape,
        hidden_size=width,
        intermediate_size=2 * width,
        head_dim=head,
        num_attention_heads=2 * width // head,
        num_key_value_heads=width // head,
    )


def _model(opened: Opener, run: Combination, shape: LlamaShape) -> TinyModel:
    """As the run's checkpoint holds it: packed, or plain in its dtype."""
    models = opened.models
    if run.family in RELATIVES:
        name = run.family
        models.define(name, shape, draw_tensors(shape, stream(models.seed, f"model/{name}")), _config(opened, run))
        return _stored(opened, run, name)
    name = "main" if shape == models.drawn("main")[0] else "wide"
    if name == "wide":
        models.define(name, shape, draw_tensors(shape, stream(models.seed, "model/wide")))
    return _stored(opened, run, name)


def _config(opened: Opener, run: Combination) -> Config:
    """The config.json of a drawn relative of Llama."""
    return draw_config(RELATIVES[run.family], stream(opened.models.seed, f"config/{run.family}"))


def _stored(opened: Opener, run: Combination, name: str) -> TinyModel:
    if run.prequantized:
        return opened.models.quantized(name, Quantization(run.stored_as, run.block_size, run.double_quant))
    return opened.models.plain(name, stored_dtype=run.stored_dtype)


def _open(opened: Opener, run: Combination, adapter: Adapter) -> Opened:
    return opened(_model(opened, run, _shape(opened, run)), adapter=adapter, optimizer=run.optimizer)


def _adapter(seeded: np.random.Generator, shape: LlamaShape, run: Combination) -> Adapter:
    modules = [module for module in linear_shapes(shape) if module.rpartition(".")[2] in run.target_kinds]
    drawn = draw_adapter(
        seeded, shape, targets=modules or None, dropout=run.dropout, use_rslora=run.use_rslora, rank=run.judged_rank
    )
    # The run's own alpha; B shrinks or grows with it, so that the adapter's part stays a quarter of the base's.
    config = replace(drawn.config, alpha=run.judged_alpha)
    share = np.float32(drawn.config.scale / config.scale)
    tensors = {name: tensor * share if "lora_B" in name else tensor for name, tensor in drawn.tensors.items()}
    return Adapter(tensors, config)


def _window(
    seeded: np.random.Generator,
    shape: LlamaShape,
    run: Combination,
    *,
    tokens: int = TOKENS_TO_WORK_WITH,
    micro_batches: int | None = None,
    rows: int | None = None,
) -> list[Batch]:
    """A window as the run has them: its rows, its micro-batches, several samples in a row where it packs."""
    number = rows or min(run.batch_size, MOST_ROWS)
    longest = max(min(tokens, run.row_length), SHORTEST_ROW)
    drawn = []
    for _ in range(micro_batches or min(run.accumulation, MOST_MICRO_BATCHES)):
        if run.packing:
            drawn.append(_joined([_packed_row(seeded, shape, longest) for _ in range(number)]))
        else:
            lengths = [longest, *(int(length) for length in seeded.integers(longest // 3 + 2, longest + 1, number - 1))]
            drawn.append(draw_batch(seeded, shape, lengths=lengths))
    return placed(drawn)


def _packed_row(seeded: np.random.Generator, shape: LlamaShape, longest: int) -> Batch:
    """Three samples and a little padding."""
    parts = np.sort(seeded.choice(np.arange(1, longest // 4), size=2, replace=False)) * 4
    lengths = np.diff([0, *parts, longest - int(seeded.integers(0, 4))])
    return packed([draw_batch(seeded, shape, lengths=[int(length)]) for length in lengths], time=longest)


def _joined(rows: Sequence[Batch]) -> Batch:
    names = ("input_ids", "labels", "position_ids", "segment_ids")
    return Batch(**{name: np.concatenate([getattr(row, name) for row in rows]) for name in names})
