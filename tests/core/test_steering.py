"""What observers ask of the loop takes hold at a step that does not depend on when the run was saved or resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from qlora_hal.config.schema import TrainingConfig
from qlora_hal.contract.values import Adapter, AdapterConfig, Batch, LossSum, StepSettings, StepStats
from qlora_hal.hooks import Control, Hooks, hookimpl
from qlora_hal.run.loop import FinishedStep, LoopPlan, Progress, run
from qlora_hal.run.lr_schedule import Schedule

Answers = Callable[[int], Control | None]
STEPS = 8


def silent(step: int) -> Control | None:
    return None


class Windows:
    def window(self, step: int) -> list[Batch]:
        ids = np.ones((1, 3), np.int32)
        return [Batch(ids, ids, ids, ids)]

    def token_count(self, step: int) -> int:
        return 2

    def real_tokens(self, step: int) -> int:
        return 3

    def rows_of(self, step: int) -> list[int]:
        return [step]

    def epoch_of(self, step: int) -> float:
        return step / 10


@dataclass
class Trainer:
    rates: list[float] = field(default_factory=list)

    def train_step(self, window: Sequence[Batch], settings: StepSettings) -> Pending:
        self.rates.append(settings.learning_rate)
        return Pending()

    def export_adapter(self) -> Adapter:
        return Adapter({}, AdapterConfig(1, 1.0))


class Pending:
    def resolve(self) -> StepStats:
        return StepStats(2.0, 2, 1.0)


@dataclass
class Events:
    """Answers each step, and each evaluation, as an observer does; keeps the progress of every save as JSON."""

    to_step: Answers = silent
    to_evaluation: Answers = silent
    log: list[str] = field(default_factory=list)
    saved: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def step(self, finished: FinishedStep) -> Control | None:
        return self.to_step(finished.step)

    def evaluated(self, step: int, evaluation: LossSum, label: str) -> Control | None:
        self.log.append(f"evaluated {step}")
        return self.to_evaluation(step)

    def save(self, step: int, progress: Progress) -> None:
        self.log.append(f"saved {step}")
        self.saved[step] = json.dumps(progress.as_json())

    def best(self, step: int, adapter: Adapter) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


def carried_out(events: Events, progress: Progress | None = None, **plan: object) -> tuple[str, list[float]]:
    trainer = Trainer()
    training = TrainingConfig(eval_steps=plan.pop("eval_steps", None))  # type: ignore[arg-type]
    made = LoopPlan(
        total_steps=STEPS,
        seed=1,
        schedule=Schedule("constant", 0.5, 0, STEPS),
        training=training,
        save_steps=plan.pop("save_steps", None),  # type: ignore[arg-type]
        evaluation=plan.pop("evaluation", lambda: LossSum(1.0, 1)),  # type: ignore[arg-type]
        **plan,  # type: ignore[arg-type]
    )
    return run(trainer, Windows(), made, progress or Progress(), events), trainer.rates  # type: ignore[arg-type]


def halving(*steps: int) -> Answers:
    return lambda step: Control(learning_rate_factor=0.5) if step in steps else None


def test_a_factor_begins_with_the_second_step_after_the_one_that_was_answered() -> None:
    _, rates = carried_out(Events(halving(2)))
    assert rates == [0.5] * 3 + [0.25] * 5


def test_factors_add_up_as_products_and_begin_one_by_one() -> None:
    _, rates = carried_out(Events(halving(1, 2, 3)))
    assert rates == [0.5, 0.5, 0.25, 0.125] + [0.0625] * 4


@pytest.mark.parametrize("save_steps", [1, 3])
def test_saves_change_no_rate(save_steps: int) -> None:
    _, rates = carried_out(Events(halving(1, 2, 5)))
    assert carried_out(Events(halving(1, 2, 5)), save_steps=save_steps)[1] == rates


@pytest.mark.parametrize("saved", range(1, STEPS))
def test_a_run_resumed_after_any_step_goes_on_with_the_same_rates(saved: int) -> None:
    answers = halving(1, 2, 3, 6)
    events = Events(answers)
    _, rates = carried_out(events, save_steps=1)
    resumed = Progress.from_json(json.loads(events.saved[saved]))
    assert carried_out(Events(answers), resumed)[1] == rates[saved:]


def test_a_rate_holds_when_the_observer_is_not_given_again() -> None:
    events = Events(halving(2))
    carried_out(events, save_steps=1)
    assert carried_out(Events(), Progress.from_json(json.loads(events.saved[2])))[1] == [0.5] + [0.25] * 5


def test_an_answer_to_an_evaluation_holds_for_the_next_step() -> None:
    _, rates = carried_out(Events(to_evaluation=halving(4)), eval_steps=4)
    assert rates == [0.5] * 4 + [0.25] * 4


def test_a_rate_above_one_is_told_and_not_taken() -> None:
    events = Events(lambda step: Control(learning_rate_factor=1e3) if step == 1 else None)
    _, rates = carried_out(events)
    assert rates == [0.5] * STEPS
    assert events.notes == ["an observer asked for a peak learning rate of 500; up to 1 is expected, and none changes"]


def test_a_stop_ends_the_run_after_the_step_that_was_under_way() -> None:
    events = Events(lambda step: Control(stop=True) if step >= 3 else None)
    ended, rates = carried_out(events)
    assert (ended, len(rates), events.log) == ("observer", 4, ["saved 4"])


@pytest.mark.parametrize("killed_at", [3, 4])
def test_a_run_that_an_observer_ended_takes_no_further_step(killed_at: int) -> None:
    events = Events(lambda step: Control(stop=True) if step >= 3 else None)
    carried_out(events, save_steps=1)
    resumed = Progress.from_json(json.loads(events.saved[killed_at]))
    ended, rates = carried_out(Events(), resumed)
    assert (ended, len(rates)) == ("observer", 4 - killed_at)


def test_a_stop_at_an_evaluation_is_at_once() -> None:
    events = Events(to_evaluation=lambda step: Control(stop=step == 4))
    ended, rates = carried_out(events, eval_steps=2)
    assert (ended, len(rates), events.log) == ("observer", 4, ["evaluated 2", "evaluated 4", "saved 4"])


def test_saves_and_evaluations_that_were_asked_for_happen_once_also_after_a_resume() -> None:
    asked = {2: Control(save=True), 4: Control(evaluate=True)}
    events = Events(asked.get)
    carried_out(events, save_steps=4)
    assert events.log == ["saved 3", "saved 4", "evaluated 5", "saved 8"]
    again = Events(asked.get)
    carried_out(again, Progress.from_json(json.loads(events.saved[4])), save_steps=4)
    assert again.log == ["evaluated 5", "saved 8"]


def test_an_evaluation_without_rows_is_told() -> None:
    events = Events({2: Control(evaluate=True)}.get)
    carried_out(events, evaluation=None)
    assert events.notes == ["step 3: an observer asked for an evaluation, and there are no validation rows"]


class Asks:
    def __init__(self, control: object) -> None:
        self._control = control

    @hookimpl
    def qlora_hal_control(self, step: int) -> object:
        return self._control


FACTS = {"run": None, "step": 1, "stats": None, "evaluation": None, "metrics": {}}


def test_what_several_observers_ask_is_heeded_together() -> None:
    asked = [Control(stop=True, learning_rate_factor=0.5), Control(save=True, learning_rate_factor=0.5), None]
    assert Hooks(map(Asks, asked)).control(**FACTS) == Control(stop=True, save=True, learning_rate_factor=0.25)


def test_an_answer_of_another_kind_is_told_of_once() -> None:
    notes: list[str] = []
    hooks = Hooks([Asks("stop")], note=notes.append)
    assert [hooks.control(**FACTS), hooks.control(**FACTS)] == [None, None]
    (note,) = notes
    assert "observer 1 (Asks) failed in qlora_hal_control and is disabled" in note
    assert "it gave a value of type str, not Control" in note


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_that_is_no_rate_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="a finite number above 0"):
        Control(learning_rate_factor=factor)


def test_factors_of_other_libraries_are_saved_as_pythons_numbers() -> None:
    import torch

    for half in (np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        events = Events(lambda step, half=half: Control(save=np.bool_(step == 2), learning_rate_factor=half))  # type: ignore[misc]
        _, rates = carried_out(events, save_steps=1)
        assert all(type(rate) is float for rate in rates)
        assert rates[-1] == 0.5**STEPS * 2


def test_factors_that_are_none_together_change_nothing_and_stop_no_run() -> None:
    class Asks:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        @hookimpl
        def qlora_hal_control(self) -> Control:
            return Control(save=True, learning_rate_factor=self.factor)

    facts = {"run": None, "step": 1, "stats": None, "evaluation": None, "metrics": {}}
    for factor, told in ((1e200, "inf"), (1e-200, "0")):
        notes: list[str] = []
        hooks = Hooks([Asks(factor), Asks(factor)], note=notes.append)
        assert hooks.control(**facts) == Control(save=True)
        assert notes == [f"observers asked for rates that are {told} times as high together; none changes"]


def test_a_wish_at_an_evaluation_takes_no_wish_of_a_step_away() -> None:
    def always(step: int) -> Control:
        return Control(save=True, evaluate=True)

    events = Events(to_step=always, to_evaluation=always)
    carried_out(events)
    # The answer to step 1 is due after step 2; every later step and evaluation asks again.
    assert [entry for entry in events.log if entry.startswith("evaluated")] == [
        f"evaluated {n}" for n in range(2, STEPS)
    ]
    assert sorted(events.saved) == list(range(2, STEPS + 1))
    resumed = Events(to_step=always, to_evaluation=always)
    carried_out(resumed, Progress.from_json(json.loads(events.saved[3])))
    assert sorted(resumed.saved) == list(range(4, STEPS + 1))
