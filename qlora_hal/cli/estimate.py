"""`qlora-hal estimate`: the memory of a run by arithmetic over the model's headers; no weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qlora_hal.cli.arguments import DevicesOption, Switch, as_devices
from qlora_hal.cli.flags import with_settings
from qlora_hal.cli.settings import resolved
from qlora_hal.errors import figures
from qlora_hal.errors.terminal_text import show, show_json

if TYPE_CHECKING:
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.contract.backend import BackendSpec, Quantization
    from qlora_hal.contract.values import MemoryEstimate
    from qlora_hal.memory.gpus import KnownGpu
    from qlora_hal.model.facts import ModelFacts
    from qlora_hal.ranks.planning import DevicePlan

_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "workspace", "runtime")


@dataclass(frozen=True, slots=True)
class Estimated:
    """An estimate and what it was made for.

    `not_ready` is why the backend cannot run here, empty where it can. A backend that computes on the CPU here has no
    `cards`, but this machine's memory in bytes.
    """

    memory: MemoryEstimate
    backend: str
    not_ready: str
    quantization: Quantization
    compute_dtype: str
    read_from: str
    cards: tuple[KnownGpu, ...]
    machine_bytes: int | None
    plan: DevicePlan

    def fits(self, memory_bytes: int) -> bool:
        """Whether the peak of one device fits, with the margin of the arithmetic."""
        return self.memory.high <= memory_bytes

    @property
    def fits_here(self) -> bool:
        """Whether the memory of this machine is enough: the ranks of a CPU share it."""
        return self.machine_bytes is not None and self.memory.high * self.plan.devices <= self.machine_bytes


@with_settings()
def estimate(
    config: Annotated[Path | None, Parameter(help="Settings file: YAML, TOML or JSON.")] = None,
    /,
    *,
    demo: Annotated[bool, Switch, Parameter(help="Estimate for the small model that comes with the package.")] = False,
    devices: DevicesOption = None,
    json: Annotated[bool, Switch, Parameter(help="Print as JSON.")] = False,
    flags: Mapping[str, object],
) -> int:
    """Estimate the memory of a run: qlora-hal estimate --model M --training.per_device_train_batch_size 8."""
    from qlora_hal.config.resolve import require_settings

    settings = resolved(config, flags, demo=demo)
    require_settings(settings.config, "model.name_or_path")
    estimated = estimate_run(settings.config, as_devices(devices))
    if json:
        show_json(estimate_as_json(estimated))
    else:
        show(estimate_as_text(estimated, settings.config))
    return 0


def estimate_run(config: RunConfig, devices: int | str | None = None) -> Estimated:
    """The peak on the backend that is named, else on the one that would be chosen on its own hardware; where a backend
    is ready here, on this machine's. `devices` may be more than there are here: it is arithmetic."""
    from qlora_hal.adapter.targets import require_rank, resolve_targets
    from qlora_hal.data.prepare import refuse_long_sequences
    from qlora_hal.detect.discovery import listed, reports
    from qlora_hal.detect.hardware import memory_here
    from qlora_hal.detect.requirements import quantization_of
    from qlora_hal.detect.selection import has_accelerator
    from qlora_hal.memory.estimate import spread_over
    from qlora_hal.memory.gpus import KNOWN_GPUS
    from qlora_hal.model.source import plan_model
    from qlora_hal.ranks.launching import AUTO, number_of
    from qlora_hal.ranks.planning import plan_for
    from qlora_hal.ranks.starting import require_number
    from qlora_hal.run.prepare import estimated_memory, likely_dtype

    require_number(devices)
    model = config.model
    facts = plan_model(
        model.name_or_path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        tokenizer=False,
        config_is_enough=True,
    ).facts
    refuse_long_sequences(config.data, facts.max_position_embeddings)
    spec = backend_for(config, facts)
    quantization = quantization_of(config, facts, spec.capabilities)
    targets = resolve_targets(config.lora.target_modules, facts.linear_modules)
    require_rank(config.lora.r, [facts.linear_modules[name] for name in targets])
    probed = next(report for report in reports(listed()) if report.backend == spec.name)
    report = probed if probed.ready else None
    accelerated = has_accelerator(spec, (probed,))
    memory = estimated_memory(
        config, facts, spec, quantization, {name: facts.linear_modules[name] for name in targets}, report
    )
    dtype = likely_dtype(config, spec, report)
    number = number_of(AUTO, spec, probed) if devices == AUTO else int(devices or 1)
    plan = plan_for(config, number, spec, memory, lambda: spread_over(memory, facts, dtype, number))
    return Estimated(
        memory=plan.memory,
        plan=plan,
        backend=spec.name,
        not_ready="" if probed.ready else probed.reason,
        quantization=quantization,
        compute_dtype=dtype,
        read_from=facts.read_from,
        cards=tuple(card for card in KNOWN_GPUS if accelerated and card.vendor in spec.card_vendors),
        machine_bytes=None if accelerated else memory_here(),
    )


def estimate_as_text(estimated: Estimated, config: RunConfig) -> str:
    """A table of the parts, the total with its margin, and the cards on both sides of it, or this machine."""
    memory, stored = estimated.memory, estimated.quantization
    block = f" in blocks of {stored.block_size}" if stored.block_size else ""
    here = f"not ready here: {estimated.not_ready.rstrip('.')}" if estimated.not_ready else "ready here"
    batch, length = config.training.per_device_train_batch_size, config.data.max_seq_length
    lines = [
        f"{config.model.name_or_path} on {estimated.backend} ({here}): base {stored.weight_format.value}{block}, "
        f"computes in {estimated.compute_dtype}, {batch} x {length} tokens, rank {config.lora.r}",
        *_plan_lines(estimated.plan, config),
        "",
        *memory_lines({**asdict(memory), "total": memory.total, "high": memory.high}),
        "",
    ]
    for title, fits in (("fits", True), ("too small", False)):
        places = [(card.name, card.memory_bytes, estimated.fits(card.memory_bytes)) for card in estimated.cards]
        if estimated.machine_bytes is not None:
            places.append(("the memory of this machine", estimated.machine_bytes, estimated.fits_here))
        names = [f"{name} ({figures.size(size)})" for name, size, enough in places if enough is fits]
        if names:
            lines.append(f"{title + ':':<10} {', '.join(names)}")
    return "\n".join(lines)


def _plan_lines(plan: DevicePlan, config: RunConfig) -> list[str]:
    if plan.devices == 1:
        return []
    steps = config.training.max_steps
    return [
        f"{plan.devices} devices ({plan.mode}: {plan.why}): {plan.sequences_per_step} sequences a step over all of "
        f"them, {f'{steps} steps' if steps else 'steps by the rows (train --dry-run counts them)'}; memory of each:"
    ]


def memory_lines(memory: Mapping[str, int]) -> list[str]:
    """Bytes by cause, and in all with the margin of the arithmetic."""
    return [
        *(f"  {part:<12} {figures.size(memory[part]):>10}" for part in _PARTS),
        f"  {'total':<12} {figures.size(memory['total']):>10}   up to {figures.size(memory['high'])}",
    ]


def estimate_as_json(estimated: Estimated) -> dict[str, object]:
    memory, stored = estimated.memory, estimated.quantization
    return {
        "backend": estimated.backend,
        "read_from": estimated.read_from,
        "not_ready": estimated.not_ready,
        "weight_format": stored.weight_format.value,
        "block_size": stored.block_size,
        "double_quant": stored.double_quant,
        "compute_dtype": estimated.compute_dtype,
        "bytes": {part: getattr(memory, part) for part in _PARTS},
        "total": memory.total,
        "high": memory.high,
        "plan": estimated.plan.as_json(),
        "cards": [
            {"name": card.name, "memory_bytes": card.memory_bytes, "fits": estimated.fits(card.memory_bytes)}
            for card in estimated.cards
        ],
        "machine": None
        if (size := estimated.machine_bytes) is None
        else {"memory_bytes": size, "fits": estimated.fits_here},
    }


def backend_for(config: RunConfig, facts: ModelFacts) -> BackendSpec:
    """The named backend; else the first by priority that can store this model, ready here or not."""
    from qlora_hal.contract.capabilities import unmet_requirements
    from qlora_hal.detect.discovery import find, listed, load_spec
    from qlora_hal.detect.requirements import requirements_of
    from qlora_hal.errors import UnsupportedFeatureError

    entries = listed()
    if config.backend.name != "auto":
        return load_spec(find(config.backend.name, entries))
    specs = [load_spec(entry) for entry in entries if entry.built_in]
    needs = requirements_of(config, facts)
    able = [spec for spec in specs if not unmet_requirements(needs, spec.capabilities)]
    if not able:
        raise UnsupportedFeatureError(
            "QH-B01",
            "No built-in backend supports these settings.",
            cause="; ".join(
                f"{spec.name}: {', '.join(unmet_requirements(needs, spec.capabilities))}" for spec in specs
            ),
            fix="Change the setting that every line names, or name a backend with --backend.",
        )
    return max(able, key=lambda spec: spec.priority)
