"""`qlora-hal train`: settings from file and flags, then one call of the API."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from qlora_hal.cli.arguments import DevicesOption, RestartsOption, Switch, as_devices
from qlora_hal.cli.flags import with_settings
from qlora_hal.cli.settings import resolved, settings_as_json, settings_as_text
from qlora_hal.config.resolve import ResolvedSettings
from qlora_hal.errors import ConfigError, UnsupportedFeatureError
from qlora_hal.errors.terminal_text import json_line, show, show_json

if TYPE_CHECKING:
    from qlora_hal.run.result import TrainResult


@with_settings()
def train(
    config: Annotated[Path | None, Parameter(help="Settings file: YAML, TOML or JSON.")] = None,
    /,
    *,
    demo: Annotated[
        bool, Switch, Parameter(help="Train the small model that comes with the package, on the CPU.")
    ] = False,
    smoke: Annotated[
        bool, Switch, Parameter(help="Three steps, save, resume, generate: does everything work here?")
    ] = False,
    dry_run: Annotated[
        bool,
        Switch,
        Parameter(help="Check settings, backend, data and memory, print the plan and stop; nothing is written."),
    ] = False,
    print_config: Annotated[bool, Switch, Parameter(help="Print every setting with its origin and stop.")] = False,
    show_batch: Annotated[
        bool, Switch, Parameter(help="Print one batch with the trained tokens marked and stop.")
    ] = False,
    overwrite: Annotated[bool, Switch, Parameter(help="Replace an earlier run in output_dir.")] = False,
    force_unlock: Annotated[
        bool, Switch, Parameter(help="Take over the lock of a run on another host that has ended.")
    ] = False,
    verify: Annotated[
        bool, Switch, Parameter(help="Hash every byte of the model's files, and compare them at each resume.")
    ] = False,
    devices: DevicesOption = None,
    max_restarts: RestartsOption = 0,
    quiet: Annotated[bool, Switch, Parameter(help="Print only notes and errors.")] = False,
    json: Annotated[bool, Switch, Parameter(help="Print the result as JSON.")] = False,
    flags: Mapping[str, object],
) -> int:
    """Train an adapter: qlora-hal train run.yaml, or qlora-hal train --model M --data D --output_dir O."""
    _refuse_several_ends(
        {"--print-config": print_config, "--show-batch": show_batch, "--smoke": smoke, "--dry-run": dry_run}
    )
    settings = resolved(config, flags, demo=demo)
    if (devices is not None or max_restarts) and (print_config or show_batch or smoke):
        raise nothing_for_devices("--print-config" if print_config else "--show-batch" if show_batch else "--smoke")
    if print_config:
        show(settings_as_json(settings) if json else settings_as_text(settings))
        return 0
    if show_batch:
        print(batch_as_json(settings) if json else batch_as_text(settings))  # colored; its texts are made visible
        return 0
    if smoke:
        from qlora_hal.cli.smoke import run_smoke

        return run_smoke(
            settings, json=json, quiet=quiet, overwrite=overwrite, force_unlock=force_unlock, verify=verify
        )
    from qlora_hal import api
    from qlora_hal.cli.json_output import kept_for_json
    from qlora_hal.report.console import RunConsole

    console = RunConsole(quiet=quiet, json=json)
    with kept_for_json(json):
        result = api.train(
            settings,
            overwrite=overwrite,
            force_unlock=force_unlock,
            dry_run=dry_run,
            verify=verify,
            devices=as_devices(devices),
            max_restarts=max_restarts,
            console=console,
        )
    if json:
        show_json(result_as_json(result))
    elif dry_run:
        show(plan_as_text(result))
    return 0


def _refuse_several_ends(asked: Mapping[str, bool]) -> None:
    """Each of these flags does something other than to train. Raises ConfigError QH-U04 for two of them: one would be
    passed over, and --dry-run promises that nothing is written."""
    given = [flag for flag, is_given in asked.items() if is_given]
    if len(given) > 1:
        raise ConfigError(
            "QH-U04",
            f"{' and '.join(given)} are mutually exclusive: each does something else in the place of the run.",
            where="command line",
            fix="Give one of them at a time.",
        )


def nothing_for_devices(flag: str) -> UnsupportedFeatureError:
    """Several devices and a command that trains on none, or on one."""
    return UnsupportedFeatureError(
        "QH-R06",
        f"{flag} does nothing on several devices.",
        where="--devices",
        fix=f"Leave out --devices and --max-restarts, or {flag}.",
    )


def batch_as_text(settings: ResolvedSettings) -> str:
    """The first batch as tokens, trained ones marked; coloured on a terminal."""
    from qlora_hal import api
    from qlora_hal.data.preview import show_batch
    from qlora_hal.report.console import wants_color

    batch, tokenizer, seed = api.first_batch(settings)
    shown = str(show_batch(batch, tokenizer, color=wants_color(sys.stdout)))
    drawn = " was drawn; set training.seed to get this batch again" if settings.config.training.seed is None else ""
    return f"seed {seed}{drawn}\n{shown}"


def batch_as_json(settings: ResolvedSettings) -> str:
    """`{"seed": drawn or set, "sequences": one for each sample of the first batch}`."""
    from qlora_hal import api
    from qlora_hal.data import preview as batch_show

    batch, tokenizer, seed = api.first_batch(settings)
    return json_line({"seed": seed, "sequences": batch_show.batch_as_json(batch, tokenizer)})


def plan_as_text(result: TrainResult) -> str:
    """What a dry run found: one line for the work, one for the base, and the memory by cause."""
    from qlora_hal.cli.estimate_text import memory_lines

    plan: Mapping[str, Any] = result.plan
    block = f" in blocks of {result.block_size}" if result.block_size else ""
    in_fp8 = ", products with the base in fp8" if plan["fp8_products"] else ""
    several = f" on {plan['devices']} devices ({plan['mode']}: {plan['why']})" if plan["devices"] > 1 else ""
    return "\n".join(
        [
            f"plan: {plan['steps']} step{'' if plan['steps'] == 1 else 's'} of {plan['sequences_per_step']} sequences, "
            f"from {plan['sequences']}, on {result.backend}{several}; nothing was written",
            f"base: {result.weight_format}{block}, computes in {plan['compute_dtype']}{in_fp8}; "
            f"adapters on {plan['target_modules']} modules",
            "estimated memory of each device:" if several else "estimated memory:",
            *memory_lines(plan["memory"]),
        ]
    )


def result_as_json(result: TrainResult) -> dict[str, object]:
    """The result without the loss of every step, which metrics.jsonl has; null for what is not finite."""
    facts: dict[str, object] = {
        "backend": result.backend,
        "device": result.device,
        "weight_format": result.weight_format,
        "block_size": result.block_size,
        "run_dir": str(result.run_dir),
        "adapter_dir": str(result.adapter_dir),
        "steps": result.steps,
        "tokens": result.tokens,
        "first_loss": result.losses[0][1] if result.losses else None,
        "last_loss": result.losses[-1][1] if result.losses else None,
        "eval_loss_before": result.eval_loss_before,
        "eval_loss_after": result.eval_loss_after,
        "wall_seconds": result.wall_seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "stopped_because": result.stopped_because,
        "notes": list(result.notes),
        "samples": [dict(sample) for sample in result.samples],
        **({"plan": dict(result.plan)} if result.plan else {}),
    }
    return {name: None if isinstance(fact, float) and not isfinite(fact) else fact for name, fact in facts.items()}
