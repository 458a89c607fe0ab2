"""What a backend hands back is looked at: a trainer that is right in all but one thing, and is named for it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from qlora_hal.contract.backend import (
    Availability,
    BackendSpec,
    Compute,
    DeviceFacts,
    ProbeReport,
    Quantization,
    QuantizedLoRATrainer,
)
from qlora_hal.contract.capabilities import Capabilities, WeightFormat
from qlora_hal.contract.checked_trainer import CheckedTrainer
from qlora_hal.contract.values import (
    Adapter,
    AdapterConfig,
    Batch,
    Float32,
    LinearShape,
    LossSum,
    OptimizerSnapshot,
    StepSettings,
    StepStats,
)
from qlora_hal.errors import BackendContractError, BackendError
from qlora_hal.model.source import ModelSource

NAME = "base_model.model.layer.lora_A.weight"
ADAPTER = Adapter({NAME: np.ones((1, 2), np.float32)}, AdapterConfig(1, 2.0))
IDS = np.ones((2, 3), np.int32)
BATCH = Batch(IDS, IDS, IDS, IDS)  # four counted tokens
SETTINGS = StepSettings(1.0, 4)


@dataclass
class Done:
    stats: StepStats

    def resolve(self) -> StepStats:
        return self.stats


class Right(QuantizedLoRATrainer):
    """Keeps the contract; `answers` has what it says otherwise, by method, and whatever raises is raised."""

    spec = BackendSpec(
        "right",
        "a trainer that counts",
        1,
        Capabilities(frozenset({WeightFormat.NONE}), frozenset({"float32"}), frozenset()),
        lambda: ProbeReport("right", Availability.READY, "always"),
        "nowhere:Nothing",
        2,
    )

    def __init__(self, **answers: Any) -> None:
        self._answers = answers
        self._steps = 0

    def _said(self, method: str, usual: Any) -> Any:
        answer = self._answers.get(method, usual)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def proved_compute_dtypes(self) -> Sequence[str]:
        return self._said("proved_compute_dtypes", ("float32",))  # type: ignore[no-any-return]

    def load(self, source: ModelSource, quantization: Quantization, compute: Compute) -> None:
        self._said("load", None)

    def linear_modules(self) -> Mapping[str, LinearShape]:
        return {"layer": LinearShape(2, 1)}

    def attach(self, adapter: Adapter, optimizer: str = "adamw") -> None:
        self._steps = 0

    def device_facts(self) -> DeviceFacts:
        return self._said("device_facts", DeviceFacts("here", {"numpy": np.__version__}))  # type: ignore[no-any-return]

    def close(self) -> None:
        self._said("close", None)

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> Done:
        stats = self._said("resolve", StepStats(2.0, sum(b.counted_tokens for b in window), 0.5))
        self._steps += bool(getattr(stats, "applied", False))
        return Done(stats)

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        return self._said("evaluate", LossSum(1.0, sum(b.counted_tokens for b in batches)))  # type: ignore[no-any-return]

    def export_adapter(self) -> Adapter:
        return self._said("export_adapter", ADAPTER)  # type: ignore[no-any-return]

    def export_optimizer(self) -> OptimizerSnapshot:
        moments = {f"{NAME}.{kind}": np.zeros((1, 2), np.float32) for kind in ("exp_avg", "exp_avg_sq")}
        return OptimizerSnapshot(self._said("step", self._steps), moments)

    def import_optimizer(self, snapshot: OptimizerSnapshot) -> None:
        self._steps = snapshot.step

    def logits(self, batch: Batch) -> Float32:
        return np.zeros((*batch.input_ids.shape, 5), np.float32)

    def gradients(self, window: Sequence[Batch]) -> Mapping[str, Float32]:
        return {}

    def dequantized_weight(self, module: str) -> Float32:
        return np.zeros((1, 2), np.float32)


def attached(**answers: Any) -> CheckedTrainer:
    guarded = CheckedTrainer(Right(**answers))
    guarded.attach(ADAPTER, "adamw")
    return guarded


def said_of(guarded: CheckedTrainer, method: str, *arguments: object) -> str:
    """What is held against the backend."""
    with pytest.raises(BackendContractError) as broken:
        getattr(guarded, method)(*arguments)
    assert broken.value.code == "QH-B02"
    assert broken.value.message.startswith("Backend right broke the contract: ")
    return broken.value.message


def test_a_trainer_that_keeps_the_contract_passes() -> None:
    guarded = attached()
    assert guarded.proved_compute_dtypes() == ("float32",)
    assert guarded.device_facts().device == "here"
    assert guarded.train_step([BATCH], SETTINGS).resolve() == StepStats(2.0, 4, 0.5)
    assert guarded.evaluate([BATCH]).token_count == 4
    assert guarded.export_adapter() is ADAPTER
    assert guarded.export_optimizer().step == 1


@pytest.mark.fault("B04")
@pytest.mark.parametrize("leaving", [SystemExit(0), KeyError("x"), MemoryError("x")])
def test_a_backend_that_leaves_has_failed(leaving: BaseException) -> None:
    guarded = CheckedTrainer(Right(load=leaving))
    with pytest.raises(BackendError, match=rf"Backend right failed in load: {type(leaving).__name__}") as failure:
        guarded.load(None, None, None)  # type: ignore[arg-type]
    assert (failure.value.code, failure.value.exit_status) == ("QH-B04", 3)


@pytest.mark.fault("B04")
def test_a_library_that_leaves_because_of_a_package_is_told_with_its_name() -> None:
    def leave() -> SystemExit:
        try:
            import no_such_package  # type: ignore[import-not-found]  # noqa: F401
        except ImportError:
            try:
                raise SystemExit(1)
            except SystemExit as leaving:
                return leaving

    with pytest.raises(BackendError, match=r"SystemExit: 1 \(the package no_such_package is not installed\)"):
        CheckedTrainer(Right(load=leave())).load(None, None, None)  # type: ignore[arg-type]


@pytest.mark.fault("B02")
@pytest.mark.parametrize(
    ("stats", "said"),
    [
        (None, "resolve returned a NoneType, not StepStats"),
        (StepStats(np.float32(2), 4, 0.5), "loss_sum is a float32"),  # type: ignore[arg-type]
        (StepStats(2.0, 4, np.ones(())), "grad_norm is a ndarray"),  # type: ignore[arg-type]
        (StepStats(2.0, 4, 0.5, applied=1), "applied is a int"),  # type: ignore[arg-type]
        (StepStats(2.0, 3, 0.5), "resolve counted 3 tokens of 4"),
        (StepStats(2.0, 4, -0.5), "resolve returned the gradient norm -0.5"),
    ],
)
def test_the_figures_of_a_step_are_plain_numbers_of_this_window(stats: Any, said: str) -> None:
    assert said in said_of(attached(resolve=stats).train_step([BATCH], SETTINGS), "resolve")  # type: ignore[arg-type]


def test_a_step_is_held_against_the_window_as_it_was_queued() -> None:
    """The caller may use the arrays again before the figures are read."""
    window = [replace(BATCH, labels=BATCH.labels.copy())]
    stats = StepStats(2.0, 4, 0.5)
    pending = attached(resolve=stats).train_step(window, SETTINGS)
    window[0].labels[...] = -100
    assert pending.resolve() is stats


def test_figures_that_are_not_finite_are_figures() -> None:
    refused = StepStats(float("nan"), 4, float("inf"), applied=False)
    guarded = attached(resolve=refused)
    assert guarded.train_step([BATCH], SETTINGS).resolve() is refused
    assert guarded.export_optimizer().step == 0


@pytest.mark.fault("B02")
@pytest.mark.parametrize(
    ("method", "arguments", "answer", "said"),
    [
        ("evaluate", ([BATCH],), (1.0, 4), "evaluate returned a tuple, not LossSum"),
        ("evaluate", ([BATCH],), LossSum("1", 4), "loss_sum is a str ('1')"),  # type: ignore[arg-type]
        ("evaluate", ([BATCH],), LossSum(1.0, 5), "evaluate counted 5 tokens of 4"),
        ("device_facts", (), {"device": "x"}, "device_facts returned a dict, not DeviceFacts"),
        ("device_facts", (), DeviceFacts("x", {"a": 1}), "versions is a dict ({'a': 1})"),  # type: ignore[dict-item]
        ("proved_compute_dtypes", (), (), "proved_compute_dtypes returned (); it declares float32"),
        ("proved_compute_dtypes", (), ("float64",), "returned ('float64',); it declares float32"),
        ("proved_compute_dtypes", (), "float32", "returned 'float32'"),
        ("proved_compute_dtypes", (), None, "returned None"),
        ("export_adapter", (), {}, "export_adapter returned a dict, not Adapter"),
        ("export_adapter", (), replace(ADAPTER, config=AdapterConfig(1, 9.0)), "another alpha than was attached"),
        (
            "export_adapter",
            (),
            replace(ADAPTER, tensors={NAME: np.full((1, 2), np.nan, np.float32)}),
            f"not finite in {NAME}",
        ),
    ],
)
def test_what_a_method_gives_back_is_what_the_contract_says(
    method: str, arguments: tuple[object, ...], answer: object, said: str
) -> None:
    assert said in said_of(attached(**{method: answer}), method, *arguments)


@pytest.mark.fault("B02")
def test_the_optimizers_step_is_the_number_of_updates() -> None:
    assert "returned step 7 after 0 updates" in said_of(attached(step=7), "export_optimizer")
    assert "step is a str ('x'), int is expected" in said_of(attached(step="x"), "export_optimizer")


def test_updates_are_counted_on_from_an_imported_snapshot_and_anew_from_an_adapter() -> None:
    guarded = attached()
    guarded.import_optimizer(replace(guarded.export_optimizer(), step=40))
    guarded.train_step([BATCH], SETTINGS).resolve()
    assert guarded.export_optimizer().step == 41
    guarded.attach(ADAPTER, "adamw")
    assert guarded.export_optimizer().step == 0


@pytest.mark.parametrize("failure", [RuntimeError("no driver"), SystemExit(1)])
def test_a_failing_close_is_told_and_not_raised(failure: BaseException) -> None:
    notes: list[str] = []
    CheckedTrainer(Right(close=failure), notes.append).close()
    assert len(notes) == 1
    assert f"Backend right failed in close: {type(failure).__name__}: {failure}" in notes[0]


def test_a_failing_close_is_told_on_stderr_where_nobody_else_listens(capsys: pytest.CaptureFixture[str]) -> None:
    CheckedTrainer(Right(close=RuntimeError("no driver"))).close()
    shown = capsys.readouterr()
    assert shown.err.startswith("note: the device may not be free yet: ")
    assert shown.out == ""
    assert sys.exc_info() == (None, None, None)
