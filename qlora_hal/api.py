"""`train`, `resume`, `merge`, `push`, `load` and `backends`: the whole story in one page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Unpack

from qlora_hal.config.keywords import SettingsByKeyword, is_settings_of_data, with_named_settings
from qlora_hal.files.refused_paths import expanded, refused_paths_told, require_paths_given

if TYPE_CHECKING:
    from qlora_hal.config.resolve import ResolvedSettings
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.backend import ProbeReport
    from qlora_hal.contract.values import Batch
    from qlora_hal.data import ChatTokenizer
    from qlora_hal.export.publishing import PushResult
    from qlora_hal.export.request import BaseChoice, MergeResult, OutputDtype
    from qlora_hal.inference.loaded_model import LoadedModel
    from qlora_hal.report.console import RunConsole
    from qlora_hal.run.measured import Metric
    from qlora_hal.run.result import TrainResult

    Configuration: TypeAlias = ResolvedSettings | RunConfig | Mapping[str, object] | str | Path

Rows = Iterable[Mapping[str, object]]


@refused_paths_told()
@with_named_settings
def train(
    model_or_config: Configuration | None = None,
    /,
    data: str | Path | Rows | Mapping[str, object] | None = None,
    *,
    validation_data: str | Path | Rows | None = None,
    model: str | Path | Mapping[str, object] | None = None,
    config: Configuration | None = None,
    output_dir: str | Path | None = None,
    backend: str | Mapping[str, object] = "auto",
    observers: Sequence[object] = (),
    metrics: Mapping[str, Metric] | None = None,
    overwrite: bool = False,
    force_unlock: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    devices: int | str | None = None,
    max_restarts: int = 0,
    quiet: bool = False,
    console: RunConsole | None = None,
    **settings: Unpack[SettingsByKeyword],
) -> TrainResult:
    """Fine-tune a quantized model with LoRA; the same call on every backend.

        train("meta-llama/Llama-3.1-8B", "chats.jsonl", output_dir="runs/a", learning_rate=1e-4, r=32)
        train("run.yaml", max_steps=100)

    The first argument is a configuration where it is a mapping, a `RunConfig`, or a file (.yaml, .yml, .toml, .json);
    any other text or path is the model. `config=` and `model=` say which is meant. `data` and `validation_data` may be
    rows in memory: a list or generator of mappings, a frame of pandas or Polars, a dict of columns, a data set; of a
    DatasetDict the split train is trained on and validation evaluated on. Settings are keywords: the common ones by
    their own names, all of them by group, `training={"adam_beta2": 0.95}`, `data={"packing": True}`; they win over the
    configuration.

    `dry_run` stops before the model loads, leaves nothing behind, and says in the result's `plan` what would run. The
    adapter is written to `<output_dir>/adapter` in PEFT layout. `overwrite` replaces an earlier run there;
    `force_unlock` takes a lock whose owner on another host has ended. `verify` hashes every byte of the model's files,
    and has each resume compare them. `devices`, a number or "auto", starts as many ranks on this machine, which compute
    one step together (`docs/many_devices.md`); when one fails they are started anew from the last checkpoint,
    `max_restarts` times.

    `observers` watch and steer the run (`docs/python.md`); `metrics` are functions that judge the model at each
    evaluation, given a `LoadedModel`. All messages also go to the logger `qlora_hal`; `quiet` shows nothing beside it.

    Raises the errors of `qlora_hal.errors`; whatever can be found wrong before the model loads is found there.
    """
    from qlora_hal.config.resolve import resolve_settings
    from qlora_hal.data.source.in_memory import rows_in_memory, splits_in_memory
    from qlora_hal.report.notebook import console_here
    from qlora_hal.run.measured import observers_with
    from qlora_hal.run.start import run_new
    from qlora_hal.run.supervisor import is_supervised, run_in_child

    config, model = _told_apart(model_or_config, config, model)
    given, split = (None, None) if _is_named(data) else splits_in_memory(data)
    held_out = _held_out(validation_data, split, settings)
    rows = None if given is None else rows_in_memory(given)
    validation_rows = None if held_out is None or isinstance(held_out, str | Path) else rows_in_memory(held_out)
    named = data if rows is None else None
    keywords: dict[str, object] = {"model": model, "data": named, "output_dir": output_dir, "backend": backend}
    if held_out is not None and validation_rows is None:
        keywords["data.validation_path"] = held_out
    settings_here = resolve_settings(config, keywords={**keywords, **settings})
    observers = observers_with(metrics, observers)
    console = console_here(console, quiet=quiet)
    if devices is not None or max_restarts:
        from qlora_hal.ranks.starting import require_usable, train_on_devices

        require_usable(devices, max_restarts)
    if devices is not None:
        return train_on_devices(
            settings_here,
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
    if not dry_run and is_supervised(settings_here.config.backend.name, observers):
        request = {
            "config": settings_here.config.model_dump(mode="json"),
            "origins": dict(settings_here.origins),
            "rows": rows,
            "validation_rows": validation_rows,
            "overwrite": overwrite,
            "force_unlock": force_unlock,
            "verify": verify,
        }
        return run_in_child("train", request, Path(settings_here.config.output_dir), console)
    return run_new(
        settings_here,
        rows,
        observers,
        validation_rows=validation_rows,
        overwrite=overwrite,
        force_unlock=force_unlock,
        dry_run=dry_run,
        verify=verify,
        console=console,
    )


def _is_named(data: object) -> bool:
    """Whether `data` says where rows are, or is settings, and holds none itself."""
    return data is None or isinstance(data, str | Path) or is_settings_of_data(data)


def _held_out(validation_data: object, split: object, settings: Mapping[str, object]) -> object:
    """What the call itself evaluates on, None where the configuration says. Raises ConfigError QH-U40 where it is
    named twice."""
    named = {
        "validation_data": validation_data,
        "validation_path": settings.get("validation_path"),
        "the validation split of data": split,
    }
    given = [name for name, rows in named.items() if rows is not None]
    if len(given) > 1:
        from qlora_hal.errors import ConfigError

        raise ConfigError(
            "QH-U40",
            f"train was given two of the same: {' and '.join(given)} are both rows to evaluate on.",
            where=given[0],
            fix="Leave out all but one.",
        )
    return validation_data if validation_data is not None else split


def _told_apart(
    first: Configuration | None, config: Configuration | None, model: str | Path | Mapping[str, object] | None
) -> tuple[Configuration | None, str | Path | Mapping[str, object] | None]:
    """(configuration, model) of a call. Raises ConfigError QH-U40 where one of them is given twice."""
    from qlora_hal.config.files import is_settings_file
    from qlora_hal.errors import ConfigError

    if first is None:
        return config, model
    is_model = isinstance(first, str | Path) and not is_settings_file(first)
    if (model if is_model else config) is not None:
        kind = "model" if is_model else "config"
        raise ConfigError(
            "QH-U40",
            f"train was given two of the same: the first argument {first!r} is taken as the {kind}, and {kind}= is "
            "there as well.",
            where=f"{kind}=",
            cause="The first argument is a configuration where it is a mapping, a RunConfig, or a file ending in "
            ".yaml, .yml, .toml or .json; else it is the model.",
            fix="Name both: train(config=..., model=...).",
        )
    if is_model:
        return config, first  # type: ignore[return-value]
    return first, model


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
    metrics: Mapping[str, Metric] | None = None,
    force_unlock: bool = False,
    verify: bool = False,
    trust_remote_code: bool = False,
    devices: int | str | None = None,
    max_restarts: int = 0,
    quiet: bool = False,
    console: RunConsole | None = None,
) -> TrainResult:
    """Go on with a run from its newest valid checkpoint, exactly where the backend can (`docs/resume.md`).

    `backend` moves the run to another one: adapter, moments, schedule and data order go along. What would change the
    model or its optimizer (another weight format, 8-bit moments) is done only with `transfer`. `model`, `data` and
    `validation_data` say where these lie on this machine; they must be the same ones, and are remembered. `verify`
    hashes every byte of the model's files, and compares them where the run began with `verify`, as it then always does.
    `devices` may be another number than before: the steps stay the same. A base with Python code of its own needs
    `trust_remote_code` in each call: a run folder may be a stranger's. `observers`, `metrics` and `quiet` are as in
    `train`; what an observer had asked for before is part of the state, the observers themselves are given again.

    Raises CheckpointError when no checkpoint verifies, and the errors of `train`.
    """
    from qlora_hal.report.notebook import console_here
    from qlora_hal.run.measured import observers_with
    from qlora_hal.run.paths import PathOverrides
    from qlora_hal.run.start import run_resumed
    from qlora_hal.run.supervisor import is_supervised, run_in_child

    require_paths_given({"run_dir": run_dir})
    observers = observers_with(metrics, observers)
    console = console_here(console, quiet=quiet)
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
    quiet: bool = False,
    console: RunConsole | None = None,
) -> MergeResult:
    """Merge a run's adapter, or any adapter in PEFT layout, into its base: one model in 16 or 32 bits at `out`.

    The merged model's logits are compared with those of base and adapter, as they were trained, on held-out rows; a
    merge beyond the limits (`max_kl` nats per token, `min_top1` share of tokens; derived from rounding when not given)
    raises and leaves nothing. `base` "auto" merges into the dequantized and the original weights and keeps the closer.
    See docs/merge.md. `quiet` as in `train`.

    Raises NumericsError QH-C21 (too far) and QH-C63 (not finite in `dtype`), AdapterError (QH-C61 no finished adapter,
    QH-C05, QH-C08, QH-C09), ConfigError (QH-C62, QH-C64), StorageError (QH-C60 `out` is taken, QH-S09 no space).
    """
    from qlora_hal.export import MergeRequest, carry_out
    from qlora_hal.report.notebook import console_here

    require_paths_given({"target": target, "out": out}, {"model": model, "rows": rows})
    request = MergeRequest(
        target=Path(target),
        out=expanded(out),
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
    return carry_out(request, console_here(console, quiet=quiet))


@refused_paths_told()
def push(
    run: str | Path,
    repository: str,
    *,
    merged: str | Path | None = None,
    base_model: str | None = None,
    certificate: str | Path | None = None,
    private: bool = False,
    exist_ok: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    console: RunConsole | None = None,
) -> PushResult:
    """Upload a finished run's adapter, or the model `merged` from it, to `owner/name` on the Hugging Face hub.

    One commit: the files that open it, without places or secrets of this machine, and a model card with data,
    settings, losses, versions and what `conformance.json` beside the run says. `certificate` is verified, and named on
    the card. `base_model` names the base on the hub where a folder was trained on. A repository that exists is added
    to only with `exist_ok`; nothing on the hub is deleted. `dry_run` asks nothing of the hub. See docs/publish.md.

    Raises HubError (QH-E23 not logged in, QH-E24 no right to write, QH-E25 it exists, QH-E26 not gone through),
    ConfigError (QH-U21 no `owner/name`, QH-S50, QH-B51, QH-B54), AdapterError (QH-C61 no finished adapter,
    QH-C22, QH-C81).
    """
    from qlora_hal.export.publishing import PushRequest, publish
    from qlora_hal.report.notebook import console_here
    from qlora_hal_conformance import certificate as suite

    require_paths_given({"run": run}, {"merged": merged, "certificate": certificate})
    request = PushRequest(
        run=Path(run),
        repository=repository,
        merged=None if merged is None else Path(merged),
        base_model=base_model,
        certificate=None if certificate is None else Path(certificate),
        private=private,
        exist_ok=exist_ok,
        dry_run=dry_run,
    )
    return publish(request, console_here(console, quiet=quiet), suite)


@refused_paths_told()
def load(
    target: str | Path,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    weight_format: str | None = None,
    backend: str = "auto",
    allow_base_mismatch: bool = False,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> LoadedModel:
    """Open a model for questions: a run, an adapter, a merged folder, or any base by its folder or hub id.

        with qlora_hal.load("runs/a") as model:
            model.generate("What does tail do?", max_new_tokens=64)

    The base of a run or adapter is opened as it was stored in training (`model` says where it lies now); any other
    model is opened as its files have it, or in `weight_format`. `backend` auto is the one that trained, where it is
    here. Notes are shown and logged; `quiet` only logs them.

    Raises ConfigError (QH-U14, QH-U42), AdapterError QH-C61, QH-C05, QH-C08, ModelError, and what selection raises.
    """
    from qlora_hal.inference.generate import open_any
    from qlora_hal.report.console import RunConsole

    require_paths_given({"target": target}, {"model": model})
    return open_any(
        target,
        model=None if model is None else str(model),
        revision=revision,
        weight_format=weight_format,
        backend=backend,
        allow_base_mismatch=allow_base_mismatch,
        trust_remote_code=trust_remote_code,
        console=RunConsole(quiet=True, silent=quiet),
    )


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
