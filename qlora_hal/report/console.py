"""What a run shows in the terminal. Everything goes to stderr: a live line where a person watches, else plain lines.

All of it also goes to the logger `qlora_hal`, notes as warnings and the rest as information: where a program configures
logging, it has the messages of a run like those of any library.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from math import exp
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, TextIO

from qlora_hal.errors import figures
from qlora_hal.errors.terminal_text import visible
from qlora_hal.errors.way_on import in_notebook, resume_line
from qlora_hal.report.lasting_stream import LastingStream, lasting
from qlora_hal.report.metrics import Smoother

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.text import Text

    from qlora_hal.contract.backend import ProbeReport
    from qlora_hal.contract.values import StepStats
    from qlora_hal.run.result import RunView, TrainResult

_REFRESH_SECONDS = 0.1
LOGGER = logging.getLogger("qlora_hal")
LOGGER.addHandler(logging.NullHandler())  # else notes would be written to stderr once more where nobody set up logging


def stderr_console(stream: TextIO | LastingStream | None = None, environ: Mapping[str, str] | None = None) -> Console:
    """A rich console on stderr. NO_COLOR and FORCE_COLOR decide about colour before the terminal does."""
    from rich.console import Console

    variables = os.environ if environ is None else environ
    lasting_stream = lasting(sys.stderr if stream is None else stream)
    no_color = bool(variables.get("NO_COLOR"))
    forced = not no_color and bool(variables.get("FORCE_COLOR"))
    return Console(
        file=lasting_stream,  # type: ignore[arg-type]
        no_color=no_color,
        force_terminal=True if forced else None,
        highlight=False,
        _environ=dict(variables),
    )


def wants_color(stream: TextIO, environ: Mapping[str, str] | None = None) -> bool:
    """Whether text for this stream should carry colour."""
    variables = os.environ if environ is None else environ
    if variables.get("NO_COLOR"):
        return False
    return bool(variables.get("FORCE_COLOR")) or is_watched(stream, {**variables, "CI": ""})


def is_watched(stream: TextIO | LastingStream, environ: Mapping[str, str]) -> bool:
    """Whether a person sits before the stream: a terminal that can move its cursor, outside CI."""
    return stream.isatty() and not environ.get("CI") and environ.get("TERM") not in (None, "", "dumb")


class RunConsole:
    """Shows one run.

    `quiet` keeps only notes, `silent` not even them; `json` keeps stderr free of the live line and of tables. stdout is
    never written here. `logger` gets every message, however quiet this is.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        json: bool = False,
        silent: bool = False,
        stream: TextIO | None = None,
        environ: Mapping[str, str] | None = None,
        logger: logging.Logger | None = LOGGER,
    ) -> None:
        variables = os.environ if environ is None else environ
        self.quiet = quiet = quiet or silent
        self.json = json
        self.silent = silent
        self._logger = logger
        self.notes: list[str] = []
        """Every note that was shown since the last `close`."""
        self._stream = lasting(sys.stderr if stream is None else stream)
        self._console = stderr_console(self._stream, variables)
        self._watched = is_watched(self._stream, variables) and not quiet and not json
        self._told_of_loss = False
        self._live: Live | None = None
        self._shown_at = 0.0
        self._smoother = Smoother()

    @property
    def manner(self) -> dict[str, bool]:
        """How it was asked to show things, for the console of a child process."""
        return {"quiet": self.quiet, "json": self.json, "silent": self.silent}

    # before the first step -----------------------------------------------------------------------------------------
    def note(self, text: str) -> None:
        """One sentence that the user should know; shown even when quiet."""
        self.notes.append(text)
        self._log(logging.WARNING, text)
        if not self.silent:
            self._show(_styled("note: ", "yellow", text))

    @property
    def is_watched(self) -> bool:
        """Whether a person sits before it who wants to see how things go on."""
        return self._watched

    def fetching(self, text: str) -> None:
        """What is being fetched, or was; the bar between is the hub library's."""
        self._print(_styled("fetch: ", "bold", text))

    def detection(self, chosen: str, why: str, reports: Sequence[ProbeReport], rejections: Mapping[str, str]) -> None:
        """Which backend was taken, and of every other why not."""
        devices = next((", ".join(r.devices) for r in reports if r.backend == chosen), "")
        self._print(_styled("backend: ", "bold", f"{chosen}{f' on {devices}' if devices else ''} ({why})"))
        for report in reports:
            if report.backend != chosen:
                reason = "ready, not chosen" if report.ready else report.reason or report.availability.value
                reason = rejections.get(report.backend) or reason
                self._print(_styled(f"  not {report.backend}: ", "dim", reason))

    def data_report(self, lines: Iterable[str]) -> None:
        """What the data room counted, a line each."""
        for number, line in enumerate(lines):
            self._print(_styled("data: " if number == 0 else "      ", "bold", line))

    def run_started(self, run: RunView) -> None:
        """The model is loaded and the first step is about to run. A step and its batch are those of all devices."""
        training, known = run.config.training, run.resolved
        left = run.total_steps - run.first_step
        steps = f"{left} steps" + (f" from step {run.first_step}" if run.first_step else "")
        if known.get("sequences_per_step"):
            devices = "1 device" if known.get("ranks", 1) == 1 else f"{known['ranks']} devices"
            steps += f" of {known['sequences_per_step']} sequences on {devices}"
        facts = [steps]
        if known.get("tokens_per_step"):
            facts.append(f"about {figures.count(float(str(known['tokens_per_step'])))} tokens a step")
        facts.append(f"learning rate {figures.rate(training.learning_rate)} ({training.lr_scheduler_type})")
        facts += [str(known[key]) for key in ("weight_format", "compute_dtype") if known.get(key)]
        if known.get("fp8_products"):
            facts.append("products with the base in fp8")
        self._print(_styled("run: ", "bold", f"{', '.join(facts)}, into {run.run_dir}"))

    # while it runs -------------------------------------------------------------------------------------------------
    def step(
        self,
        run: RunView,
        step: int,
        stats: StepStats,
        *,
        learning_rate: float,
        tokens_per_second: float,
        seconds_per_step: float,
        epoch: float,
        tokens_seen: int,
        memory_bytes: int | None,
        memory_limit: int | None,
        eta_seconds: float | None,
    ) -> None:
        """One optimizer step; `step` counts from 1."""
        average = self._smoother.add(stats.loss)
        is_due = step % run.config.training.logging_steps == 0 or step == run.total_steps
        if self.quiet and not self._is_logged(logging.INFO):
            return
        memory = "" if memory_bytes is None else f"mem {figures.size(memory_bytes)}"
        if memory and memory_limit:
            memory += f" of {figures.size(memory_limit)}"
        parts = [
            f"epoch {epoch:.2f}",
            f"loss {figures.loss(stats.loss)} (ema {figures.loss(average)})",
            f"grad {stats.grad_norm:.3g}{'' if stats.applied else ' NOT APPLIED'}",
            f"lr {figures.rate(learning_rate)}",
            f"{figures.count(tokens_per_second)} tok/s",
            f"{seconds_per_step:.3g} s/step",
            f"eta {figures.duration(eta_seconds)}",
            memory,
            f"{figures.count(tokens_seen)} tokens",
        ]
        parts = [part for part in parts if part]
        line = "  ".join([f"step {step}/{run.total_steps}", *parts])
        if is_due:
            self._log(logging.INFO, line)
        if not self.quiet:
            self._show_step(run, step, stats.loss, parts, line if is_due else "")

    def evaluated(self, step: int, loss: float, label: str, metrics: Mapping[str, float] | None = None) -> None:
        """An evaluation ended; `label` is `before`, `during` or `after`, `metrics` are a user's own figures."""
        own = "".join(f"  {name} {value:.4g}" for name, value in (metrics or {}).items())
        told = f"step {step} ({label})  loss {figures.loss(loss)}{_perplexity(loss)}{own}"
        self._print(_styled("eval: ", "bold", told))

    def checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint is durable."""
        self._print(_styled("saved: ", "bold", f"step {step} in {path}"))

    # at the end ----------------------------------------------------------------------------------------------------
    def samples(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Answers before and after training. A row has `prompt`, `before`, `after`."""
        self._stop_live()
        shown = [(key, " ".join(row.get(key, "").split())) for row in rows for key in ("prompt", "before", "after")]
        if not (rows and self._watched):
            for key, text in shown:
                self._print(f"sample {key}: {text}")
            return
        self._console.print(_sample_table(rows))
        for key, text in shown:
            self._log(logging.INFO, f"sample {key}: {text}")

    def finished(self, result: TrainResult, paths: Mapping[str, Path]) -> None:
        """The summary, and the commands that make sense next. `paths` names what was written."""
        self._stop_live()
        for name, text in summary(result, paths):
            self._print(_styled(f"{name:<12}", "bold", text))
        self._print(_styled("next:", "bold", ""))
        for command in next_commands(result):
            self._print(f"  {command}")

    def close(self) -> None:
        """Give the terminal back; safe to call twice, and right to call when a run fails."""
        self._stop_live()
        self.notes.clear()

    # drawing -------------------------------------------------------------------------------------------------------
    def _print(self, content: str | Text) -> None:
        """One line for the user and the logger."""
        self._log(logging.INFO, content if isinstance(content, str) else content.plain)
        if not self.quiet:
            self._show(content)

    def _log(self, level: int, text: str) -> None:
        if self._logger is not None:
            self._logger.log(level, "%s", visible(text))

    def _is_logged(self, level: int) -> bool:
        return self._logger is not None and self._logger.isEnabledFor(level)

    def _show_step(self, run: RunView, step: int, loss: float, parts: Sequence[str], line: str) -> None:
        """`line` is empty where no line is due."""
        if self._watched:
            self._show_live(step, run.total_steps, parts)
        elif line:
            self._show(line)

    def _show(self, content: str | Text) -> None:
        from rich.text import Text

        # Text keeps square brackets of users' data from being read as markup; soft wrap keeps paths whole.
        content = Text(visible(content)) if isinstance(content, str) else content
        (self._live.console if self._live else self._console).print(content, soft_wrap=True)
        if self._stream.problem is not None and not self._told_of_loss:
            self._told_of_loss = True
            self.notes.append(f"standard error can no longer be written ({self._stream.why})")

    def _show_live(self, step: int, total: int, parts: Sequence[str]) -> None:
        from rich.live import Live

        now = time.monotonic()
        if self._live is not None and now - self._shown_at < _REFRESH_SECONDS and step < total:
            return
        self._shown_at = now
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=False, redirect_stdout=False)
            self._live.start()
        self._live.update(_live_line(step, total, parts), refresh=True)

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def summary(result: TrainResult, paths: Mapping[str, Path]) -> list[tuple[str, str]]:
    """The end of a run as (name, text)."""
    ended = "" if result.stopped_because == "finished" else f", stopped: {result.stopped_because}"
    block = f" in blocks of {result.block_size}" if result.block_size else ""
    speed = f"{figures.count(result.tokens_per_second)} tok/s while training"
    rows = [
        ("trained", f"{result.steps} steps, {figures.count(result.tokens)} tokens{ended}"),
        ("took", f"{figures.duration(result.wall_seconds)}, {speed}"),
        ("on", f"{result.backend} ({result.device}), base stored as {result.weight_format}{block}"),
    ]
    if result.losses:
        first, last = result.losses[0], result.losses[-1]
        rows.append(("train loss", f"{figures.loss(first[1])} (step {first[0]}) -> {figures.loss(last[1])}"))
    if result.eval_loss_after is not None:
        before, after = figures.loss(result.eval_loss_before), figures.loss(result.eval_loss_after)
        rows.append(("eval loss", f"{before} -> {after}"))
    if result.peak_memory_bytes is not None:
        rows.append(("peak memory", figures.size(result.peak_memory_bytes)))
    adapter_first = sorted(paths.items(), key=lambda named: named[0] != "adapter")
    return rows + [(name, str(path)) for name, path in adapter_first]


def next_commands(result: TrainResult) -> tuple[str, ...]:
    """The commands that make sense after this result, ready to be pasted; calls of Python in a notebook. A stopped run
    has no adapter to ask yet."""
    if in_notebook():
        asked = resume_line(result.run_dir)
        return (asked,) if result.stopped_by_signal else (asked.replace(".resume(", ".load(") + '.generate("...")',)
    run = quote(str(result.run_dir))
    report = f"python -m webbrowser -t {quote(str(result.run_dir / 'report.html'))}"
    if result.stopped_by_signal:
        return (f"qlora-hal resume {run}", report)
    return (f"qlora-hal chat --run {run}", f'qlora-hal generate --run {run} --prompt "..."', report)


def _styled(head: str, style: str, text: str) -> Text:
    from rich.text import Text

    return Text.assemble((visible(head), style), visible(text))


def _perplexity(loss: float) -> str:
    return f"  perplexity {exp(loss):.2f}" if 0 <= loss < 20 else ""


def _live_line(step: int, total: int, parts: Sequence[str]) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(total=total, completed=step, width=24), Text(f"step {step}/{total}", "bold"))
    return Group(grid, Text(visible("  ".join(parts))))


def _sample_table(rows: Sequence[Mapping[str, str]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Answers", title_justify="left", show_lines=True, expand=True)
    for heading in ("prompt", "before", "after"):
        table.add_column(heading, ratio=1, overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(row.get(key, ""))) for key in ("prompt", "before", "after")))
    return table
