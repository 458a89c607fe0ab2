"""`train`, `resume`, `merge` and `backends`: the whole story in one page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal.files.refused_paths import refused_paths_told

if TYPE_CHECKING:
    from qlora_hal.config.resolve import ResolvedSettings
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.backend import ProbeReport
    from qlora_hal.contract.values import Batch
    from qlora_hal.data import ChatTokenizer
    from qlora_hal.export.request import BaseChoice, MergeResult, OutputDtype
    from qlora_hal.report.console import RunConsole
    from qlora_hal.run.result import TrainResult

Rows = Iterable[Mapping[str, object]]


@refused_paths_told()
def train(
    config: ResolvedSettings | RunConfig | Mapping[str, object] | str | Path | None = None,
    *,
    model: str | Path | None = None,
    data: str | Path | Rows | None = None,
    validation_data: str | Path | Rows | None = None,
    output_dir: str | Path | None = None,
    backend: str = "auto",
    observers: Sequence[object] = (),
    overwrite: bool = False,
    force_unlock: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    devices: int | str | None = None,
    max_restarts: int = 0,
    console: RunConsole | None = None,
) -> TrainResult:
    """Fine-tune a quantized model with LoRA; the same call on every backend.

    Give one `config` (a YAML, TOML or JSON file, a mapping, a `RunConfig`), or the keywords, or both: keywords win.
    `data` and `validation_data` may be rows in memory: a list or generator of mappings, a frame of pandas or Polars, a
    dict of columns, a data set; of a DatasetDict the split train is trained on and validation evaluated on. `dry_run`
    stops before the model loads, leaves nothing behind, and says in the result's `plan` what would run. The adapter is
    written to `<output_dir>/adapter` in PEFT layout. `overwrite` replaces an earlier run there; `force_unlock` takes a
    lock whose owner on another host has ended. `verify` hashes every byte of the model's files, and has each resume
    compare them. `devices`, a number or "auto", starts as many ranks on this machine, which compute one step together
    (`docs/many_devices.md`); when one fails they are started anew from the last checkpoint, `max_restarts` times.

    Raises the errors of `qlora_hal.errors`; whatever can be found wrong before the model loads is found there.
    """
    from qlora_hal.config.resolve import resolve_settings
    from qlora_hal.data.source.in_memory import rows_in_memory, splits_in_memory
    from qlora_hal.run.start import run_new
    from qlora_hal.run.supervisor import is_supervised, run_in_child

    given, held_out = splits_in_memory(data)
    validation_data = held_out if validation_data is None else validation_data  # type: ignore[assignment]
    rows, validation_rows = (
        None if one is None or isinstance(one, str | Path) else rows_in_memory(one) for one in (given, validation_data)
    )
    keywords = {
        "model": model,
        "data": None if rows is not None else data,
        "data.validation_path": None if validation_rows is not None else validation_data,
        "output_dir": output_dir,
    }
    settings = resolve_settings(config, keywords={**keywords, "backend": backend})
    if devices is not None or max_restarts:
        from qlora_hal.ranks.starting import require_usable, train_on_devices

        require_usable(devices, max_restarts)
    if devices is not None:
        return train_on_devices(
            settings,
            rows,
            observers,
            devices,
            max_restarts,
            validation_rows=validation_rows,
            overwrite=overwrite,
            force_unlock=force_unlock,
            dry_run=dry_run,
            verify=verify,
            console=console,
        )
    if not dry_run and is_supervised(settings.config.backend.name, observers):
        request = {
            "config": settings.config.model_dump(mode="json"),
            "origins": dict(settings.origins),
            "rows": rows,
            "validation_rows": validation_rows,
            "overwrite": overwrite,
            "force_unlock": force_unlock,
            "verify": verify,
        }
        return run_in_child("train", request, Path(settings.config.output_dir), console)
    return run_new(
        settings,
        rows,
        observers,
        validation_rows=validation_rows,
        overwrite=overwrite,
        force_unlock=force_unlock,
        dry_run=dry_run,
        verify=verify,
        console=console,
    )


@refused_paths_told()
def resume(
    run_dir: str | Path,
    *,
    backend: str | None = None,
    transfer: bool = False,
    model: str | Path | None = None,
    data: str | Path | None = None,
    validation_data: str | Path | None = None,
    observers: Sequence[object] = (),
    force_unlock: bool = False,
    verify: bool = False,
    trust_remote_code: bool = False,
    devices: int | str | None = None,
    max_restarts: int = 0,
    console: RunConsole | None = None,
) -> TrainResult:
    """Go on with a run from its newest valid checkpoint, exactly where the backend can (`docs/resume.md`).

    `backend` moves the run to another one: adapter, moments, schedule and data order go along. What would change the
    model or its optimizer (another weight format, 8-bit moments) is done only with `transfer`. `model`, `data` and
    `validation_data` say where these lie on this machine; they must be the same ones, and are remembered. `verify`
    hashes every byte of the model's files, and compares them where the run began with `verify`, as it then always does.
    `devices` may be another number than before: the steps stay the same. A base with Python code of its own needs
    `trust_remote_code` in each call: a run folder may be a stranger's.

    Raises CheckpointError when no checkpoint verifies, and the errors of `train`.
    """
    from qlora_hal.run.paths import PathOverrides, require_path
    from qlora_hal.run.start import run_resumed
    from qlora_hal.run.supervisor import is_supervised, run_in_child

    require_path("run_dir", run_dir)
    relocation = PathOverrides.of(model=model, data=data, validation_data=validation_data)
    if devices is not None or max_restarts:
        from qlora_hal.ranks.starting import require_usable, resume_on_devices

        require_usable(devices, max_restarts)
    if devices is not None:
        return resume_on_devices(
            Path(run_dir),
            relocation,
            observers,
            devices,
            max_restarts,
            backend=backend,
            transfer=transfer,
            force_unlock=force_unlock,
            verify=verify,
            trust_remote_code=trust_remote_code,
            console=console,
        )
    if is_supervised(backend or "auto", observers):
        request = {
            "run_dir": str(run_dir),
            "backend": backend,
            "transfer": transfer,
            "relocation": asdict(relocation),
            "force_unlock": force_unlock,
            "verify": verify,
            "trust_remote_code": trust_remote_code,
        }
        return run_in_child("resume", request, Path(run_dir), console)
    return run_resumed(
        Path(run_dir),
        backend=backend,
        transfer=transfer,
        relocation=relocation,
        observers=observers,
        force_unlock=force_unlock,
        verify=verify,
        trust_remote_code=trust_remote_code,
        console=console,
    )


@refused_paths_told()
def merge(
    target: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    base: BaseChoice = "auto",
    dtype: OutputDtype = "bfloat16",
    requantize: str | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    rows: str | Path | None = None,
    row_limit: int = 64,
    weight_format: str | None = None,
    double_quant: bool | None = None,
    backend: str = "auto",
    allow_base_mismatch: bool = False,
    trust_remote_code: bool = False,
    console: RunConsole | None = None,
) -> MergeResult:
    """Merge a run's adapter, or any adapter in PEFT layout, into its base: one model in 16 or 32 bits at `out`.

    The merged model's logits are compared with those of base and adapter, as they were trained, on held-out rows; a
    merge beyond the limits (`max_kl` nats per token, `min_top1` share of tokens; derived from rounding when not given)
    raises and leaves nothing. `base` "auto" merges into the dequantized and the original weights and keeps the closer.
    See docs/merge.md.

    Raises NumericsError QH-C21 (too far) and QH-C63 (not finite in `dtype`), AdapterError (QH-C61 no finished adapter,
    QH-C05, QH-C08, QH-C09), ConfigError (QH-C62, QH-C64), StorageError (QH-C60 `out` is taken, QH-S09 no space).
    """
    from qlora_hal.export import MergeRequest, carry_out
    from qlora_hal.report.console import RunConsole

    request = MergeRequest(
        target=Path(target),
        out=Path(out).expanduser(),
        model=None if model is None else str(model),
        base=base,
        dtype=dtype,
        requantize=requantize,
        max_kl=max_kl,
        min_top1=min_top1,
        rows=None if rows is None else str(rows),
        row_limit=row_limit,
        weight_format=weight_format,
        double_quant=double_quant,
        backend=backend,
        allow_base_mismatch=allow_base_mismatch,
        trust_remote_code=trust_remote_code,
    )
    return carry_out(request, console or RunConsole(quiet=True))


def backends() -> tuple[ProbeReport, ...]:
    """What each installed backend says of this machine, in milliseconds and without importing a tensor library."""
    from qlora_hal.detect.discovery import listed, reports

    return reports(listed())


@refused_paths_told()
def first_batch(settings: ResolvedSettings) -> tuple[Batch, ChatTokenizer, int]:
    """The first batch that `train` would see, and the seed it is drawn with; only a temporary folder is written to.

    Raises ConfigError QH-U12 where model or data are not named, and as `train` does of both.
    """
    import tempfile

    from qlora_hal.config.resolve import require_settings
    from qlora_hal.hooks import Hooks
    from qlora_hal.report.console import RunConsole
    from qlora_hal.run.prepare import drawn_seed, prepare_run, resolve_backend, window_sampler

    require_settings(settings.config, "model.name_or_path", *([] if settings.config.data.sources else ["data.path"]))
    console = RunConsole(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        resolved_backend = resolve_backend(settings.config, Hooks(), console)
        seed = drawn_seed(settings.config)
        prepared = prepare_run(settings.config, seed, resolved_backend, Path(folder), None, console)
        return window_sampler(prepared).window(0)[0], prepared.tokenizer, seed
