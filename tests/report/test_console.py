"""What a run shows: plain lines in a pipe, a live line on a terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from shown_runs import result, show_steps, view

from qlora_hal.contract.backend import Availability, ProbeReport
from qlora_hal.report.console import RunConsole, next_commands, summary


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(
    environ: Mapping[str, str] | None = None, stream: io.StringIO | None = None
) -> tuple[RunConsole, io.StringIO]:
    stream = stream or io.StringIO()
    return RunConsole(stream=stream, environ=dict(environ or {})), stream


def test_a_pipe_gets_one_plain_line_for_each_log_interval() -> None:
    console, stream = shown()
    show_steps(console, view(logging_steps=4))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["4/10", "8/10", "10/10"]
    assert lines[0] == (
        "step 4/10  epoch 0.40  loss 2.0000 (ema 2.0000)  grad 0.5  lr 1e-04  1,234 tok/s  0.25 s/step  "
        "eta 2.5 s  mem 1 GiB of 8 GiB  240 tokens"
    )


@pytest.mark.parametrize("environ", [{"CI": "true", "TERM": "xterm"}, {"TERM": "dumb"}])
def test_ci_and_a_dumb_terminal_get_plain_lines_too(environ: dict[str, str]) -> None:
    console, stream = shown(environ, Terminal())
    show_steps(console, view(logging_steps=10))
    console.close()
    assert "\x1b[2K" not in stream.getvalue()
    assert "step 10/10" in stream.getvalue()


def test_a_terminal_gets_one_line_that_is_redrawn() -> None:
    console, stream = shown({"TERM": "xterm-256color", "COLUMNS": "200"}, Terminal())
    show_steps(console, view())
    console.evaluated(10, 2.0, "after")
    console.close()
    console.close()
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue())
    assert "step 10/10" in plain
    assert "eval: step 10 (after)  loss 2.0000  perplexity 7.39" in plain
    assert "\x1b[2K" in stream.getvalue()


def test_no_color_wins_over_force_color() -> None:
    for environ, coloured in (({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)):
        console, stream = shown(environ)
        console.note("a note")
        assert ("\x1b[" in stream.getvalue()) is coloured


def test_a_step_that_was_not_applied_says_so() -> None:
    console, stream = shown()
    show_steps(console, view(logging_steps=10), applied=False)
    assert "NOT APPLIED" in stream.getvalue()


def test_the_choice_of_the_backend_is_told_with_every_rejection() -> None:
    console, stream = shown()
    reports = [
        ProbeReport("cpu_torch", Availability.READY, "", devices=("a processor",)),
        ProbeReport("cuda_bnb", Availability.NO_DEVICE, "no driver answers", "install it"),
        ProbeReport("gptq_int4", Availability.READY, "a processor is here"),
        ProbeReport("mlx_lora", Availability.READY, "ready"),
    ]
    console.detection("cpu_torch", "named by the user", reports, {"mlx_lora": "lacks nf4"})
    assert stream.getvalue().splitlines() == [
        "backend: cpu_torch on a processor (named by the user)",
        "  not cuda_bnb: no driver answers",
        "  not gptq_int4: ready, not chosen",
        "  not mlx_lora: lacks nf4",
    ]


def test_square_brackets_of_data_are_not_read_as_markup() -> None:
    console, stream = shown()
    console.note("[bold]kept[/bold]")
    console.samples([{"prompt": "[red]p", "before": "b", "after": "a\nb"}])
    assert stream.getvalue().splitlines() == [
        "note: [bold]kept[/bold]",
        "sample prompt: [red]p",
        "sample before: b",
        "sample after: a b",
    ]


@pytest.mark.parametrize("in_fp8", [True, False])
def test_the_run_line_names_products_in_fp8(in_fp8: bool) -> None:
    console, stream = shown()
    run = view()
    console.run_started(replace(run, resolved={**run.resolved, "fp8_products": in_fp8}))
    assert ("float32, products with the base in fp8, into" in " ".join(stream.getvalue().split())) == in_fp8


def test_quiet_keeps_notes_alone() -> None:
    stream = io.StringIO()
    console = RunConsole(quiet=True, stream=stream, environ={})
    console.run_started(view())
    show_steps(console, view())
    console.finished(result(), {})
    console.note("kept")
    assert stream.getvalue() == "note: kept\n"


def test_the_end_names_the_figures_and_the_next_three_commands() -> None:
    console, stream = shown()
    console.finished(result(), {"report": Path("runs/my run/report.html")})
    text = stream.getvalue()
    for words in ("10 steps, 600 tokens", "240 tok/s", "3.5000 -> 2.5000", "3.0000 (step 1) -> 2.0000", "1 GiB"):
        assert words in text
    assert text.rstrip().splitlines()[-3:] == [f"  {command}" for command in next_commands(result())]


def test_the_next_commands_can_be_pasted_and_a_stopped_run_is_resumed_first() -> None:
    assert next_commands(result())[0] == "qlora-hal chat --run 'runs/my run'"
    assert len(next_commands(result())) == 3
    stopped = next_commands(result("SIGTERM"))
    assert stopped[0] == "qlora-hal resume 'runs/my run'"
    assert not any("generate" in command for command in stopped), "it has no adapter yet"


def test_a_run_that_early_stopping_ended_has_nothing_to_resume() -> None:
    assert next_commands(result("early stopping")) == next_commands(result())


def test_the_summary_names_only_what_was_written() -> None:
    adapter = ("adapter", "runs/my run/adapter")
    assert adapter not in summary(result("SIGTERM"), {"report": Path("report.html")})
    assert adapter in summary(result(), {"adapter": Path("runs/my run/adapter")})


def test_notes_are_kept_until_the_run_is_closed() -> None:
    console, _ = shown()
    console.note("one")
    console.note("two")
    assert console.notes == ["one", "two"]
    console.close()
    assert console.notes == []
