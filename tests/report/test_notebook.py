"""What a run shows in a kernel and in a program's log."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
from shown_runs import result, show_steps, view

from qlora_hal.errors.way_on import in_notebook, resume_line
from qlora_hal.report.console import RunConsole, next_commands
from qlora_hal.report.metrics_table import MetricsTable
from qlora_hal.report.notebook import NotebookConsole, console_here

IPython = pytest.importorskip("IPython")


class Kernel:
    """A shell with a front end, as far as it is looked at."""

    kernel = object()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str]]]:
    """Every display and update with its id, in a process that is a kernel."""
    told: list[tuple[str, dict[str, str]]] = []

    def keep(data: dict[str, str], *, raw: bool, display_id: str) -> None:
        assert raw
        told.append((display_id, data))

    monkeypatch.setattr(IPython, "get_ipython", Kernel)
    monkeypatch.setattr("IPython.display.display", keep)
    monkeypatch.setattr("IPython.display.update_display", keep)
    return told


def test_a_run_has_one_display_that_is_drawn_anew(shown: list[tuple[str, dict[str, str]]]) -> None:
    console = NotebookConsole()
    console.note("a <b>note</b>")
    show_steps(console, view())
    console.evaluated(10, 2.5, "after")
    console.finished(result(), {})
    console.close()
    assert len({display for display, _ in shown}) == 1
    page, text = shown[-1][1]["text/html"], shown[-1][1]["text/plain"]
    assert "step 10/10" in page
    assert "a &lt;b&gt;note&lt;/b&gt;" in page
    assert page.count("<svg") == 1
    assert "qlora_hal.load(&#34;runs/my run&#34;)" in page
    assert text.splitlines()[0] == "note: a <b>note</b>"
    assert sum("step " in line and "/10" in line for line in text.splitlines()) == 10
    assert "<script" not in page


def test_a_second_run_has_a_display_of_its_own(shown: list[tuple[str, dict[str, str]]]) -> None:
    console = NotebookConsole()
    for text in ("first", "second"):
        console.note(text)
        console.close()
    first, second = ([data for name, data in shown if name == display] for display in dict(shown))
    assert "first" not in second[-1]["text/plain"]
    assert "first" in first[-1]["text/plain"]


def test_steps_in_quick_succession_are_not_all_drawn(shown: list[tuple[str, dict[str, str]]]) -> None:
    console = NotebookConsole()
    for _ in range(20):
        show_steps(console, view())
    console.close()
    assert len(shown) < 20


def test_ways_to_go_on_are_calls_of_python_in_a_kernel(
    shown: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert in_notebook()
    assert resume_line(tmp_path / "runs" / "a") == 'qlora_hal.resume("runs/a")'
    assert next_commands(result()) == ('qlora_hal.load("runs/my run").generate("...")',)
    assert next_commands(result("SIGINT")) == ('qlora_hal.resume("runs/my run")',)


def test_ways_to_go_on_are_commands_elsewhere() -> None:
    assert resume_line(Path("runs/a")) == "qlora-hal resume runs/a"
    assert next_commands(result("SIGINT"))[0] == "qlora-hal resume 'runs/my run'"


# logging ------------------------------------------------------------------------------------------------------------


def test_every_message_goes_to_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "qlora_hal"):
        console = RunConsole(stream=io.StringIO(), environ={})
        console.note("mind this")
        show_steps(console, view(logging_steps=5))
        console.evaluated(10, 2.5, "after")
    levels = [(record.levelname, record.getMessage().split("  ")[0]) for record in caplog.records]
    assert levels == [
        ("WARNING", "mind this"),
        ("INFO", "step 5/10"),
        ("INFO", "step 10/10"),
        ("INFO", "eval: step 10 (after)"),
    ]


def test_quiet_in_python_prints_nothing_and_logs_all(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "qlora_hal"):
        console = console_here(quiet=True)
        console.note("mind this")
        show_steps(console, view())
        console.finished(result(), {})
    assert capfd.readouterr() == ("", "")
    assert len(caplog.records) > 10
    assert console.notes == ["mind this"]


def test_a_program_without_logging_sees_no_note_twice(capfd: pytest.CaptureFixture[str]) -> None:
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("qlora_hal").handlers)
    RunConsole(environ={}).note("mind this")
    assert capfd.readouterr().err == "note: mind this\n"


# the result ---------------------------------------------------------------------------------------------------------


def test_the_log_is_a_table_with_a_row_for_each_step(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        '{"step": 0, "eval_loss": 3.0, "label": "before"}\n'
        '{"step": 1, "loss": 9.0}\n'
        '{"step": 1, "loss": 2.0}\n'
        '{"step": 2, "loss": 1.5}\n'
        '{"step": 2, "eval_loss": 1.0, "eval_exact": 0.5, "label": "after"}\n'
    )
    table = MetricsTable.of_run(log)
    assert [row["step"] for row in table] == [0, 1, 2]
    assert table.columns()["loss"] == [None, 2.0, 1.5]
    assert table.columns()["eval_exact"] == [None, None, 0.5]
    assert MetricsTable.of_run(tmp_path / "absent.jsonl") == []


def test_the_log_is_a_data_frame_where_pandas_is_there(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    frame = MetricsTable.of_run(tmp_path / "metrics.jsonl").to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loss.mean() == 1.75


def test_a_result_shows_its_figures_and_its_curve(tmp_path: Path) -> None:
    from dataclasses import replace

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    page = replace(result(), run_dir=tmp_path)._repr_html_()
    assert "<svg" in page
    assert "2.5 s" in page
    assert "eval loss" in page
    assert replace(result(), run_dir=tmp_path).paths == {"metrics": tmp_path / "metrics.jsonl"}
