"""A prepared run, carried out: load, attach, train, judge, write. The only place where core and backend meet."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_hal.adapter.fitting import check_changed, check_fits
from qlora_hal.adapter.initial import initial_adapter
from qlora_hal.adapter.peft_files import read_adapter, read_provenance
from qlora_hal.adapter.targets import resolve_targets
from qlora_hal.contract.backend import Compute
from qlora_hal.contract.capabilities import Feature
from qlora_hal.contract.checked_trainer import CheckedTrainer
from qlora_hal.contract.values import Adapter, Batch, ComputeDtype, LinearShape, LossSum
from qlora_hal.data.source.sampling import WindowSampler, evaluation_batches
from qlora_hal.detect import discovery
from qlora_hal.detect.mac_memory import pressure_note
from qlora_hal.errors import AdapterError, StoppedError, UnsafeInputError
from qlora_hal.errors.way_on import resume_line
from qlora_hal.inference.loaded_model import LoadedModel
from qlora_hal.memory.placement import FULL, NONE
from qlora_hal.processes.signals import EndedAtOnce
from qlora_hal.ranks.agreement import Agreement
from qlora_hal.ranks.planning import DATA, SHARD, mode_of
from qlora_hal.report.live_page import LivePage
from qlora_hal.report.metrics import MetricsFile, loss_before, trained_seconds
from qlora_hal.run import loop
from qlora_hal.run.adapters import mend_adapters
from qlora_hal.run.callbacks import FollowingCallbacks, RunCallbacks, write_run_adapter
from qlora_hal.run.directory import BEST_ADAPTER_FOLDER
from qlora_hal.run.finish import warning_if_regressed, write_pages, write_report_of_failed
from qlora_hal.run.identity import facts_of_rank, identity_of, provenance_of, software_of_rank
from qlora_hal.run.loop import LoopPlan, Progress, keep_best
from qlora_hal.run.lr_schedule import Schedule, warmup_steps
from qlora_hal.run.prepare import chosen_dtype, window_sampler
from qlora_hal.run.record import RunRecordFile
from qlora_hal.run.result import RunView, TrainResult, written
from qlora_hal.run.samples import SAMPLE_TOKENS, answer, room_for_an_answer
from qlora_hal.run.transfer import ROWS, TOKENS, batch_of_tokens, check_divergence, measured_divergence, planned
from qlora_hal.run.watchdog import Watchdog

if TYPE_CHECKING:
    from qlora_hal.checkpoint import TrainingState
    from qlora_hal.hooks import Hooks
    from qlora_hal.processes.signals import Requests
    from qlora_hal.report.console import RunConsole
    from qlora_hal.report.run_file import RunRecord
    from qlora_hal.report.transfer_record import Transfer
    from qlora_hal.run.directory import RunDirectory
    from qlora_hal.run.prepare import PreparedRun

Samples = tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class RunContext:
    """What every chapter of one call needs at hand. `requests` are those of signals. `state` is where a resumed run
    goes on from, `changes` what its new backend has otherwise."""

    prepared: PreparedRun
    directory: RunDirectory
    console: RunConsole
    hooks: Hooks
    record: RunRecord
    requests: Requests
    state: TrainingState | None = None
    changes: tuple[str, ...] = ()


def carry_out(context: RunContext) -> TrainResult:
    """Train to the end or to a stop. Raises StoppedError QH-S19 when a signal ended it, with the state saved."""
    choice, options = context.prepared.resolved_backend.choice, context.prepared.config.backend.options
    trainer = CheckedTrainer(discovery.open_trainer(choice.spec, options), context.console.note)
    record_file = RunRecordFile(context.directory, context.console, context.record, context.state)
    session = Session(context, trainer, record_file)
    try:
        result = session.train()
    except BaseException as error:
        has_time = isinstance(error, Exception) or (isinstance(error, EndedAtOnce) and not error.again)
        if record_file.failed(error) and has_time:
            write_report_of_failed(context.directory.path)
        session.tell_failed(error)
        raise
    finally:
        trainer.close()
    if result.stopped_by_signal:
        raise StoppedError(
            "QH-S19",
            f"Stopped by {result.stopped_because} after step {result.steps}; the state is saved.",
            where=str(context.directory.path),
            fix=f"Resume with: {resume_line(context.directory.path)}",
            context={"step": result.steps},
        )
    return result


class Session:
    """One call of train or resume, chapter by chapter."""

    def __init__(self, context: RunContext, trainer: CheckedTrainer, record_file: RunRecordFile) -> None:
        self._context = context
        self._record_file = record_file
        self._prepared = context.prepared
        self._config = context.prepared.config
        self._trainer = trainer
        self._features = context.prepared.resolved_backend.choice.spec.capabilities.features
        self._observed: RunView | None = None
        self._samples: Samples = ()
        self._ranks = Agreement(context.prepared.world, trainer)
        self._hosts: list[str] = []

    def train(self) -> TrainResult:
        """Meet the other ranks, load, attach, evaluate, loop, judge, write."""
        self._meet()
        compute = self._load()
        initial = self._attach()
        windows = window_sampler(self._prepared)
        run = self._view(compute, windows)
        self._record_file.begin(self._prepared, run.resolved, self._measured_transfer(run.resolved))
        self._record_file.write(ranks=self._joined())
        with self._callbacks(run, windows) as callbacks:
            for note in windows.notes:
                callbacks.note(note)
            progress = self._progress(callbacks)
            self._announce(run)
            before = self._judge_before(callbacks, progress)
            with self._context.requests.heeded_between_steps(), callbacks.watchdog, self._timed_ranks():
                stopped = loop.run(self._trainer, windows, self._plan(run, compute.dtype), progress, callbacks)
            after = None if stopped.startswith("SIG") else self._judge_after(callbacks, progress, initial, before)
            result = self._result(run, callbacks, progress, (before, after), stopped)
        self._finish(run, result, progress)
        return result

    def _meet(self) -> None:
        """With the other ranks, where there are any; what they train is compared before a weight is read."""
        world = self._prepared.world
        if world.size > 1:
            self._trainer.join_ranks(world, self._config.parallel.timeout_seconds)
            self._ranks.require_alike(software_of_rank(self._prepared))
            self._ranks.require_alike(facts_of_rank(self._prepared, self._context.state))
            self._hosts = self._ranks.texts(socket.gethostname())

    def _joined(self) -> dict[str, object]:
        """How many ranks there are, where, and what joins them."""
        world = self._prepared.world
        if world.size == 1:
            return {"world_size": 1}
        facts = self._trainer.rank_facts()
        links = facts.links if len(set(self._hosts)) == 1 else f"{facts.links} on {self._hosts[0]}, a network between"
        return {"world_size": world.size, "hosts": self._hosts, "collectives": facts.collectives, "links": links}

    @contextmanager
    def _timed_ranks(self) -> Iterator[None]:
        """What share of the loop's time this process is in collectives, into the record."""
        if self._prepared.world.size == 1:
            yield
            return
        began, before = time.perf_counter(), self._trainer.rank_facts().seconds
        yield
        spent, took = self._trainer.rank_facts().seconds - before, time.perf_counter() - began
        measured = {
            "communication_seconds": spent,
            "loop_seconds": took,
            "communication_share": spent / max(took, 1e-9),
        }
        self._record_file.write(ranks={**self._joined(), **measured})

    def _load(self) -> Compute:
        config, resolved_backend = self._config, self._prepared.resolved_backend
        placement = self._prepared.placement
        compute = Compute(
            dtype=chosen_dtype(  # type: ignore[arg-type]
                config.quantization.dtype,
                self._trainer.proved_compute_dtypes(),
                resolved_backend.choice.spec.name,
                written=config.quantization.compute_dtype,
            ),
            gradient_checkpointing=placement.recompute != NONE,
            options=config.backend.options,
            world=self._prepared.world,
            shard_base=self._shards_base(),
            recompute=placement.recompute if placement.recompute != NONE else FULL,  # type: ignore[arg-type]
            base_offload=placement.base_offload,
            fp8_products=config.quantization.fp8_products,
        )
        if note := pressure_note():
            self._context.console.note(note)
        self._trainer.load(resolved_backend.source, resolved_backend.quantization, compute)
        return compute

    def _shards_base(self) -> bool:
        """Whether each rank holds a part of the base alone. What was planned is what is done, by what the device itself
        says of its memory; where the base does not fit on one of them, all hold parts."""
        prepared, has = self._prepared, self._trainer.device_facts().memory_limit_bytes
        there = min(filter(None, (has, self._config.training.memory_limit_bytes)), default=None)
        spec = prepared.resolved_backend.choice.spec
        mode, why = prepared.mode, prepared.why_mode
        if mode == DATA:
            offloaded = prepared.placement.base_offload
            mode, why = mode_of(self._config, prepared.world.size, spec, prepared.estimate, there, offloaded)
        [short] = self._ranks.how_many(mode == SHARD)
        if short and self._config.parallel.mode != SHARD:
            reason = why if mode == SHARD else f"a whole base does not fit on {short} of the devices"
            self._context.console.note(f"parallel.mode is {SHARD}: {reason}")
        return short > 0

    def _attach(self) -> Adapter:
        state, modules = self._context.state, self._trainer.linear_modules()
        if state is None:
            self._settle_targets(modules)
            adapter = initial_adapter(self._prepared.resolved_backend.adapter, modules, self._prepared.seed)
        else:
            adapter = state.adapter
        check_fits(adapter, modules, where=str(self._context.directory.path))
        if note := self._context.directory.free_space_note(sum(t.size for t in adapter.tensors.values())):
            self._context.console.note(note)
        self._trainer.attach(adapter, self._config.training.optim)
        if state is not None:
            self._trainer.import_optimizer(state.optimizer)
        return adapter

    def _settle_targets(self, modules: Mapping[str, LinearShape]) -> None:
        """What was told before loading gives way to what the loaded model has; where they differ, that is said."""
        resolved_backend = self._prepared.resolved_backend
        told, found = (
            resolved_backend.adapter.target_modules,
            resolve_targets(self._config.lora.target_modules, modules, self._config.lora.experts),
        )
        if found == told:
            return
        apart = sorted(set(told) ^ set(found))
        self._context.console.note(
            f"the loaded model has other linear layers than its files describe: {len(found)} carry the adapter where "
            f"{len(told)} were planned ({', '.join(apart[:3])}{' and others' if len(apart) > 3 else ''})"
        )
        adapter = replace(resolved_backend.adapter, target_modules=found)
        self._prepared = replace(self._prepared, resolved_backend=replace(resolved_backend, adapter=adapter))

    def _measured_transfer(self, resolved: Mapping[str, object]) -> Transfer | None:
        """Say beforehand what stays exact on another backend and what does not, measured."""
        state = self._context.state
        if state is None:
            return None
        dropout = self._config.lora.dropout
        moved = planned(state.step, state.provenance, resolved, self._context.changes, dropout)
        if moved is not None:
            moved = replace(moved, gap=measured_divergence(self._trainer, state.answers))
            for line in moved.lines():
                self._context.console.note(line)
            check_divergence(moved.gap)
        return moved

    def _view(self, compute: Compute, windows: WindowSampler) -> RunView:
        quantization, spec = self._prepared.resolved_backend.quantization, self._prepared.resolved_backend.choice.spec
        facts, training = self._trainer.device_facts(), self._config.training
        total_steps = windows.total_steps(training.num_train_epochs, training.max_steps)
        resolved: dict[str, object] = {
            "backend": spec.name,
            "device": facts.device,
            "weight_format": quantization.weight_format.value,
            "block_size": quantization.block_size,
            "double_quant": quantization.double_quant,
            "compute_dtype": compute.dtype,
            "fp8_products": compute.fp8_products,
            "kernel_path": facts.kernel_path,
            "base_dropout": "off",
            "driver": facts.driver,
            "seed": self._prepared.seed,
            "total_steps": total_steps,
            "versions": dict(facts.versions),
            "memory_limit_bytes": facts.memory_limit_bytes,
            "ranks": self._prepared.world.size,
            "parallel_mode": "shard" if compute.shard_base else "data",
            "recompute": self._prepared.placement.recompute,
            "base_offload": list(compute.base_offload),
            "sequences_per_step": self._prepared.sequences_per_step,
            "tokens_per_step": round(windows.tokens_per_step),
        }
        first = self._context.state.step if self._context.state else 0
        return RunView(self._context.directory.path, self._config, resolved, total_steps, first)

    @contextmanager
    def _callbacks(self, run: RunView, windows: WindowSampler) -> Iterator[RunCallbacks]:
        context = self._context
        with MetricsFile(context.directory.metrics_path) as metrics:
            for note in metrics.notes:
                context.console.note(note)
            self._go_on_in(metrics)
            if metrics.is_complete:
                self._record_file.trained_before(trained_seconds(metrics.path))
            else:
                self._record_file.time_is_unknown()
            limit, source = run.resolved["memory_limit_bytes"], self._prepared.resolved_backend.source
            leads = self._prepared.world.rank == 0
            made_by = RunCallbacks if leads else FollowingCallbacks
            yield made_by(
                run=run,
                trainer=self._trainer,
                model=LoadedModel(
                    self._trainer,
                    self._prepared.tokenizer,
                    source.facts.max_position_embeddings,
                    plain=self._prepared.data.report.train.plain,
                    lent=True,
                ),
                metrics=metrics,
                console=context.console,
                hooks=context.hooks,
                record_file=self._record_file,
                watchdog=Watchdog(context.console.note),
                provenance={**provenance_of(self._prepared, run.resolved), **identity_of(context.directory.content)},
                keep_checkpoints=self._config.checkpoint.save_total_limit,
                measures_memory=Feature.PEAK_MEMORY in self._features,
                memory_limit=limit if isinstance(limit, int) else None,
                epoch_of=windows.epoch_of,
                page=LivePage(run.run_dir) if leads else None,
                questions=questions(self._prepared),
                resumed_from=context.state.step if context.state else None,
            )

    def _go_on_in(self, metrics: MetricsFile) -> None:
        """The log up to the step that the run goes on from, with a word on what is not as it was saved."""
        state = self._context.state
        if state is None:
            metrics.truncate_after(-1)
            return
        if problem := metrics.compare(state.loop.get("metrics"), state.step):
            self._context.console.note(problem)
        if dropped := metrics.truncate_after(state.step):
            lines = "a line" if dropped == 1 else f"{dropped} lines"
            self._context.console.note(f"{lines} of {metrics.path.name} after step {state.step} written again")

    def _progress(self, callbacks: RunCallbacks) -> Progress:
        """Where the loop begins; for a resumed run with its adapters as they were then."""
        if self._context.state is None:
            return Progress(micro_batch_splits=self._prepared.micro_batch_splits)
        progress = Progress.from_json(self._context.state.loop)
        mend_adapters(self._context.directory, progress, callbacks)
        return progress

    def _announce(self, run: RunView) -> None:
        self._context.console.run_started(run)
        self._observed = run
        self._context.hooks.tell("qlora_hal_run_started", run=run)

    def _judge_before(self, callbacks: RunCallbacks, progress: Progress) -> float | None:
        """The base's validation loss and its answers, into the record."""
        loss = self._loss_before(callbacks, progress)
        self._samples = self._sampled("before", [{"prompt": prompt} for prompt in self._config.training.sample_prompts])
        self._record_file.write(eval_loss_before=loss, samples=self._samples)
        return loss

    def _judge_after(
        self, callbacks: RunCallbacks, progress: Progress, initial: Adapter, before: float | None
    ) -> float | None:
        """The adapter written, its validation loss, and its answers beside the base's."""
        after = self._chosen_adapter(callbacks, progress, initial)
        if note := warning_if_regressed(before, after, progress):
            callbacks.note(note)
        self._samples = self._sampled("after", self._samples)
        self._context.console.samples(self._samples)
        return after

    def _result(
        self,
        run: RunView,
        callbacks: RunCallbacks,
        progress: Progress,
        losses: tuple[float | None, float | None],
        stopped: str,
    ) -> TrainResult:
        return TrainResult(
            backend=str(run.resolved["backend"]),
            device=str(run.resolved["device"]),
            weight_format=str(run.resolved["weight_format"]),
            block_size=self._prepared.resolved_backend.quantization.block_size,
            run_dir=run.run_dir,
            adapter_dir=self._context.directory.adapter_dir,
            steps=progress.step,
            tokens=progress.tokens_seen,
            losses=tuple(callbacks.losses),
            eval_loss_before=losses[0],
            eval_loss_after=losses[1],
            wall_seconds=self._record_file.wall_seconds,
            peak_memory_bytes=self._trainer.peak_memory_bytes() if Feature.PEAK_MEMORY in self._features else None,
            stopped_because=stopped,
            tokens_per_second=callbacks.tokens_per_second,
            notes=tuple(self._context.console.notes),
            samples=self._samples,
        )

    def _plan(self, run: RunView, compute_dtype: ComputeDtype) -> LoopPlan:
        training = self._config.training
        warmup = warmup_steps(run.total_steps, ratio=training.warmup_ratio, steps=training.warmup_steps)
        return LoopPlan(
            total_steps=run.total_steps,
            seed=self._prepared.seed,
            schedule=Schedule(training.lr_scheduler_type, training.learning_rate, warmup, run.total_steps),
            training=training,
            compute_dtype=compute_dtype,
            save_steps=self._config.checkpoint.save_steps,
            evaluation=self._evaluation if self._prepared.data.validation is not None else None,
            stop_requested=self._context.requests.stop,
            save_requested=self._context.requests.save,
            how_many_ranks=self._ranks.how_many,
        )

    def _evaluation(self) -> LossSum:
        assert self._prepared.data.validation is not None
        batches = evaluation_batches(
            self._prepared.data.validation,
            batch_size=self._config.training.per_device_eval_batch_size,
            pad_id=self._prepared.tokenizer.pad_id,
            world=self._prepared.world,
        )
        return self._ranks.evaluation(self._trainer.evaluate(list(batches)))

    def _loss_before(self, callbacks: RunCallbacks, progress: Progress) -> float | None:
        """The validation loss of the base; a resumed run has it already, in its record or in its log."""
        if self._prepared.data.validation is None:
            return None
        if self._context.state is not None:
            known = self._context.record.eval_loss_before
            return known if known is not None else loss_before(self._context.directory.metrics_path)
        evaluation = self._evaluation()
        callbacks.evaluated(progress.step, evaluation, "before")
        return evaluation.loss

    def _chosen_adapter(self, callbacks: RunCallbacks, progress: Progress, initial: Adapter) -> float | None:
        """Evaluate the end, choose between it and the best on the way, write the adapter; its validation loss."""
        adapter, loss = self._trainer.export_adapter(), None
        for module in check_changed(initial, adapter, steps=progress.step) if self._context.state is None else ():
            callbacks.note(f"{module}: B is still zero, no gradient reached it")
        step = progress.step
        if self._prepared.data.validation is not None:
            evaluation = self._evaluation()
            loss = evaluation.loss
            callbacks.evaluated(step, evaluation, "after")
            keep_best(self._trainer, progress, callbacks, step, evaluation)
            if self._config.training.load_best_adapter_at_end and progress.best_step not in (None, step):
                adapter, loss, step = self._best(callbacks, progress) or (adapter, loss, step)
        write_run_adapter(self._context.directory.adapter_dir, adapter, {**callbacks.provenance, "step": step})
        return loss

    def _best(self, callbacks: RunCallbacks, progress: Progress) -> tuple[Adapter, float, int] | None:
        """The best adapter on the way. None when a part of the run that was lost, and went otherwise when another
        backend did it anew, had put its own best there."""
        assert progress.best_loss is not None
        assert progress.best_step is not None
        folder = self._context.directory.path / BEST_ADAPTER_FOLDER
        try:
            best, kept = read_adapter(folder), read_provenance(folder).get("step")
        except (AdapterError, UnsafeInputError) as problem:
            callbacks.note(
                f"the adapter of step {progress.best_step}, with the lowest validation loss, cannot be used: "
                f"{problem.message.rstrip('.')}; the last adapter is kept"
            )
            return None
        if kept != progress.best_step:
            callbacks.note(
                f"the adapter of step {progress.best_step}, with the lowest validation loss, is gone: before it was "
                f"interrupted the run replaced it by that of step {kept}; the last adapter is kept"
            )
            return None
        self._trainer.attach(best, self._config.training.optim)
        callbacks.note(
            f"the adapter of step {progress.best_step} is kept: its validation loss {progress.best_loss:.4f} is lowest"
        )
        return best, progress.best_loss, progress.best_step

    def _sampled(self, when: str, rows: Sequence[Mapping[str, str]]) -> Samples:
        """Each row with the answer of the model as it is now."""
        if Feature.GENERATE not in self._features:
            return tuple(rows)
        return tuple({**row, when: self._answer(row["prompt"], adapter=when == "after")} for row in rows)

    def _answer(self, prompt: str, *, adapter: bool) -> str:
        """Of SAMPLE_TOKENS at most, and none past the model's positions."""
        tokenizer, plain = self._prepared.tokenizer, self._prepared.data.report.train.plain
        positions = self._prepared.resolved_backend.source.facts.max_position_embeddings
        room = room_for_an_answer(tokenizer, prompt, positions, plain=plain)
        most = SAMPLE_TOKENS if room is None else min(SAMPLE_TOKENS, room)
        return answer(self._trainer, tokenizer, prompt, adapter=adapter, max_new_tokens=most, plain=plain)

    def _finish(self, run: RunView, result: TrainResult, progress: Progress) -> None:
        with self._context.requests.too_late():
            self._record_file.finish(result, progress)
            write_pages(run.run_dir)
            self._context.console.finished(result, written(run.run_dir))
            self._context.hooks.tell("qlora_hal_run_finished", run=run, result=result)

    def tell_failed(self, error: BaseException) -> None:
        """Tell observers of the end, if they were told of the start."""
        if self._observed is not None:
            self._context.hooks.tell("qlora_hal_run_failed", run=self._observed, error=error)


def questions(prepared: PreparedRun) -> list[Batch]:
    """The beginnings of a few rows, held out where any are: each checkpoint keeps what the model says to them."""
    store = prepared.data.validation if prepared.data.validation is not None else prepared.data.train
    return [batch_of_tokens(store.row(row)[0][:TOKENS]) for row in range(min(ROWS, len(store)))]
