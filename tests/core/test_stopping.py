"""What a signal does to a run, by what is under way; and what is heard of one that is ignored or held back."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from qlora_hal.processes.signals import (
    EndedAtOnce,
    Requests,
    ended_by_signals,
    handing_on,
    held_back,
    ignored_note,
    requests_by_signal,
)

pytestmark = pytest.mark.usefixtures("usual_signals")

STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def requests(said: list[str]) -> Iterator[Requests]:
    with requests_by_signal(said.append) as requests:
        yield requests


@pytest.mark.fault("S21", "S22")
@pytest.mark.parametrize("number", STOPS)
def test_before_and_after_the_steps_a_first_signal_ends_at_once(number: signal.Signals, requests: Requests) -> None:
    with pytest.raises(EndedAtOnce) as ended:
        signal.raise_signal(number)
    assert (ended.value.name, ended.value.again, ended.value.exit_status) == (number.name, False, 128 + number)


@pytest.mark.parametrize("number", STOPS)
def test_between_steps_a_first_signal_waits_to_be_asked_for_and_a_second_does_not(
    number: signal.Signals, requests: Requests, said: list[str]
) -> None:
    with requests.heeded_between_steps():
        signal.raise_signal(number)
        assert said == []  # a handler may interrupt a print
        assert requests.stop() == number.name
        assert requests.stop() == number.name
        assert len(said) == 1
        with pytest.raises(EndedAtOnce) as ended:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.again


def test_a_signal_that_came_after_the_last_step_was_asked_for_ends_the_run_when_the_steps_are_done(
    requests: Requests,
) -> None:
    steps = requests.heeded_between_steps()
    steps.__enter__()
    requests.stop()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(EndedAtOnce) as ended:
        steps.__exit__(None, None, None)
    assert not ended.value.again


def test_what_is_done_is_told_to_the_end_whatever_is_asked(requests: Requests, said: list[str]) -> None:
    with requests.too_late():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
    assert said == ["SIGTERM: there was nothing left to stop.", "SIGUSR1: there was nothing left to save."]


def test_a_second_signal_ends_even_the_telling(requests: Requests) -> None:
    with requests.too_late():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(EndedAtOnce):
            signal.raise_signal(signal.SIGTERM)


def test_an_end_that_a_library_swallowed_is_not_forgotten(requests: Requests) -> None:
    with suppress(BaseException):
        signal.raise_signal(signal.SIGTERM)
    with requests.heeded_between_steps():
        assert requests.stop() == "SIGTERM"


@pytest.mark.fault("S22")
def test_a_save_that_is_asked_for_before_the_first_step_is_remembered(requests: Requests, said: list[str]) -> None:
    signal.raise_signal(signal.SIGUSR1)
    with requests.heeded_between_steps():
        assert requests.save()
        assert not requests.save()
    assert said == ["SIGUSR1: saving after this step, then continuing."]


def test_a_save_that_is_asked_for_before_a_run_listens_reaches_it(said: list[str]) -> None:
    with ended_by_signals():
        # To this thread: others of the test process were there before it held the signal back.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        with requests_by_signal(said.append) as requests:
            assert requests.save()


def test_a_command_without_a_run_is_not_ended_by_a_request_to_save() -> None:
    code = (
        "import os, signal; from qlora_hal.processes.signals import ended_by_signals\n"
        "with ended_by_signals():\n    os.kill(os.getpid(), signal.SIGUSR1)\nprint('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_without_a_run_is_unwound_by_a_request_to_stop(number: signal.Signals) -> None:
    with pytest.raises(EndedAtOnce) as ended, ended_by_signals():
        signal.raise_signal(number)
    assert ended.value.exit_status == 128 + number
    assert f"ended immediately by {number.name}" in str(ended.value)


@pytest.mark.parametrize("number", [*STOPS, signal.SIGUSR1])
def test_all_that_is_asked_of_a_parent_is_handed_on(number: signal.Signals) -> None:
    sent: list[int] = []
    with handing_on(sent.append) as handed:
        signal.raise_signal(number)
    assert (sent, handed) == ([number], {number})


@pytest.mark.parametrize("number", [*STOPS, signal.SIGUSR1])
def test_what_a_process_was_started_to_ignore_stays_ignored_and_is_said(
    number: signal.Signals, said: list[str]
) -> None:
    signal.signal(number, signal.SIG_IGN)
    with requests_by_signal(said.append) as requests:
        signal.raise_signal(number)
        assert not requests.save()
        assert not requests.stop()
    assert signal.getsignal(number) is signal.SIG_IGN
    assert f"this process ignores {number.name} (as after nohup, or & in a script)" in ignored_note()
    others = [other.name for other in STOPS if other != number]
    assert f"{' or '.join(others)} stops it" in ignored_note()


def test_where_nothing_is_ignored_nothing_is_said_of_it() -> None:
    assert ignored_note() == ""


def test_a_run_in_another_thread_leaves_the_signals_to_their_owner_and_says_nothing_of_them() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = {number: signal.getsignal(number) for number in (*STOPS, signal.SIGUSR1)}
    seen: list[object] = []

    def run() -> None:
        with requests_by_signal(seen.append) as requests, requests.heeded_between_steps():
            seen.append({number: signal.getsignal(number) for number in before})
            seen.append(ignored_note())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before, ""]


def test_handlers_are_those_of_before_when_the_run_is_over() -> None:
    theirs = signal.signal(signal.SIGTERM, lambda number, frame: None)
    mine = signal.getsignal(signal.SIGTERM)
    with requests_by_signal(print):
        assert signal.getsignal(signal.SIGTERM) is not mine
    assert signal.getsignal(signal.SIGTERM) is mine
    signal.signal(signal.SIGTERM, theirs)


def test_a_child_that_is_started_where_saves_are_held_back_is_not_ended_by_one() -> None:
    """Its first instruction already finds the signal blocked: there is no moment in which it could end the child."""
    with held_back():
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; print('ready', flush=True); sys.stdin.read()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    with child:
        child.send_signal(signal.SIGUSR1)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGUSR1)
        child.communicate()
    assert child.returncode == 0
