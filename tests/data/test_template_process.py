"""A stranger's chat template runs in a process of its own: what it takes is bounded, and how it ends has a type."""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from qlora_hal.data.template import process
from qlora_hal.data.template.chat_template import BUILT_IN, ChatTemplate, TemplateFault
from qlora_hal.data.template.compiled import CompiledTemplate
from qlora_hal.data.template.sandbox import GENERATION_END, GENERATION_START, TooMuch
from qlora_hal.data.template.turn_marks import Rendering
from qlora_hal.data.tokens.special_text import SpecialText
from qlora_hal.errors import DataError, QloraHalError, UnsafeInputError

ASKED = [{"role": "user", "content": "a"}]
LARGE = "{% set x = 'x' * 16000000 %}"
WIDE = "{% set x = '\U0001f600' * 4000000 %}"  # four bytes a character, and an object of its own for each
RANGE = "{% set r = range(60000) %}"
NOT_QUICK = "{{{{ (messages[0].content ~ '{}') | reverse }}}}"
"""A sound template that has a step which is left to the process."""
MOST_SECONDS = 2.0 + process._SECONDS_OF_GRACE + 0.5
"""The limit, the look that notices, and the start of a process."""
MOST_BYTES = 300 * 10**6


def rendered(source: str) -> str:
    return ChatTemplate(source, "test", {}).render(ASKED)


def child_of_templates() -> psutil.Process:
    found = [child for child in psutil.Process().children() if process._CHILD in child.cmdline()]
    assert len(found) == 1
    return found[0]


def seconds_of_all() -> float:
    children = sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children())
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children + ended.ru_utime + ended.ru_stime


@contextmanager
def bounded() -> Iterator[None]:
    """Fails when the process of templates takes more than 300 MB over its start, or all together more than 2 s."""
    rendered("{{ 1 }}")
    at_start, started, most, ended = child_of_templates().memory_info().rss, seconds_of_all(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.005):
            for child in psutil.Process().children():
                try:
                    # A library's own children are no templates. A child that has not yet become another program shows
                    # the command and the memory of the process of tests: so the command is read first.
                    if process._CHILD in child.cmdline():
                        most = max(most, child.memory_info().rss)
                except psutil.Error:
                    continue

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
    assert most - at_start < MOST_BYTES
    # The thread that watches takes processor time, too: half of it would be far too much.
    assert seconds_of_all() - started < 1.5 * MOST_SECONDS


@pytest.mark.fault("X04")
@pytest.mark.parametrize(
    "source",
    [
        # One step that takes long: tests, comparisons, searches.
        RANGE + "{{ r | select('in', r | list) | list }}",
        RANGE + "{{ r | map('string') | map('list') | sum(start=[]) | length }}",
        "{{ ('a' * 8000000).rsplit('b' + 'a' * 4000000) }}",
        "{{ ('ab' * 4000000).strip('cd' * 999999 + 'ba') }}",
        "{{ range(99999) | map(attribute='real.' * 3000 ~ 'real') | list }}",
        LARGE + "{% for i in x if i == 'y' %}{% endfor %}",
        # One step that makes much.
        WIDE + "{{ x | list | length }}",
        WIDE + "{{ x | list | sort | length }}",
        WIDE + "{{ x | map('upper') | list | length }}",
        "{{ ('xy ' * 5000000).split() | length }}",
        "{{ ('xy\n' * 5000000).splitlines() | length }}",
        LARGE + "{{ x | title | length }}",
        # Whole numbers of millions of digits.
        "{{ 2 ** 6000000 // (7 ** 3) }}",
        "{{ 9 ** 99999999 }}",
        "{% set n = namespace(i=3) %}{% for i in range(99) %}{% set n.i = n.i * n.i %}{% endfor %}{{ n.i }}",
        "{% set n = namespace(i=3) %}{% for i in range(99999) %}{% set n.i = n.i - (0 - n.i) %}{% endfor %}{{ n.i }}",
    ],
)
def test_a_step_that_is_long_or_large_ends_within_the_limits(source: str) -> None:
    with bounded(), pytest.raises(UnsafeInputError, match="QH-X04"):
        rendered(source)


@pytest.mark.fault("X04")
@pytest.mark.parametrize(
    "source",
    [
        "{{ none | list }}",
        "{{ 1 | join }}",
        "{{ messages | trim | upper | int(0, 99) }}{{ messages | groupby }}",
        "{{ 'a' | xmlattr }}",
        "{{ [1, 'a'] | sort }}",
        "{{ messages | map('nosuch') | list }}",
        "{{ messages | tojson(separators=1) }}",
        "{{ namespace(1) }}",
        "{{ 'a' | truncate('x') }}",
        "{{ raise_exception() }}",
        "{{ messages() }}",
        "{{ 5 in 'a' }}",
        "{{ strftime_now(1) }}",
        "{{ range | tojson }}",
    ],
)
def test_filters_and_calls_on_wrong_types_are_faults_of_the_template(source: str) -> None:
    with pytest.raises(TemplateFault):
        rendered(source)


@pytest.mark.parametrize(
    "source", ["{{ [1] | random }}", "{{ 'ab' | random }}", "{{ messages | map('random') | list }}"]
)
def test_nothing_is_random(source: str) -> None:
    with pytest.raises((DataError, TemplateFault), match="random"):
        rendered(source)


def test_a_template_that_is_sound_renders_after_one_that_was_ended() -> None:
    sound = ChatTemplate(NOT_QUICK.format("!"), "test", {})
    with pytest.raises(UnsafeInputError):
        rendered(WIDE + "{{ x | list | length }}")
    assert sound.render(ASKED) == "!a"


def test_a_process_that_was_killed_is_started_again() -> None:
    sound = ChatTemplate(NOT_QUICK.format("!"), "test", {})
    assert sound.render(ASKED) == "!a"
    child = child_of_templates()
    child.kill()
    child.wait()
    assert sound.render(ASKED) == "!a"


def test_a_process_that_is_not_needed_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_SECONDS_KEPT", 0.05)
    sound = ChatTemplate(NOT_QUICK.format("?"), "test", {})
    process._child().end()
    assert sound.render(ASKED) == "?a"
    child_of_templates().wait(timeout=600)
    assert sound.render(ASKED) == "?a"


def test_threads_get_their_own_answers() -> None:
    answers: dict[int, set[str]] = {}

    def ask(number: int) -> None:
        template = ChatTemplate(NOT_QUICK.format(number), "test", {})
        answers[number] = {template.render([{"role": "user", "content": f"{number}:"}]) for _ in range(50)}

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: {f"{number}:{number}"} for number in range(4)}


def test_more_templates_than_are_kept_render() -> None:
    templates = [ChatTemplate(NOT_QUICK.format(number), "test", {}) for number in range(20)]
    assert [template.render(ASKED) for template in templates] == [
        f"{number}a"[::-1][::-1] if number < 10 else f"{str(number)[::-1]}a" for number in range(20)
    ]


@pytest.mark.parametrize("value", [None, 1.5, {"x": [1, {"y": None}]}, "\ud800", "\ufdd2", 10**30, ["é", "\U0001f600"]])
def test_values_reach_the_template_as_they_are(value: object) -> None:
    asked = [{"role": "user", "content": value}]
    for otherwise in ("", "{{ 'a' | reverse }}"):
        template = ChatTemplate("{{ messages[0].content is none }}{{ messages[0].content }}" + otherwise, "test", {})
        assert template.render(asked).removesuffix("a") == f"{value is None}{value}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages if m.role == 'user' %}{{ m.content.split('</x>')[-1].strip('\\n') | trim }}{% endfor %}",
        "{% set n = namespace(i=0) %}{% for m in messages[::-1] %}{% set n.i = n.i + 1 %}{% endfor %}{{ n.i * 2 }}",
        "{% macro f(x) %}{{ x | upper }}{% endmacro %}{{ f('a') ~ (messages | tojson(indent=2)) }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}",
        "{{ strftime_now('%Y') }}{{ '%d of %s' % (1, 'x') }}{% generation %}b{% endgeneration %}",
    ],
)
def test_what_published_templates_do_needs_no_process(source: str) -> None:
    template = ChatTemplate(source, "test", {})
    quick = template.render(ASKED)
    process._child().end()
    assert template.render(ASKED) == quick
    assert not [child for child in psutil.Process().children() if process._CHILD in child.cmdline()]
    contained = template._compiled._contained.render(  # type: ignore[union-attr]
        {"messages": ASKED, "tools": None, "add_generation_prompt": False}, turns=1, most=9999
    )
    assert contained.text == quick


SIGNS_OF_LOOPS = "\ufdda{}:{}\ufddb"
"""What an earlier release wrote into its output for marks, and would have read in it."""


@pytest.mark.fault("X04")
@pytest.mark.parametrize("step", ["", "{{ 'x' | reverse }}"], ids=["here", "in the process"])
@pytest.mark.parametrize(
    "written",
    [
        SIGNS_OF_LOOPS.format("9" * 4400, ""),
        SIGNS_OF_LOOPS.format(1, "9" * 4400),
        "".join(SIGNS_OF_LOOPS.format(number, 0) for number in range(4_000)),
        f"{GENERATION_END}{GENERATION_START}",
        "\ufdd5999\ufdd6",
        f"\ufdd0{'9' * 4400}\ufdd1",
    ],
    ids=["long loop", "long message", "many", "generation", "mask", "slot"],
)
def test_signs_that_a_template_writes_itself_are_text(written: str, step: str) -> None:
    source = f"{{% for m in messages %}}<{{{{ m.content }}}}>{{% endfor %}}{written}{step}"
    rendering = ChatTemplate(source, "test", {}).trace(ASKED)
    assert rendering.text == f"<a>{written}{'x' if step else ''}"
    assert (rendering.turns, rendering.end, list(rendering.generated)) == ({0: [(0, 3)]}, 3, [])
    special = SpecialText({"<s>": 0})
    assert special.restore(rendering.text) == rendering.text


def test_what_generation_encloses_and_each_turn_are_told_alike_here_and_in_the_process() -> None:
    source = (
        "{% for m in messages %}[{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %}]"
        "{% for n in messages %}{% endfor %}{% endfor %}!"
    )
    expected = {0: [(0, 8)], 1: [(8, 21)]}
    for step in ("", "{{ 'x' | reverse }}"):
        asked = [*ASKED, {"role": "assistant", "content": "b"}]
        rendering = ChatTemplate(source + step, "test", {}).trace(asked)
        assert rendering.text.startswith("[user:a][assistant:b]!")
        assert (rendering.turns, rendering.end, rendering.generated) == (expected, 21, [(6, 7), (19, 20)])


def test_a_process_answers_with_the_rendering_itself() -> None:
    rendering = Rendering("abc", {1: [(0, 1), (2, 3)]}, 3, [(1, 2)])
    assert Rendering.from_json(json.loads(json.dumps(rendering.as_json()))) == rendering


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'abc' | sort | join }}",
        "{{ 'a'['rfind']('a') }}",
        "{% set k = 'rf' ~ 'ind' %}{% set d = {'split': 'a'[k]} %}{{ d.split('a') }}",
        "{% set f = 'a'.rfind %}{{ f('a') }}",
        "{% set n = namespace(split='a'.rfind) %}{{ n.split('a') }}",
        "{% macro f(range) %}{{ range('a') }}{% endmacro %}{{ f('a'.rfind) }}",
        "{{ 'a'.strip('b' * 65) }}",
        "{{ ['a'] | map('reverse') | list }}",
        "{{ 'x' * 2000000 }}",
        "{{ ('a' * 20000) | list | length }}",
        "{% for i in range(99999) %}{% endfor %}",
        "{{ [" + ", ".join(["'a' * 99 ~ 'b' in 'a' * 999999"] * 900) + "] }}",
    ],
)
def test_what_could_take_long_is_left_to_the_process(source: str) -> None:
    started = time.thread_time()
    quick = CompiledTemplate(source, quick=True)
    compiled = time.thread_time()
    with pytest.raises(TooMuch):
        quick.render({"messages": ASKED}, turns=1, most=9999)
    assert time.thread_time() - compiled < 1.0
    assert compiled - started < 2.0


def test_built_in_templates_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    process._child().end()
    assert "a" in ChatTemplate(BUILT_IN["chatml"], "chatml", {}).render(ASKED)


@pytest.mark.fault("E66")
@pytest.mark.parametrize("executable", ["/nowhere/python", "/bin/false"])
def test_a_process_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch, executable: str) -> None:
    process._child().end()
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(QloraHalError, match="QH-E66"):
        rendered("{{ 'never' }}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads the environment of a process")
def test_the_process_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_KEY", "canary-wandb-1234567")
    monkeypatch.setenv("HF_TOKEN", "canary-hub-1234567")
    process._child().end()
    rendered("{{ 'started' }}")
    environment = Path(f"/proc/{child_of_templates().pid}/environ").read_bytes()
    assert b"canary" not in environment
    assert os.environ["PATH"].encode() in environment
