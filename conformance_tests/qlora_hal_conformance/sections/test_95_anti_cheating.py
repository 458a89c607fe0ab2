"""L4: answers come from the inputs. Whoever looks them up, or computes something else than it shows, fails here."""

from __future__ import annotations

import secrets
from pathlib import Path

import numpy as np

from qlora_hal.checkpoint import TrainingState, save_checkpoint
from qlora_hal.contract.values import IGNORE_LABEL, Adapter, Float32, Int32
from qlora_hal_conformance.assertions import Judge
from qlora_hal_conformance.comparing import judge_change, judge_gradients, judge_logits
from qlora_hal_conformance.fixtures import Opener, oracle_step
from qlora_hal_conformance.parameters import in_each_dtype
from qlora_hal_conformance.random_inputs import at_real_tokens, draw_adapter, draw_batch, draw_window, with_field
from qlora_hal_conformance.request import Request
from qlora_hal_conformance.resume_in_child import Continuation, continue_in_child
from qlora_hal_conformance.tolerances import UpdateSettings, logits_bound, loss_bound, update_bounds
from qlora_hal_conformance.unknown_model import write_unknown_model
from qlora_hal_conformance.updating import drawn_moments, judge_step, oracle_at_state_of
from qlora_hal_oracle.random_models import EMBEDDING, SHAPES, draw_tensors, linear_shapes

RATE = 1e-2


@in_each_dtype
def test_weights_on_disk_decide(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """One layer changed in the file, all else equal: the weights shown and the logits both follow."""
    shape, tensors = opened.models.drawn("main")
    module = sorted(linear_shapes(shape))[int(seeded.integers(len(linear_shapes(shape))))]
    changed = {**tensors, f"{module}.weight": np.ascontiguousarray(tensors[f"{module}.weight"][::-1])}
    opened.models.define("changed", shape, changed)
    adapter, batch = draw_adapter(seeded, shape), draw_batch(seeded, shape)
    before, after = opened(adapter=adapter), opened("changed", adapter=adapter)
    found = [at_real_tokens(ready.trainer.logits(batch), batch) for ready in (before, after)]
    reference = after.oracle()
    bound = logits_bound(reference, batch, after.dtype)
    judge_change("logits of the two models", found[0], found[1], reference, batch, after, judging)
    judging.within("logits", found[1], at_real_tokens(reference.logits(batch), batch), bound)
    same = np.array_equal(before.trainer.dequantized_weight(module), after.trainer.dequantized_weight(module))
    assert not same, f"{module} was changed on disk, and is shown unchanged"


@in_each_dtype
def test_embedding_on_disk_decides(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Weights that no view shows are read too."""
    shape, tensors = opened.models.drawn("main")
    opened.models.define("embedded", shape, {**tensors, EMBEDDING: np.ascontiguousarray(tensors[EMBEDDING][::-1])})
    ready, batch = opened("embedded", adapter=draw_adapter(seeded, shape)), draw_batch(seeded, shape)
    judge_logits(ready, ready.oracle(), batch, judging)


@in_each_dtype
def test_model_that_no_seed_gives(opened: Opener, scratch: Path, judging: Judge) -> None:
    """Model, adapter and tokens from the operating system's own randomness: nobody can know these answers."""
    random = np.random.default_rng(secrets.randbits(128))
    shape = SHAPES[int(random.integers(len(SHAPES)))]
    opened.models.define("unknown", shape, draw_tensors(shape, random))
    ready = opened("unknown", adapter=draw_adapter(random, shape))
    window = draw_window(random, shape)
    logits, gradients = ready.trainer.logits(window[0]), ready.trainer.gradients(window)
    reference = ready.oracle()
    bound = logits_bound(reference, window[0], ready.dtype)
    found, expected = (at_real_tokens(values, window[0]) for values in (logits, reference.logits(window[0])))
    judging.within("logits", found, expected, bound)
    judge_gradients(gradients, reference, window, ready, judging)
    judge_step(ready, oracle_at_state_of(ready), window, UpdateSettings(RATE), judging)


@in_each_dtype
def test_two_models_at_once(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Two trainers in one process, used by turns: nothing is shared."""
    readies = []
    for name in ("main", "second"):
        shape, _ = opened.models.drawn(name)
        readies.append(opened(name, adapter=draw_adapter(seeded, shape)))
    for _ in range(2):
        for ready in readies:
            window = draw_window(seeded, ready.model.shape)
            judge_step(ready, oracle_at_state_of(ready), window, UpdateSettings(RATE), judging)


@in_each_dtype
def test_views_and_training_agree(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """The loss that a step reports is the loss of the logits that are shown, and the one that is evaluated."""
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    shown = sum(_loss_of(ready.trainer.logits(batch), batch.labels) for batch in window)
    evaluated = ready.trainer.evaluate(window).loss_sum
    bound = loss_bound(ready.oracle(), window, ready.dtype).times(2, "two results")
    trained = ready.step(window, RATE).loss_sum
    judging.within("loss of the logits, evaluated", np.array(shown), np.array(evaluated), bound)
    judging.within("loss of the logits, trained", np.array(shown), np.array(trained), bound)


def _loss_of(logits: Float32, labels: Int32) -> float:
    """Sum of the token losses of shown logits, in float64."""
    shown, targets = logits[:, :-1].astype(np.float64), labels[:, 1:]
    rows, times = np.nonzero(targets != IGNORE_LABEL)
    chosen = shown[rows, times]
    largest = chosen.max(axis=-1)
    log_sum = largest + np.log(np.exp(chosen - largest[:, None]).sum(axis=-1))
    return float((log_sum - chosen[np.arange(len(rows)), targets[rows, times]]).sum())


@in_each_dtype
def test_tokens_decide(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """One token changed: everything from there on follows, nothing before it does."""
    shape, _ = opened.models.drawn("main")
    ready, batch = opened(adapter=draw_adapter(seeded, shape)), draw_batch(seeded, shape, lengths=(20,))
    place = int(seeded.integers(5, 15))
    input_ids = batch.input_ids.copy()
    input_ids[0, place] = (input_ids[0, place] + 7) % shape.vocab_size
    one, other = (ready.trainer.logits(b)[0] for b in (batch, with_field(batch, input_ids=input_ids)))
    bound = logits_bound(ready.oracle(), batch, ready.dtype).times(2, "two results")
    judging.within("logits before the token", other[:place], one[:place], bound)
    judge_change("logits from the token on", other[place:], one[place:], ready.oracle(), batch, ready, judging)


@in_each_dtype
def test_labels_decide(opened: Opener, seeded: np.random.Generator, judging: Judge) -> None:
    """Other labels on the same tokens give another loss and other gradients: the labels are read, not the tokens."""
    shape, _ = opened.models.drawn("main")
    ready, batch = opened(adapter=draw_adapter(seeded, shape)), draw_batch(seeded, shape)
    labels = np.where(batch.labels == IGNORE_LABEL, IGNORE_LABEL, (batch.labels + 5) % shape.vocab_size)
    window = [with_field(batch, labels=labels.astype(np.int32))]
    judge_gradients(ready.trainer.gradients(window), ready.oracle(), window, ready, judging)


def test_same_answers_in_a_process_without_a_test(
    opened: Opener, judging: Judge, scratch: Path, run_request: Request
) -> None:
    """A user's script in a user's folder, on a model with a tokenizer that nobody knows: no case, no pytest, no word of
    a suite in sight. It trains one step from given moments; adapter, moments and logits are the oracle's."""
    random = np.random.default_rng(secrets.randbits(128))
    ready = opened(write_unknown_model(opened, scratch / "model", random))
    shape = ready.model.shape
    adapter, window = draw_adapter(random, shape), draw_window(random, shape)
    ready.attach(adapter)
    ready.trainer.import_optimizer(drawn_moments(ready, window, int(random.integers(2, 40)), random))
    reference, snapshot = oracle_at_state_of(ready), ready.trainer.export_optimizer()
    (scratch / "run").mkdir()
    state = TrainingState(snapshot.step, 0.0, 0, adapter, snapshot)
    checkpoint = save_checkpoint(scratch / "run", state, keep=2)
    given = UpdateSettings(RATE, weight_decay=0.1)
    work = Continuation(
        run_request.reference, ready.model.folder, ready.quantization, ready.dtype, checkpoint, RATE, 0.1
    )
    after, logits = continue_in_child(work, [window])
    bounds = update_bounds(reference, window, ready.dtype, given)
    oracle_step(reference, window, RATE, weight_decay=given.weight_decay)
    step, moments = reference.export_optimizer()
    judging.all_within("adapter after the step", after.adapter.tensors, reference.export_adapter(), bounds.parameters)
    judging.all_within("moments after the step", after.optimizer.moments, moments, bounds.moments)
    assert after.optimizer.step == step, f"the optimizer says step {after.optimizer.step} after {step}"
    trained = ready.oracle(Adapter(after.adapter.tensors, adapter.config))
    found, expected = (at_real_tokens(values, window[0]) for values in (logits, trained.logits(window[0])))
    judging.within("logits", found, expected, logits_bound(trained, window[0], ready.dtype))


def test_model_with_all_files_of_a_users(opened: Opener, judging: Judge, scratch: Path) -> None:
    """Here, too: shape, weights, tokenizer and settings that no list of shapes or hashes can hold."""
    random = np.random.default_rng(secrets.randbits(128))
    ready = opened(write_unknown_model(opened, scratch / "model", random))
    ready.attach(draw_adapter(random, ready.model.shape))
    window = draw_window(random, ready.model.shape)
    judge_logits(ready, ready.oracle(), window[0], judging)
    judge_step(ready, oracle_at_state_of(ready), window, UpdateSettings(RATE), judging)
