"""What observers of a run are shown, and what `train` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_hal.files.refused_paths import expanded
from qlora_hal.report.curves import LOSS_PICTURE
from qlora_hal.report.html import REPORT_FILE
from qlora_hal.report.metrics_table import MetricsTable
from qlora_hal.report.notebook import result_html
from qlora_hal.run.directory import ADAPTER_FOLDER, METRICS_FILE, RUN_FILE

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.report.run_file import RunRecord
    from qlora_hal.run.prepare import PreparedRun


@dataclass(frozen=True, slots=True)
class RunView:
    """The facts of a run that do not change while it trains.

    `resolved` is what `run.json` holds: backend, device, weight format, block size, compute dtype, versions.
    """

    run_dir: Path
    config: RunConfig
    resolved: Mapping[str, object]
    total_steps: int
    first_step: int = 0


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished (or stopped) run gives back.

    `losses` is (step, mean loss per counted token) for every step of this call; `stopped_because` is `finished`,
    `early stopping`, or the signal's name. `tokens` counts the whole run without padding, `tokens_per_second` only the
    training steps of this call. `plan` is what a dry run found out: steps, sequences, memory in bytes by cause.
    """

    backend: str
    device: str
    weight_format: str
    block_size: int | None
    run_dir: Path
    adapter_dir: Path
    steps: int
    tokens: int
    losses: tuple[tuple[int, float], ...] = field(repr=False)
    eval_loss_before: float | None
    eval_loss_after: float | None
    wall_seconds: float
    peak_memory_bytes: int | None
    stopped_because: str
    tokens_per_second: float | None = None
    notes: tuple[str, ...] = ()
    samples: tuple[Mapping[str, str], ...] = field(default=())
    plan: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def planned(cls, prepared: PreparedRun, plan: Mapping[str, object]) -> TrainResult:
        """Of a dry run: no step was taken."""
        stored, run_dir = prepared.resolved_backend.quantization, expanded(prepared.config.output_dir)
        return cls(
            backend=prepared.resolved_backend.choice.spec.name,
            device="",
            weight_format=stored.weight_format.value,
            block_size=stored.block_size,
            run_dir=run_dir,
            adapter_dir=run_dir / "adapter",
            steps=0,
            tokens=0,
            losses=(),
            eval_loss_before=None,
            eval_loss_after=None,
            wall_seconds=0.0,
            peak_memory_bytes=None,
            stopped_because="dry run",
            plan=plan,
        )

    @classmethod
    def from_record(cls, record: RunRecord, run_dir: Path, adapter_dir: Path) -> TrainResult:
        """Of a run that ended before, as run.json has it."""
        resolved, block_size = record.resolved, record.resolved.get("block_size")
        return cls(
            backend=str(resolved.get("backend")),
            device=str(resolved.get("device")),
            weight_format=str(resolved.get("weight_format")),
            block_size=block_size if isinstance(block_size, int) else None,
            run_dir=run_dir,
            adapter_dir=adapter_dir,
            steps=record.steps,
            tokens=record.tokens,
            losses=(),
            eval_loss_before=record.eval_loss_before,
            eval_loss_after=record.eval_loss_after,
            wall_seconds=record.timings.get("wall_seconds", 0.0),
            peak_memory_bytes=record.peak_memory_bytes,
            stopped_because=record.stopped_because,
            tokens_per_second=record.timings.get("tokens_per_second"),
            notes=record.notes,
            samples=record.samples,
        )

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> TrainResult:
        """Of a run in a child process; the opposite of `dataclasses.asdict` through JSON."""
        losses = tuple((int(step), float(loss)) for step, loss in told["losses"])
        paths = {name: Path(told[name]) for name in ("run_dir", "adapter_dir")}
        return cls(
            **{**told, **paths, "losses": losses, "notes": tuple(told["notes"]), "samples": tuple(told["samples"])}
        )

    @property
    def stopped_by_signal(self) -> bool:
        """Whether the run was told to stop and can go on; else it has ended, and its adapter is written."""
        return self.stopped_because.startswith("SIG")

    @property
    def metrics(self) -> MetricsTable:
        """What was logged of the whole run, earlier calls included: a row for each step. It is a list of dicts, with
        `columns()` and `to_pandas()`. Raises OSError."""
        return MetricsTable.of_run(self.run_dir / METRICS_FILE)

    @property
    def paths(self) -> dict[str, Path]:
        """What lies in the run's folder, by name: run, metrics, report, curve, adapter."""
        return written(self.run_dir)

    def _repr_html_(self) -> str:
        """Key figures and curve, for notebooks."""
        return result_html(self)


def written(run_dir: Path) -> dict[str, Path]:
    """What lies in the folder of a run of that which is shown at its end."""
    names = {
        "run": RUN_FILE,
        "metrics": METRICS_FILE,
        "report": REPORT_FILE,
        "curve": LOSS_PICTURE,
        "adapter": ADAPTER_FOLDER,
    }
    return {shown: run_dir / name for shown, name in names.items() if (run_dir / name).exists()}
