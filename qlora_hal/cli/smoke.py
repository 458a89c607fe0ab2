"""`train --smoke`: the whole life of a run in three steps, with a real stop in the middle."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from qlora_hal.config.resolve import ResolvedSettings, resolve_settings
from qlora_hal.errors import StoppedError
from qlora_hal.errors.terminal_text import show, show_json
from qlora_hal.hooks import hookimpl

if TYPE_CHECKING:
    from qlora_hal.contract.values import StepStats
    from qlora_hal.run.result import RunView

STEPS = 3
_SHORT = {
    "training.max_steps": str(STEPS),
    "training.warmup_steps": "0",
    "training.eval_steps": "none",
    "training.early_stopping_patience": "none",
    "training.logging_steps": "1",
    "training.sample_prompts": [],
    "training.report_to": [],
    "training.tracker_project": "none",
    "checkpoint.save_steps": "none",
}


class StopAfterFirstStep:
    """Asks this process to stop as a scheduler would, once."""

    def __init__(self) -> None:
        self._asked = False

    @hookimpl
    def qlora_hal_step_finished(self, run: RunView, step: int, stats: StepStats, learning_rate: float) -> None:
        if not self._asked:
            self._asked = True
            signal.raise_signal(signal.SIGTERM)


def run_smoke(
    settings: ResolvedSettings,
    *,
    json: bool = False,
    quiet: bool = False,
    overwrite: bool = False,
    force_unlock: bool = False,
    verify: bool = False,
) -> int:
    """Train, be stopped, resume to the end, answer a prompt. Raises what any of these raises."""
    from qlora_hal import api
    from qlora_hal.cli.json_output import kept_for_json
    from qlora_hal.inference.generate import open_generation
    from qlora_hal.report.console import RunConsole

    with kept_for_json(json), _output_folder(settings) as folder:
        short = resolve_settings(settings, flags={**_SHORT, "output_dir": str(folder)})
        console = RunConsole(quiet=quiet, json=json)
        stopped_at = 0
        # The run is this command's own: what was permitted it holds for going on with it.
        trusted = settings.config.model.trust_remote_code
        try:
            result = api.train(
                short,
                observers=(StopAfterFirstStep(),),
                overwrite=overwrite,
                force_unlock=force_unlock,
                verify=verify,
                console=console,
            )
        except StoppedError as stopped:
            step = stopped.context.get("step")
            stopped_at = step if isinstance(step, int) else 0
            result = api.resume(folder, trust_remote_code=trusted, console=console)
        pair = open_generation(run_dir=folder, backend=result.backend, trust_remote_code=trusted)
        try:
            base, adapted = pair.answer([{"role": "user", "content": "Hello"}], max_new_tokens=16)
        finally:
            pair.close()
        facts = {
            "backend": result.backend,
            "device": result.device,
            "steps": result.steps,
            "stopped_at": stopped_at,
            "resumed": bool(stopped_at),
            "last_loss": result.losses[-1][1] if result.losses else None,
            "answer_base": base,
            "answer_adapter": adapted,
        }
    if json:
        show_json(facts)
    else:
        show(
            f"smoke: {STEPS} steps on {result.backend} ({result.device}), stopped and resumed after step {stopped_at}, "
            "saved, generated. All of it works here.",
            stream=sys.stderr,
        )
    return 0


@contextmanager
def _output_folder(settings: ResolvedSettings) -> Iterator[Path]:
    """The folder that this command names, or a temporary one that goes afterwards: that of a settings file is for the
    run itself."""
    if settings.config.output_dir and settings.origins["output_dir"].startswith("command line"):
        yield Path(settings.config.output_dir)
        return
    folder = Path(mkdtemp(prefix="qlora-hal-smoke-"))
    try:
        yield folder / "run"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
