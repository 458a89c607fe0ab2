"""`qlora-hal advise`: which settings for this model, these rows and this memory, each with its reason and source."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qlora_hal.cli.arguments import Switch
from qlora_hal.cli.flags import with_settings
from qlora_hal.config.sizes import size_in_bytes
from qlora_hal.errors import ConfigError, figures
from qlora_hal.errors.terminal_text import show, show_json

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.backend import BackendSpec, ProbeReport
    from qlora_hal.memory.advice import Plan, RowFacts, Situation
    from qlora_hal.model.source import ModelSource
    from qlora_hal.run.planned_memory import PlannedModel

_LONGEST = 2**24
"""Tokens of a row that are counted where a model's headers name no limit."""


@with_settings(only=("model", "data", "backend"))
def advise(
    *,
    memory: Annotated[
        str | None, Parameter(help="Memory of one device, as 24GB; default: that of this machine.")
    ] = None,
    json: Annotated[bool, Switch, Parameter(help="Print as JSON.")] = False,
    flags: Mapping[str, object],
) -> int:
    """Advise on a run: qlora-hal advise --model M --data D --memory 24GB. Nothing is trained and nothing written."""
    from qlora_hal.config.resolve import require_settings, resolve_settings
    from qlora_hal.memory.advice import advise as rules

    config = resolve_settings(None, flags=flags).config
    require_settings(config, "model.name_or_path")
    given_length = config.data.max_seq_length if "data.max_seq_length" in flags else None
    situation = _situation(config, None if memory is None else memory_bytes(memory), given_length)
    plan = rules(situation)
    if json:
        show_json(plan_as_json(plan, situation))
    else:
        show(plan_as_text(plan, situation, flags))
    return 0


def memory_bytes(text: str) -> int:
    """`24GB`, `24 GiB`, `80` (GB). Raises ConfigError QH-U01."""
    size = size_in_bytes(text)
    if size is None:
        raise ConfigError(
            "QH-U01",
            f"--memory is {text!r}; a size such as 24GB is expected.",
            where="command line --memory",
            fix="Give the memory of one device: --memory 24GB",
        )
    return size


def _situation(config: RunConfig, memory: int | None, given_length: int | None) -> Situation:
    from qlora_hal.data.prepare import refuse_long_sequences
    from qlora_hal.memory.advice import Situation
    from qlora_hal.memory.estimate import adapter_parameters
    from qlora_hal.memory.fitting import Room
    from qlora_hal.model.source import plan_model
    from qlora_hal.ranks.planning import can_spread
    from qlora_hal.run.card_table import least_costly_step

    model = config.model
    source = plan_model(
        model.name_or_path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        config_is_enough=not (config.data.path or config.data.sources),
    )
    facts = source.facts
    if given_length is not None:
        refuse_long_sequences(config.data, facts.max_position_embeddings)
    planned = _planned(config, source, memory)
    room = Room(_memory_of(planned), planned.host_room)
    targets = planned.targets_of(facts)
    return Situation(
        backend=planned.spec.name,
        memory_bytes=room.device,
        parameters=facts.parameter_count,
        stored=facts.prequantized.weight_format if facts.prequantized else "",
        rows=_row_facts(config, source, given_length) if config.data.path or config.data.sources else None,
        positions=facts.max_position_embeddings,
        given_length=given_length,
        spreads=can_spread(planned.spec),
        peak=lambda settings: planned.estimate(settings).high,
        least_costly=lambda settings: least_costly_step(planned.with_settings(settings), room),
        adapter_parameters=lambda rank: adapter_parameters(targets, rank),
    )


def _planned(config: RunConfig, source: ModelSource, memory: int | None) -> PlannedModel:
    """On the device that is here, or on one of so much memory."""
    from qlora_hal.detect.discovery import listed, reports
    from qlora_hal.run.planned_memory import PlannedModel

    probed = reports(listed())
    spec = _backend(config, source, probed, on_this_machine=memory is None)
    here = next(report for report in probed if report.backend == spec.name)
    planned = PlannedModel(config, source.facts, source.path, spec, here, here if here.ready else None, memory)
    return planned.on_this_machine() if memory is None else planned


def _memory_of(planned: PlannedModel) -> int:
    if planned.memory_bytes is None:
        raise ConfigError(
            "QH-U82",
            f"The device that {planned.spec.name} would train on does not tell how much memory it has.",
            where="command line --memory",
            fix="Give the memory of one device: --memory 24GB",
        )
    return planned.memory_bytes


def _backend(
    config: RunConfig, source: ModelSource, probed: tuple[ProbeReport, ...], *, on_this_machine: bool
) -> BackendSpec:
    """The named backend; else of those that support the model the first by priority, of this machine where the memory
    is its own."""
    from qlora_hal.detect.discovery import listed
    from qlora_hal.detect.requirements import requirements_of
    from qlora_hal.detect.selection import choose
    from qlora_hal.run.planned_memory import backend_for

    if on_this_machine:
        needs = requirements_of(config, source.facts)
        return choose(config.backend.name, needs, listed(), probed, allow_cpu=True).spec
    return backend_for(config, source.facts)


def _row_facts(config: RunConfig, source: ModelSource, given_length: int | None) -> RowFacts:
    """The rows as tokens, in a temporary folder. Raises as `prepare` does."""
    from qlora_hal.data.prepare import prepare
    from qlora_hal.data.tokens.tokenizer import ChatTokenizer
    from qlora_hal.memory.advice import RowFacts

    facts = source.facts
    size = facts.vocabulary_size or None
    tokenizer = ChatTokenizer.from_folder(
        source.path, chat_template=config.data.chat_template, model_vocabulary_size=size
    )
    # Counted as far as the model can read: what is advised is the length of the rows, not the default one.
    length = min(facts.max_position_embeddings or _LONGEST, given_length or _LONGEST)
    data = config.data.model_copy(update={"max_seq_length": length})
    with tempfile.TemporaryDirectory() as folder:
        report = prepare(data, tokenizer, cache_dir=Path(folder), seed=0, model_vocabulary_size=size).report.train
    return RowFacts(report.rows_used, report.trained_tokens, max(report.length_percentiles.values()))


def plan_as_text(plan: Plan, situation: Situation, flags: Mapping[str, object]) -> str:
    """Each line of advice with why and source, the peak, and what to paste."""
    lines = [f"for {situation.backend} with {figures.size(situation.memory_bytes)}:"]
    for item in plan.advice:
        lines += ["", f"{item.subject}: {item.choice}", f"  why:    {item.why}", f"  source: {item.source}"]
    verdict = "fits" if plan.fits else "does not fit"
    lines += [
        "",
        f"peak: up to {figures.size(plan.peak)} of {figures.size(situation.memory_bytes)}, which {verdict}",
        "",
    ]
    lines += ["in run.yaml:", *_as_yaml(plan.settings), "", "or on the command line:", f"  {_as_command(plan, flags)}"]
    return "\n".join(lines)


def _as_yaml(settings: Mapping[str, object]) -> list[str]:
    from qlora_hal.config.resolve import nest

    lines = []
    for group, values in nest(settings).items():
        lines.append(f"  {group}:")
        lines += (
            [f"    {name}: {_written(value)}" for name, value in values.items()] if isinstance(values, dict) else []
        )
    return lines


def _as_command(plan: Plan, flags: Mapping[str, object]) -> str:
    given = {path: value for path, value in flags.items() if path not in plan.settings}
    words = [f"--{path} {shlex.quote(_typed(value))}" for path, value in {**given, **plan.settings}.items()]
    return " ".join(["qlora-hal train", *words, "--output_dir runs/first"])


def _typed(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else _written(value)


def _written(value: object) -> str:
    if isinstance(value, Mapping | list | tuple):
        return dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def plan_as_json(plan: Plan, situation: Situation) -> dict[str, object]:
    return {
        "backend": situation.backend,
        "memory_bytes": situation.memory_bytes,
        "advice": [
            {"subject": item.subject, "choice": item.choice, "why": item.why, "source": item.source}
            for item in plan.advice
        ],
        "settings": plan.settings,
        "peak_bytes": plan.peak,
        "fits": plan.fits,
    }
