"""20 + 20 steps on two backends against 40 uninterrupted ones: `none` in float32, where only rounding is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qlora_hal.contract.backend import Compute, Quantization, QuantizedLoRATrainer
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.values import Adapter, Batch, OptimizerSnapshot, StepSettings
from qlora_hal.detect.discovery import find, listed, load_spec, open_trainer
from qlora_hal.model.source import ModelSource
from qlora_hal_conformance.fixtures import Models, oracle_step
from qlora_hal_conformance.random_inputs import draw_adapter, draw_window, stream, total_tokens, with_zero
from qlora_hal_conformance.tolerances import LOSS_CURVE_RUNS, loss_curve_bound
from qlora_hal_oracle import UNIT_ROUNDOFF, LoraScale, OracleTrainer, loss_curve_envelope
from qlora_hal_oracle.arithmetic import Arithmetic

pytestmark = pytest.mark.slow

STEPS, WINDOWS, PEAK_RATE = 40, 4, 5e-3

LEGS = {
    "cpu alone": ["cpu_torch"],
    "mlx alone": ["mlx_lora"],
    "cpu to mlx": ["cpu_torch", "mlx_lora"],
    "mlx to cpu": ["mlx_lora", "cpu_torch"],
    "there and back": ["cpu_torch", "mlx_lora", "cpu_torch", "mlx_lora"],
}


def rate(step: int) -> float:
    return PEAK_RATE * min((step + 1) / 4, 1.0 - step / (STEPS + 4))


@dataclass(frozen=True)
class Course:
    """One run's start and windows, and where its losses must lie."""

    models: Models
    adapter: Adapter
    windows: Sequence[Sequence[Batch]]
    exact: npt.NDArray[np.float64]
    allowed: Any


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    """The bound is the suite's own for a run on one backend (section 42): exact arithmetic, and how far runs part whose
    every operation is rounded otherwise."""
    random = stream(20, "hand over")
    models = Models(tmp_path_factory.mktemp("models"), seed=20)
    shape, base = models.drawn("main")
    adapter = with_zero(draw_adapter(random, shape, rank=4), "B")
    windows = [draw_window(random, shape) for _ in range(WINDOWS)]

    def trained(arithmetic: Arithmetic) -> list[float]:
        config = adapter.config
        scale = LoraScale(config.alpha, config.r, config.use_rslora)
        oracle = OracleTrainer(shape, base, adapter.tensors, scale, arithmetic)
        steps = (oracle_step(oracle, windows[n % WINDOWS], rate(n), weight_decay=0.01) for n in range(STEPS))
        return [step.loss_sum / step.token_count for step in steps]

    envelope = loss_curve_envelope(trained, unit_roundoff=UNIT_ROUNDOFF["float32"], runs=LOSS_CURVE_RUNS)
    allowed = loss_curve_bound(envelope, max(total_tokens(window) for window in windows))
    return Course(models, adapter, windows, envelope.exact, allowed.value)


@pytest.mark.parametrize(
    "legs",
    [
        pytest.param(legs, id=name, marks=[] if name == "cpu to mlx" else pytest.mark.long)
        for name, legs in LEGS.items()
    ],
)
def test_every_step_lies_where_rounding_alone_can_take_it(legs: Sequence[str], course: Course) -> None:
    """A moment lost, a step counted twice or a transposed adapter leaves the bound."""
    found = losses_of(legs, course.models, course.adapter, course.windows)
    apart = np.abs(np.array(found) - course.exact)
    assert np.all(apart <= course.allowed), f"largest part of the bound {np.max(apart / course.allowed):.3g}"


def losses_of(legs: Sequence[str], models: Models, adapter: Adapter, windows: Sequence[Sequence[Batch]]) -> list[float]:
    """The loss of each step of a run that goes through `legs`, an equal share of steps on each."""
    losses: list[float] = []
    snapshot: OptimizerSnapshot | None = None
    share = STEPS // len(legs)
    for leg in legs:
        with opened(leg, models) as trainer:
            trainer.attach(adapter)
            if snapshot is not None:
                trainer.import_optimizer(snapshot)
            for step in range(len(losses), len(losses) + share):
                window = windows[step % WINDOWS]
                settings = StepSettings(rate(step), total_tokens(window), weight_decay=0.01)
                losses.append(trainer.train_step(window, settings).resolve().loss)
            adapter, snapshot = trainer.export_adapter(), trainer.export_optimizer()
    return losses


def opened(name: str, models: Models) -> QuantizedLoRATrainer:
    trainer = open_trainer(load_spec(find(name, listed())))
    trainer.load(
        ModelSource.in_folder(models.plain("main").folder), Quantization(WeightFormat.NONE), Compute("float32")
    )
    return trainer


def test_moments_left_behind_would_show(course: Course) -> None:
    """The same run with a fresh optimizer after half its steps leaves the bound: the bound can fail."""
    models, adapter, windows = course.models, course.adapter, course.windows
    whole = losses_of(["cpu_torch"], models, adapter, windows)
    with opened("cpu_torch", models) as trainer:
        trainer.attach(adapter)
        losses = []
        for step in range(STEPS):
            if step == STEPS // 2:
                trainer.attach(trainer.export_adapter())
            window = windows[step % WINDOWS]
            settings = StepSettings(rate(step), total_tokens(window), weight_decay=0.01)
            losses.append(trainer.train_step(window, settings).resolve().loss)
    # Float32 rounding moves a loss of a few nats by about 1e-6; a bias correction that begins anew moves it visibly.
    assert max(abs(a - b) for a, b in zip(losses, whole, strict=True)) > 1e-3
