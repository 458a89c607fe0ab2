"""`train(..., devices=N)` and `resume(..., devices=N)`: from what the user named to ranks that carry it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal.checkpoint import latest_state
from qlora_hal.contract.world import World
from qlora_hal.errors import ConfigError, UnsupportedFeatureError
from qlora_hal.files.refused_paths import named_path
from qlora_hal.processes.signals import ended_by_signals
from qlora_hal.ranks.identity import world_here
from qlora_hal.ranks.launching import AUTO, chosen_for_ranks, number_of, run_by_ranks
from qlora_hal.ranks.window_share import accumulation_of
from qlora_hal.run.start import run_new, run_resumed

if TYPE_CHECKING:
    from qlora_hal.config.resolve import ResolvedSettings
    from qlora_hal.contract.backend import BackendSpec
    from qlora_hal.report.console import RunConsole
    from qlora_hal.run.paths import PathOverrides
    from qlora_hal.run.prepare import Rows
    from qlora_hal.run.result import TrainResult

MOST_RANKS = 4096


def train_on_devices(
    settings: ResolvedSettings,
    rows: Rows | None,
    observers: Sequence[object],
    devices: int | str,
    max_restarts: int,
    *,
    validation_rows: Rows | None = None,
    overwrite: bool,
    force_unlock: bool,
    dry_run: bool,
    verify: bool,
    console: RunConsole | None,
) -> TrainResult:
    """A new run by as many ranks; a dry run plans for them in this process. Raises ConfigError QH-R01, QH-R05 and
    UnsupportedFeatureError QH-R06 before any rank is started, and as `run_by_ranks`."""
    config = settings.config
    spec, report = chosen_for_ranks(config.backend.name, allow_cpu=config.backend.allow_cpu)
    ranks = number_of(devices, spec, report)
    accumulation_of(config.training, World(0, ranks))
    if dry_run or (ranks == 1 and not max_restarts):
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
            planned_ranks=ranks,
        )
    _refuse_observers(observers)
    _require_launcher(spec)
    request = {
        "config": config.model_dump(mode="json"),
        "origins": dict(settings.origins),
        "rows": rows,
        "validation_rows": validation_rows,
        "overwrite": overwrite,
        "force_unlock": force_unlock,
        "verify": verify,
    }
    with ended_by_signals():
        return run_by_ranks("train", request, named_path(config.output_dir), spec, ranks, max_restarts, console)


def resume_on_devices(
    run_dir: Path,
    relocation: PathOverrides,
    observers: Sequence[object],
    devices: int | str,
    max_restarts: int,
    *,
    backend: str | None,
    transfer: bool,
    force_unlock: bool,
    verify: bool,
    trust_remote_code: bool,
    console: RunConsole | None,
) -> TrainResult:
    """A run that goes on, by as many ranks. Raises as `train_on_devices`, and CheckpointError where none verifies."""
    name = backend or str(latest_state(run_dir)[0].provenance["backend"])
    spec, report = chosen_for_ranks(name, allow_cpu=True)
    ranks = number_of(devices, spec, report)
    given = {
        "backend": backend,
        "transfer": transfer,
        "force_unlock": force_unlock,
        "verify": verify,
        "trust_remote_code": trust_remote_code,
    }
    if ranks == 1 and not max_restarts:
        return run_resumed(run_dir, relocation=relocation, observers=observers, console=console, **given)  # type: ignore[arg-type]
    _refuse_observers(observers)
    _require_launcher(spec)
    request = {"run_dir": str(run_dir), "relocation": asdict(relocation), **given}
    with ended_by_signals():
        return run_by_ranks("resume", request, run_dir, spec, ranks, max_restarts, console)


def require_number(devices: int | str | None) -> None:
    """Raises ConfigError QH-R01 for what is no number of devices."""
    is_number = isinstance(devices, int) and not isinstance(devices, bool) and 1 <= devices <= MOST_RANKS
    if not is_number and devices not in (AUTO, None):
        raise ConfigError(
            "QH-R01",
            f"devices is {devices!r}; a number from 1 to {MOST_RANKS} or {AUTO!r} is expected.",
            where="--devices",
            fix="Give the number of devices, or auto for all that are there.",
        )


def require_usable(devices: int | str | None, max_restarts: int) -> None:
    """Raises ConfigError QH-R01 for what is no number of devices or restarts, or where this process is a rank
    already."""
    require_number(devices)
    if isinstance(max_restarts, bool) or not isinstance(max_restarts, int) or max_restarts < 0:
        raise ConfigError(
            "QH-R01",
            f"max_restarts is {max_restarts!r}; a number from 0 on is expected.",
            where="--max-restarts",
            fix="Give how often the ranks may be started anew.",
        )
    if devices is None:
        if max_restarts:
            raise ConfigError(
                "QH-R01",
                f"max_restarts is {max_restarts}, and no devices were asked for: nothing would start the run anew.",
                where="--max-restarts",
                fix="Add --devices, or leave --max-restarts out.",
            )
        return
    if (world := world_here()).size > 1:
        raise ConfigError(
            "QH-R01",
            f"--devices was given to rank {world.rank} of {world.size}: torchrun has started the ranks already.",
            where="--devices",
            fix="Leave --devices out under torchrun, or torchrun in front of --devices.",
        )


def _require_launcher(spec: BackendSpec) -> None:
    """One device with restarts is a rank as well. Raises UnsupportedFeatureError QH-R06."""
    if not spec.launcher:
        raise UnsupportedFeatureError(
            "QH-R06",
            f"Backend {spec.name} starts no ranks, so nothing would start the run anew.",
            where="--max-restarts",
            fix="Leave --max-restarts out, and resume the run where it fails.",
        )


def _refuse_observers(observers: Sequence[object]) -> None:
    if observers:
        raise UnsupportedFeatureError(
            "QH-R06",
            f"{len(observers)} observers are Python objects of this process; the ranks are processes of their own.",
            where="observers",
            fix="Install them as a plugin (entry point qlora_hal.hooks), or start the ranks with torchrun.",
        )
