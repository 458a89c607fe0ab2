"""Everything before weights are read: model facts, backend, target modules, data, memory. Fails early."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_hal.adapter.targets import (
    require_experts_served,
    require_no_dropout_on_experts,
    require_rank,
    resolve_targets,
)
from qlora_hal.contract.backend import ModelOutline, ProbeReport, Quantization
from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.values import AdapterConfig, MemoryEstimate
from qlora_hal.contract.world import World
from qlora_hal.data import ChatTokenizer, prepare
from qlora_hal.data.source.sampling import WindowSampler
from qlora_hal.detect import discovery
from qlora_hal.detect.device_memory import refuse_absent_dtype
from qlora_hal.detect.discovery import reports
from qlora_hal.detect.requirements import quantization_of, requirements_of, unmet_description_note
from qlora_hal.detect.selection import Choice, choose, refuse_unready
from qlora_hal.errors import ConfigError, figures
from qlora_hal.formats.catalogue import record_of
from qlora_hal.memory.fitting import Taken, cost, halves
from qlora_hal.memory.placement import NONE, OFFLOAD, SELECTIVE, Placement
from qlora_hal.model.source import is_on_hub, plan_model, with_weights
from qlora_hal.ranks.planning import SHARD
from qlora_hal.ranks.window_share import accumulation_of
from qlora_hal.run.planned_memory import PlannedModel
from qlora_hal.run.samples import room_for_an_answer

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.data import PreparedData
    from qlora_hal.hooks import Hooks
    from qlora_hal.model.source import ModelSource
    from qlora_hal.report.console import RunConsole

Rows = Sequence[Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class ResolvedBackend:
    """Which backend will run which base; known before any data is read."""

    source: ModelSource
    choice: Choice
    reports: tuple[ProbeReport, ...]
    quantization: Quantization
    adapter: AdapterConfig
    outline: ModelOutline

    @property
    def report(self) -> ProbeReport:
        """What the chosen backend's probe found."""
        return next(report for report in self.reports if report.backend == self.choice.spec.name)


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run that is ready to load its model. `model_hashes` are those of its files, where they were verified;
    `accumulation` is how many micro-batches of a step each rank of `world` has, and `micro_batch_splits` how often each
    is halved from the start, so that the plan keeps to `training.memory_limit`. The ranks share the base by `mode`, and
    the `estimate` is of each of them."""

    config: RunConfig
    seed: int
    resolved_backend: ResolvedBackend
    tokenizer: ChatTokenizer
    data: PreparedData
    estimate: MemoryEstimate
    placement: Placement = field(default_factory=Placement)
    mode: str = ""
    why_mode: str = ""
    model_hashes: Mapping[str, str] = field(default_factory=dict)
    world: World = field(default_factory=World)
    accumulation: int = 1
    micro_batch_splits: int = 0

    @property
    def settled_config(self) -> RunConfig:
        """The configuration with what `auto` became of recomputation and of the base's place."""
        again, choice = self.placement.recompute != NONE, self.placement.recompute in (SELECTIVE, OFFLOAD)
        changes = {
            "gradient_checkpointing": again,
            "recompute": self.placement.recompute if choice else None,
            "base_offload": self.placement.base_offload,
        }
        return self.config.model_copy(update={"training": self.config.training.model_copy(update=changes)})

    @property
    def sequences_per_step(self) -> int:
        """Of all ranks together."""
        return self.config.training.per_device_train_batch_size * self.accumulation * self.world.size


def drawn_seed(config: RunConfig) -> int:
    """The seed of the run; one is drawn where none is set (31 bits, easy to retype)."""
    return config.training.seed if config.training.seed is not None else secrets.randbits(31)


def resolve_backend(config: RunConfig, hooks: Hooks, console: RunConsole) -> ResolvedBackend:
    """Model facts, then needs, then the backend, then what of it is trained. Of a hub model no weight is fetched."""
    entries = discovery.listed(hooks.offered_backends())
    probed = reports(entries)
    if is_on_hub(config.model.name_or_path) and not hooks.chooses_backend:
        refuse_unready(config.backend.name, entries, probed, allow_cpu=config.backend.allow_cpu)
    source = plan_model(
        config.model.name_or_path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
    )
    needs = requirements_of(config, source.facts)
    choice = choose(
        config.backend.name,
        needs,
        entries,
        probed,
        allow_cpu=config.backend.allow_cpu,
        ask_hook=hooks.chosen_backend,
    )
    console.detection(choice.spec.name, choice.reason, probed, choice.rejections)
    check_options(config, choice)
    refuse_absent_dtype(
        config.quantization.compute_dtype,
        choice.spec,
        next(report for report in probed if report.backend == choice.spec.name),
    )
    for note in filter(None, map(choice.spec.notes.get, (config.training.optim, config.quantization.compute_dtype))):
        console.note(f"{choice.spec.name}: {note}")
    quantization = quantization_of(config, source.facts, choice.spec.capabilities)
    outline = discovery.outline_of(choice.spec, source, config.backend.options)
    require_experts_served(config.lora.experts, source.facts.linear_modules, outline.linear_modules, choice.spec.name)
    _require_whole_blocks(source, quantization, outline)
    targets = resolve_targets(config.lora.target_modules, outline.linear_modules, config.lora.experts)
    require_rank(config.lora.r, [outline.linear_modules[name] for name in targets])
    require_no_dropout_on_experts(config.lora.dropout, [outline.linear_modules[name] for name in targets])
    lora = config.lora
    adapter = AdapterConfig(lora.r, lora.alpha, lora.dropout, lora.use_rslora, targets)
    return ResolvedBackend(source, choice, probed, quantization, adapter, outline)


def _require_whole_blocks(source: ModelSource, quantization: Quantization, outline: ModelOutline) -> None:
    """Raises ModelError QH-M53 for a layer that the format cannot hold, which the backend would find while it packs."""
    record = record_of(quantization.weight_format)
    if source.facts.prequantized is not None or record.calibrated:
        return
    for name, shape in outline.linear_modules.items():
        record.require_whole_blocks(name, shape.inputs, quantization.block_size, source.name)


def with_fetched_weights(prepared: PreparedRun, console: RunConsole) -> PreparedRun:
    """The run with its base on this disk, and a line before and after what was fetched. Raises as `with_weights`."""
    resolved_backend = prepared.resolved_backend
    remote = resolved_backend.source.remote
    if remote is None:
        return prepared
    started = time.perf_counter()
    size = figures.size(remote.missing_bytes)
    console.fetching(f"{size} of weights from the hub, in {len(remote.files)} files")
    source = with_weights(resolved_backend.source, progress=console.is_watched)
    console.fetching(f"done in {figures.duration(time.perf_counter() - started)}")
    return replace(prepared, resolved_backend=replace(resolved_backend, source=source))


def check_options(config: RunConfig, choice: Choice) -> None:
    """Settings of the backend itself: known names and values only. Raises ConfigError QH-U13."""
    choices = choice.spec.option_choices
    wrong = [
        f"{name} = {value!r} ({'one of ' + ', '.join(map(repr, choices[name])) if name in choices else 'unknown'})"
        for name, value in config.backend.options.items()
        if value not in choices.get(name, ())
    ]
    if wrong:
        raise ConfigError(
            "QH-U13",
            f"backend.options has settings that {choice.spec.name} does not know: {'; '.join(wrong)}.",
            where="backend.options",
            fix=f"Use {', '.join(choices) or 'no options'} with {choice.spec.name}.",
        )


def prepare_run(
    config: RunConfig,
    seed: int,
    resolved_backend: ResolvedBackend,
    run_dir: Path,
    rows: Rows | None,
    console: RunConsole,
    *,
    validation_rows: Rows | None = None,
    world: World | None = None,
    sequences_per_step: int | None = None,
) -> PreparedRun:
    """Tokenizer, data and memory. `sequences_per_step` are those of the run that goes on, with whatever ranks."""
    world = world or World()
    accumulation = accumulation_of(config.training, world, sequences_per_step)
    facts = resolved_backend.source.facts
    vocabulary_size = facts.vocabulary_size or None
    tokenizer = ChatTokenizer.from_folder(
        resolved_backend.source.path, chat_template=config.data.chat_template, model_vocabulary_size=vocabulary_size
    )
    for note in tokenizer.notes:
        console.note(note)
    described = unmet_description_note(facts, resolved_backend.quantization)
    for note in (*([described] if described else []), *resolved_backend.outline.notes):
        console.note(note)
    data = prepare(
        config.data,
        tokenizer,
        cache_dir=run_dir / "tokens",
        seed=seed,
        rows=rows,
        validation_rows=validation_rows,
        model_max_length=facts.max_position_embeddings,
        model_vocabulary_size=vocabulary_size,
    )
    console.data_report(data.report.lines())
    _check_lengths(resolved_backend.outline, data)
    if Feature.GENERATE in resolved_backend.choice.spec.capabilities.features:
        for number, prompt in enumerate(config.training.sample_prompts):
            place, plain = f"training.sample_prompts[{number}]", data.report.train.plain
            room_for_an_answer(tokenizer, prompt, facts.max_position_embeddings, plain=plain, where=place)
    for alert in data.report.alerts:
        console.note(alert)
    planned = planned_model(config, resolved_backend, world)
    if world.size > 1 and world.local_size is None and planned.counts_on_host:
        console.note(
            f"nothing says how many of the {world.size} ranks are on this host (LOCAL_WORLD_SIZE): its memory is "
            "planned as if all were"
        )
    mode, why = planned.how_spread()
    if mode == SHARD:
        planned = replace(planned, share=world.size)
    placement = _placed(planned)
    if placement.why:
        console.note(f"{placement.words()}: {placement.why}")
    elif config.training.gradient_checkpointing and config.training.recompute is None:
        console.note("training.gradient_checkpointing true is training.recompute full")
    return PreparedRun(
        config,
        seed,
        resolved_backend,
        tokenizer,
        data,
        planned.memory_with(placement),
        placement,
        mode=mode,
        why_mode=why,
        world=world,
        accumulation=accumulation,
    )


def planned_model(config: RunConfig, resolved_backend: ResolvedBackend, world: World, share: int = 1) -> PlannedModel:
    """The run's memory as it is planned for the device that is here. `share` of the ranks hold the layers."""
    source, report = resolved_backend.source, resolved_backend.report
    planned = PlannedModel(
        config,
        source.facts,
        source.path,
        resolved_backend.choice.spec,
        report,
        report,
        devices=world.size,
        per_host=world.most_on_host,
        share=share,
        modules=resolved_backend.outline.linear_modules,
    )
    return planned.on_this_machine()


def _placed(planned: PlannedModel) -> Placement:
    """What is recomputed and what is on the host. What is `auto` is chosen for the batch that is asked for, and for
    smaller ones where `training.memory_limit` cuts it."""
    config, chosen = planned.config, planned.placement()
    if chosen.why and config.training.memory_limit_bytes is not None and not planned.fits:
        smaller = (replace(planned, config=config.with_rows(rows)) for rows in halves(config.full_batch_rows))
        fitting = [cut for cut in smaller if cut.fits]
        chosen = min(fitting, key=lambda cut: cost(cut.price(), Taken())).placement() if fitting else chosen
    return chosen


def _check_lengths(outline: ModelOutline, data: PreparedData) -> None:
    """Raises UnsupportedFeatureError QH-B61 for rows that are longer than what the backend computes right, QH-B62 for
    those whose rotary positions would depend on the rows beside them."""
    for store in filter(len, filter(None, (data.train, data.validation))):
        shortest, longest = int(store.lengths.min()), int(store.lengths.max())
        if outline.rotary is not None:
            outline.rotary.check(shortest, longest)
        if outline.longest_sample is not None:
            outline.longest_sample.check(longest)


def chosen_dtype(wanted: str, proved: Sequence[str], backend: str, *, written: str = "") -> str:
    """The compute dtype: the best that computing proved, or the one asked for. Raises ConfigError QH-N10, in which
    `written` is how it was asked for where that is not its name."""
    if wanted == "auto":
        return proved[0]
    if wanted in proved:
        return wanted
    of_which = f", which is {wanted} but for the products with the base" if written not in ("", wanted) else ""
    raise ConfigError(
        "QH-N10",
        f"quantization.compute_dtype is {written or wanted}{of_which}; "
        f"on this device {backend} computes {' and '.join(proved)} only.",
        where="quantization.compute_dtype",
        cause="The hardware does not support it, or computing with it gave wrong numbers.",
        fix=f"Set it to {proved[0]}{' (with loss scaling)' if proved[0] == 'float16' else ''}, or to auto.",
    )


def window_sampler(prepared: PreparedRun) -> WindowSampler:
    """Which rows each step sees: a pure function of (seed, epoch, step)."""
    training, data = prepared.config.training, prepared.config.data
    return WindowSampler(
        prepared.data.train,
        batch_size=training.per_device_train_batch_size,
        tokens_per_batch=training.tokens_per_batch,
        accumulation=prepared.accumulation,
        world=prepared.world,
        seed=prepared.seed,
        shuffle=data.shuffle,
        group_by_length=data.group_by_length,
        packing=data.packing,
        max_seq_length=data.max_seq_length,
        pad_id=prepared.tokenizer.pad_id,
        shares=prepared.data.shares,
    )
