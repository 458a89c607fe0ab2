"""L0: the trainer's methods: signatures, the values they give, their order, and closing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from qlora_hal.contract.backend import DeviceFacts, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.values import Adapter, Batch, LossSum, StepSettings, StepStats
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.comparing import must_refuse
from qlora_hal_conformance.fixtures import Opener
from qlora_hal_conformance.random_inputs import draw_adapter, draw_batch, draw_window, total_tokens, with_field
from qlora_hal_oracle.random_models import linear_shapes

METHODS = sorted(
    name for name, member in vars(QuantizedLoRATrainer).items() if callable(member) and not name.startswith("_")
)


@pytest.mark.parametrize("method", METHODS)
def test_signature(method: str, opened: Opener) -> None:
    """The method takes what the contract passes: the same names, kinds and defaults; more only with a default."""
    expected = inspect.signature(getattr(QuantizedLoRATrainer, method)).parameters
    found = inspect.signature(getattr(type(opened.trainer()), method)).parameters
    for name, parameter in expected.items():
        assert name in found, f"{method} lacks the parameter {name}"
        same = (found[name].kind, found[name].default) == (parameter.kind, parameter.default)
        assert same, f"{method}: {found[name]} where the contract has {parameter}"
    extra = [p for n, p in found.items() if n not in expected and p.default is p.empty and p.kind.name[:4] != "VAR_"]
    assert not extra, f"{method} asks for more than the contract passes: {extra}"


def test_trainer_carries_its_spec(opened: Opener) -> None:
    assert opened.trainer().spec.name == opened.subject.spec.name


def test_linear_modules_are_those_of_the_model(opened: Opener) -> None:
    """Every linear layer with its shape, the output head left out."""
    ready = opened()
    assert dict(ready.trainer.linear_modules()) == linear_shapes(ready.model.shape)


def test_dequantized_weights_are_float32_arrays(opened: Opener) -> None:
    ready = opened()
    for module, linear in linear_shapes(ready.model.shape).items():
        _check_array(ready.trainer.dequantized_weight(module), linear.weight, f"dequantized_weight({module})")


def test_logits_are_a_float32_array(opened: Opener, seeded: np.random.Generator) -> None:
    shape, _ = opened.models.drawn("main")
    batch = draw_batch(seeded, shape)
    logits = opened(adapter=draw_adapter(seeded, shape)).trainer.logits(batch)
    _check_array(logits, (*batch.input_ids.shape, shape.vocab_size), "logits")


def test_gradients_have_the_adapter_names_and_shapes(opened: Opener, seeded: np.random.Generator) -> None:
    shape, _ = opened.models.drawn("main")
    adapter = draw_adapter(seeded, shape)
    _check_named(opened(adapter=adapter).trainer.gradients(draw_window(seeded, shape)), adapter, "gradients")


def test_exported_adapter_has_its_names_shapes_and_settings(opened: Opener, seeded: np.random.Generator) -> None:
    shape, _ = opened.models.drawn("main")
    adapter = draw_adapter(seeded, shape)
    exported = opened(adapter=adapter).trainer.export_adapter()
    assert isinstance(exported, Adapter)
    _check_named(exported.tensors, adapter, "export_adapter")
    assert exported.config == adapter.config, "the adapter's settings changed"


def test_exported_optimizer_has_both_moments_of_every_tensor(opened: Opener, seeded: np.random.Generator) -> None:
    """Before the first step too: zeros, at step 0."""
    shape, _ = opened.models.drawn("main")
    adapter = draw_adapter(seeded, shape)
    ready = opened(adapter=adapter)
    kinds = ("exp_avg", "exp_avg_sq")
    expected = {f"{name}.{kind}": tensor.shape for name, tensor in adapter.tensors.items() for kind in kinds}
    for steps in (0, 1):
        snapshot = ready.trainer.export_optimizer()
        assert snapshot.step == steps, f"step {snapshot.step} after {steps} steps"
        assert snapshot.moments.keys() == expected.keys(), "other names than <tensor>.exp_avg and .exp_avg_sq"
        for name, sides in expected.items():
            _check_array(snapshot.moments[name], sides, name)
            assert steps or not snapshot.moments[name].any(), f"{name} is not zero before the first step"
        ready.step(draw_window(seeded, shape), 1e-3)


def test_step_is_pending_and_resolves_to_stats(opened: Opener, seeded: np.random.Generator) -> None:
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    pending = ready.trainer.train_step(window, StepSettings(1e-3, total_tokens(window)))
    stats = pending.resolve()
    assert isinstance(stats, StepStats), f"resolve gave a {type(stats).__name__}"
    assert (type(stats.loss_sum), type(stats.grad_norm), type(stats.applied)) == (float, float, bool), f"{stats}"
    assert stats.applied, "an ordinary step was not applied"
    assert stats.token_count == total_tokens(window), f"{stats.token_count} tokens of {total_tokens(window)}"


def test_two_steps_may_be_queued_before_the_first_is_resolved(opened: Opener, seeded: np.random.Generator) -> None:
    """The core resolves one step late; the figures must still be those of their own step."""
    shape, _ = opened.models.drawn("main")
    adapter, windows = draw_adapter(seeded, shape), [draw_window(seeded, shape) for _ in range(2)]
    queued, waited = opened(adapter=adapter), opened(adapter=adapter)
    pending = [queued.trainer.train_step(w, StepSettings(1e-3, total_tokens(w))) for w in windows]
    late = [step.resolve() for step in pending]
    prompt = [waited.step(window, 1e-3) for window in windows]
    assert [s.token_count for s in late] == [s.token_count for s in prompt]
    for early, after in zip(prompt, late, strict=True):
        assert np.isclose(early.loss_sum, after.loss_sum), f"{after.loss_sum} late, {early.loss_sum} at once"


def test_evaluation_gives_a_sum_and_a_count(opened: Opener, seeded: np.random.Generator) -> None:
    shape, _ = opened.models.drawn("main")
    window = draw_window(seeded, shape)
    result = opened(adapter=draw_adapter(seeded, shape)).trainer.evaluate(window)
    assert isinstance(result, LossSum)
    assert (type(result.loss_sum), type(result.token_count)) == (float, int), f"{result}"
    assert result.token_count == total_tokens(window)


def test_device_facts_are_complete(opened: Opener) -> None:
    """What a certificate says of the device: its name, the versions, and which kernels multiply."""
    facts = opened().trainer.device_facts()
    assert isinstance(facts, DeviceFacts)
    assert facts.device.strip(), "the device has no name"
    assert facts.kernel_path.strip(), "kernel_path does not say what multiplies"
    assert facts.versions, "no versions"
    assert all(isinstance(v, str) for pair in facts.versions.items() for v in pair), "versions are no strings"


def test_what_is_handed_out_is_a_copy(opened: Opener, seeded: np.random.Generator) -> None:
    """Writing into exported arrays, or into the adapter that was attached, changes nothing in the trainer."""
    shape, _ = opened.models.drawn("main")
    adapter = draw_adapter(seeded, shape)
    given = Adapter({name: tensor.copy() for name, tensor in adapter.tensors.items()}, adapter.config)
    ready = opened(adapter=given)
    for tensors in (given.tensors, ready.trainer.export_adapter().tensors, ready.trainer.export_optimizer().moments):
        for tensor in tensors.values():
            if tensor.flags.writeable:
                tensor[:] = 7
    exported = ready.trainer.export_adapter().tensors
    assert all(np.array_equal(exported[name], adapter.tensors[name]) for name in exported), "the adapter was shared"
    moments = ready.trainer.export_optimizer().moments
    assert not any(moment.any() for moment in moments.values()), "the moments were shared"


def test_nothing_is_printed_on_stdout(
    opened: Opener, seeded: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    """Standard output belongs to the command line: one stray line breaks `--json`."""
    shape, _ = opened.models.drawn("main")
    capfd.readouterr()
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    ready.step(window, 1e-3)
    ready.trainer.evaluate(window)
    ready.trainer.export_adapter()
    opened.close()
    printed = capfd.readouterr().out.strip().splitlines()
    assert not printed, f"{len(printed)} lines, the first is {printed[0][:80]!r}"


def test_batches_are_left_alone(opened: Opener, seeded: np.random.Generator) -> None:
    shape, _ = opened.models.drawn("main")
    ready, window = opened(adapter=draw_adapter(seeded, shape)), draw_window(seeded, shape)
    before = [with_field(batch) for batch in window]
    ready.trainer.logits(window[0])
    ready.trainer.gradients(window)
    ready.trainer.evaluate(window)
    ready.step(window, 1e-3)
    for batch, kept in zip(window, before, strict=True):
        for name in ("input_ids", "labels", "position_ids", "segment_ids"):
            assert np.array_equal(getattr(batch, name), getattr(kept, name)), f"{name} was written to"


def test_use_before_load_raises_our_error(opened: Opener, seeded: np.random.Generator) -> None:
    shape, _ = opened.models.drawn("main")
    _check_refuses(opened.trainer(), draw_adapter(seeded, shape), draw_batch(seeded, shape), loaded=False)


def test_training_before_attach_raises_our_error(opened: Opener, seeded: np.random.Generator) -> None:
    shape, _ = opened.models.drawn("main")
    _check_refuses(opened().trainer, draw_adapter(seeded, shape), draw_batch(seeded, shape), loaded=True)


def test_closing_twice_is_safe_and_use_after_it_raises_our_error(opened: Opener, seeded: np.random.Generator) -> None:
    shape, _ = opened.models.drawn("main")
    adapter, batch = draw_adapter(seeded, shape), draw_batch(seeded, shape)
    trainer = opened(adapter=adapter).trainer
    trainer.close()
    trainer.close()
    _check_refuses(trainer, adapter, batch, loaded=False)


def test_trainer_is_a_context_manager(opened: Opener) -> None:
    trainer = opened().trainer
    with trainer as entered:
        assert entered is trainer
    must_refuse(trainer.linear_modules, "linear_modules after the with block")


def test_second_load_replaces_the_first(opened: Opener, seeded: np.random.Generator) -> None:
    """A trainer can be given another model; nothing of the first remains."""
    shape, _ = opened.models.drawn("second")
    ready = opened("main")
    other = opened("second", adapter=draw_adapter(seeded, shape))
    from qlora_hal.contract.backend import Compute

    ready.trainer.load(ModelSource.in_folder(other.model.folder), other.quantization, Compute(other.dtype))  # type: ignore[arg-type]
    for module in linear_shapes(shape):
        found, expected = (trainer.dequantized_weight(module) for trainer in (ready.trainer, other.trainer))
        assert np.array_equal(found, expected), f"{module} is not that of the second model"


@pytest.mark.needs(Feature.GENERATE)
def test_generated_tokens_are_int32(opened: Opener, seeded: np.random.Generator) -> None:
    shape, _ = opened.models.drawn("main")
    prompt = draw_batch(seeded, shape, lengths=(6,)).input_ids[0]
    tokens = opened(adapter=draw_adapter(seeded, shape)).trainer.generate(prompt, max_new_tokens=3)
    _check_array(tokens, (3,), "generate", np.int32)


@pytest.mark.needs(Feature.PEAK_MEMORY)
def test_peak_memory_is_a_whole_number(opened: Opener) -> None:
    peak = opened().trainer.peak_memory_bytes()
    assert type(peak) is int, f"{peak!r}"
    assert peak > 0, f"{peak}"


def _check_refuses(trainer: QuantizedLoRATrainer, adapter: Adapter, batch: Batch, *, loaded: bool) -> None:
    settings = StepSettings(1e-3, batch.counted_tokens)
    calls: Sequence[tuple[str, Callable[[], object]]] = [
        ("train_step", lambda: trainer.train_step([batch], settings).resolve()),
        ("gradients", lambda: trainer.gradients([batch])),
        ("export_adapter", trainer.export_adapter),
        ("export_optimizer", trainer.export_optimizer),
    ]
    if not loaded:
        calls = [
            *calls,
            ("attach", lambda: trainer.attach(adapter)),
            ("logits", lambda: trainer.logits(batch)),
            ("evaluate", lambda: trainer.evaluate([batch])),
            ("linear_modules", trainer.linear_modules),
            ("dequantized_weight", lambda: trainer.dequantized_weight(adapter.config.target_modules[0])),
        ]
    for name, call in calls:
        must_refuse(call, name)


def _check_named(found: object, adapter: Adapter, what: str) -> None:
    assert isinstance(found, Mapping), f"{what} gave a {type(found).__name__}"
    assert found.keys() == adapter.tensors.keys(), f"{what}: other names than the adapter's"
    for name, tensor in adapter.tensors.items():
        _check_array(found[name], tensor.shape, f"{what}, {name}")


def _check_array(found: object, shape: tuple[int, ...], what: str, dtype: type = np.float32) -> None:
    assert isinstance(found, np.ndarray), f"{what} is a {type(found).__name__}, not a numpy array"
    assert found.dtype == dtype, f"{what} is {found.dtype}"
    assert found.shape == shape, f"{what} has shape {found.shape}, not {shape}"
    assert dtype is not np.float32 or np.isfinite(found).all(), f"{what} is not finite"
