"""`train`, `resume` and `backends`: the whole story in one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_hal.backend import ProbeReport
    from qlora_hal.config import RunConfig
    from qlora_hal.data import ChatTokenizer
    from qlora_hal.observing import TrainResult
    from qlora_hal.report.console import RunConsole
    from qlora_hal.settings import ResolvedSettings
    from qlora_hal.values import Batch

Rows = Sequence[Mapping[str, object]]


def train(
    config: ResolvedSettings | RunConfig | Mapping[str, object] | str | Path | None = None,
    *,
    model: str | Path | None = None,
    data: str | Path | Rows | None = None,
    output_dir: str | Path | None = None,
    backend: str = "auto",
    observers: Sequence[object] = (),
    overwrite: bool = False,
    force_unlock: bool = False,
    dry_run: bool = False,
    console: RunConsole | None = None,
) -> TrainResult:
    """Fine-tune a quantized model with LoRA; the same call on every backend.

    Give one `config` (a YAML, TOML or JSON file, a mapping, a `RunConfig`), or the keywords, or both: keywords win.
    `data` may be rows in memory. `dry_run` stops before the model loads. The adapter is written to
    `<output_dir>/adapter` in PEFT layout. `overwrite` replaces an earlier run there; `force_unlock` takes a lock whose
    owner on another host has ended.

    Raises the errors of `qlora_hal.errors`; whatever can be found wrong before the model loads is found there.
    """
    from qlora_hal.running import run_new
    from qlora_hal.settings import resolve_settings

    rows = data if isinstance(data, Sequence) and not isinstance(data, str) else None
    keywords = {"model": model, "data": None if rows is not None else data, "output_dir": output_dir}
    settings = resolve_settings(config, keywords={**keywords, "backend": backend})
    return run_new(
        settings, rows, observers, overwrite=overwrite, force_unlock=force_unlock, dry_run=dry_run, console=console
    )


def resume(
    run_dir: str | Path,
    *,
    backend: str | None = None,
    transfer: bool = False,
    model: str | Path | None = None,
    data: str | Path | None = None,
    observers: Sequence[object] = (),
    force_unlock: bool = False,
    console: RunConsole | None = None,
) -> TrainResult:
    """Go on with a run from its newest valid checkpoint, exactly where the backend can (`docs/resume.md`).

    `backend` moves the run to another one: adapter, moments, schedule and data order go along. What would change the
    model or its optimizer (another weight format, 8-bit moments) is done only with `transfer`. `model` and `data` say
    where these lie on this machine; they must be the same ones.

    Raises CheckpointError when no checkpoint verifies, and the errors of `train`.
    """
    from qlora_hal.running import run_resumed

    return run_resumed(
        Path(run_dir),
        backend=backend,
        transfer=transfer,
        model=None if model is None else str(model),
        data=None if data is None else str(data),
        observers=observers,
        force_unlock=force_unlock,
        console=console,
    )


def backends() -> tuple[ProbeReport, ...]:
    """What each installed backend says of this machine, in milliseconds and without importing a tensor library."""
    from qlora_hal.discovery import listed, reports

    return reports(listed())


def first_batch(settings: ResolvedSettings) -> tuple[Batch, ChatTokenizer]:
    """The first batch that `train` would see, for looking at; nothing is written beside a temporary folder."""
    import tempfile

    from qlora_hal.execution import window_sampler
    from qlora_hal.hooks import Hooks
    from qlora_hal.preparation import choose_machinery, drawn_seed, prepare_run
    from qlora_hal.report.console import RunConsole

    console = RunConsole(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        machinery = choose_machinery(settings.config, Hooks(), console)
        seed = drawn_seed(settings.config)
        prepared = prepare_run(settings.config, seed, machinery, Path(folder), None, console)
        return window_sampler(prepared).window(0)[0], prepared.tokenizer
