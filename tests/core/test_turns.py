"""What libraries change for the whole process is changed by one thread at a time, and put back."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from trainers import source_of

from qlora_hal.contract.backend import Compute, Quantization
from qlora_hal.contract.capabilities import WeightFormat
from qlora_hal.contract.checked_trainer import CheckedTrainer
from qlora_hal.contract.values import Adapter, AdapterConfig, Int32, LossSum
from qlora_hal.demo import model_path
from qlora_hal.detect import discovery
from qlora_hal.processes.turns import alone_in_process
from qlora_hal_conformance.reference_backend import SPEC
from qlora_hal_conformance.reference_backend.trainer import ReferenceTrainer

LONG_ENOUGH = 0.3


class Meeting:
    """Two threads inside at once see each other; one alone goes on after a moment."""

    def __init__(self) -> None:
        self.met = False
        self._both = threading.Barrier(2)

    def wait(self) -> None:
        try:
            self._both.wait(LONG_ENOUGH)
            self.met = True
        except threading.BrokenBarrierError:
            self._both.reset()


def in_two_threads(work: Callable[[], object]) -> None:
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture
def meeting() -> Meeting:
    return Meeting()


def test_probes_in_two_threads_leave_stdout_alone(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_spec(entry: discovery.BackendEntry) -> object:
        meeting.wait()
        raise ImportError

    monkeypatch.setattr(discovery, "load_spec", load_spec)
    entry = discovery.BackendEntry("reference", "this process", spec=SPEC)
    stdout = sys.stdout
    in_two_threads(lambda: discovery.probe(entry))
    assert sys.stdout is stdout
    assert not meeting.met


@pytest.mark.parametrize("method", ["load", "attach"])
def test_models_are_built_one_after_the_other(meeting: Meeting, method: str) -> None:
    class Trainer(ReferenceTrainer):
        """Stays inside until another one comes."""

    setattr(Trainer, method, lambda *given: meeting.wait())
    source = source_of(model_path())

    def call() -> None:
        checked = CheckedTrainer(Trainer())
        if method == "load":
            checked.load(source, Quantization(WeightFormat.NONE, None, False), Compute("float32", False))
        else:
            checked.attach(Adapter(config=AdapterConfig(1, 1.0), tensors={}), "adamw")

    in_two_threads(call)
    assert not meeting.met


@pytest.mark.parametrize("beside", ["generate", "evaluate"])
def test_a_model_is_asked_one_thing_at_a_time(meeting: Meeting, beside: str) -> None:
    """As a server asks one that is open, or a metric that goes on in a thread while the run takes steps."""
    prompt = np.zeros(2, np.int32)

    class Trainer(ReferenceTrainer):
        def generate(self, *given: object, **named: object) -> Int32:
            meeting.wait()
            return prompt

        def evaluate(self, batches: object) -> LossSum:
            meeting.wait()
            return LossSum(0.0, 0)

    checked, asked = CheckedTrainer(Trainer()), iter(["generate", beside])

    def ask() -> None:
        if next(asked) == "generate":
            checked.generate(prompt, max_new_tokens=1)
        else:
            checked.evaluate([])

    in_two_threads(ask)
    assert not meeting.met


def test_architectures_are_opened_one_after_the_other(meeting: Meeting) -> None:
    spec = replace(SPEC, prepare_process=lambda options: meeting.wait())
    in_two_threads(lambda: discovery.open_trainer(spec))
    assert not meeting.met


def test_a_turn_can_be_entered_again() -> None:
    with alone_in_process(), alone_in_process():
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_by_fork_has_its_turn_whoever_had_it_before() -> None:
    inside, done = threading.Event(), threading.Event()

    def stay() -> None:
        with alone_in_process():
            inside.set()
            done.wait(30)

    other = threading.Thread(target=stay)
    other.start()
    inside.wait(30)
    child = os.fork()
    if child == 0:
        threading.Timer(5, os._exit, [1]).start()
        with alone_in_process():
            os._exit(0)
    _, status = os.waitpid(child, 0)
    done.set()
    other.join()
    assert status == 0
