"""An estimate as it stands in a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from qlora_hal.errors import figures

if TYPE_CHECKING:
    from qlora_hal.cli.estimate import Estimated
    from qlora_hal.config.schema import RunConfig
    from qlora_hal.memory.fitting import Fit, Needs, Remedy, Room, Verdict
    from qlora_hal.memory.inference import InferenceMemory
    from qlora_hal.ranks.planning import DevicePlan
    from qlora_hal.run.card_table import CardRow
    from qlora_hal.run.memory_probe import Calibration
    from qlora_hal.run.planned_memory import PlannedModel

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "workspace", "runtime")
_WIDTH = 79
_MARK = {"fits": "fits", "tight": "tight", "too small": "-", "no dtype": "no"}


def estimate_as_text(estimated: Estimated, config: RunConfig) -> str:
    """The parts, the total with its margin, what it fits into, and what was asked for beside it."""
    from qlora_hal.ranks.planning import can_spread

    memory = estimated.memory
    lines = [
        *_head(estimated, config),
        "",
        *memory_lines({**asdict(memory), "total": memory.total, "high": memory.high}),
    ]
    if estimated.probe is not None:
        lines += ["", *_probe_lines(estimated.probe, memory.total)]
    lines += ["", *_places(estimated)]
    if (has := estimated.smallest_memory) is not None and estimated.remedy is not None:
        lines += ["", *_remedy_lines(estimated.remedy, has, spreads=can_spread(estimated.planned.spec))]
    if estimated.room is not None and estimated.fits_of is not None:
        lines += ["", *_fit_lines(estimated.fits_of, estimated.room, estimated.planned.lacking_dtype)]
    if estimated.inference is not None:
        lines += ["", *_inference_lines(estimated.inference)]
    if estimated.table is not None:
        lines += ["", *table_lines(estimated.table, config)]
    return "\n".join(lines)


def memory_lines(memory: Mapping[str, int]) -> list[str]:
    """Bytes by cause, and in all with the margin of the arithmetic."""
    return [
        *(f"  {part:<12} {figures.size(memory[part]):>10}" for part in PARTS),
        f"  {'total':<12} {figures.size(memory['total']):>10}   up to {figures.size(memory['high'])}",
    ]


def _head(estimated: Estimated, config: RunConfig) -> Iterator[str]:
    planned = estimated.planned
    stored = planned.quantization
    block = f" in blocks of {stored.block_size}" if stored.block_size else ""
    in_fp8 = ", products with the base in fp8" if config.quantization.fp8_products else ""
    if planned.device is not None and planned.device is not planned.here:
        here = f"an {planned.device.reason}"
    elif estimated.cards and len(estimated.cards) == 1:
        here = f"on {estimated.cards[0].name}"
    else:
        here = f"not ready here: {estimated.not_ready.rstrip('.')}" if estimated.not_ready else "ready here"
    batch, length = config.full_batch_rows, config.data.max_seq_length
    yield from _wrapped(f"{config.model.name_or_path}: {figures.count(planned.facts.parameter_count)} weights", "  ")
    yield from _wrapped(f"  read from {planned.facts.read_from}", "  ")
    yield from _wrapped(f"  on {estimated.backend} ({here})", "  ")
    yield from _wrapped(
        f"  base {stored.weight_format.value}{block}, computes in {planned.compute_dtype}{in_fp8}, "
        f"{batch} x {length} tokens, rank {config.lora.r}",
        "  ",
    )
    placement = planned.placement()
    if placement.why:
        yield from _wrapped(f"  {placement.words()}: {placement.why}", "  ")
    elif (needs := planned.needs_with(placement)).on_host:
        yield from _wrapped(f"  {placement.words()}: {_on_host(needs, planned)}", "  ")
    yield from _plan_lines(estimated.plan, config)


def _on_host(needs: Needs, planned: PlannedModel) -> str:
    """What waits on a host for its devices, beside what this machine's memory has for it."""
    room, devices = planned.host_room, planned.per_host
    each = f", for its {devices} devices" if devices > 1 else ""
    left = f"; its memory has {figures.size(room)} for it now" if room is not None and needs.host else ""
    return f"{needs.on_host}{each}{left}"


def _plan_lines(plan: DevicePlan, config: RunConfig) -> list[str]:
    if plan.devices == 1:
        return []
    steps = config.training.max_steps
    length = f"{steps} steps" if steps else "steps by the rows (train --dry-run counts them)"
    hosts = "one host" if plan.per_host == plan.devices else f"{plan.devices // plan.per_host} hosts"
    return _wrapped(
        f"{plan.devices} devices of {hosts} ({plan.mode}: {plan.why}): {plan.sequences_per_step} sequences a step over "
        f"all of them, {length}; memory of each:",
        "  ",
    )


def _probe_lines(probe: Calibration, by_arithmetic: int) -> Iterator[str]:
    yield "measured here, two steps each, random weights:"
    for one in probe.measured:
        yield f"  {f'{one.layers} layers':<12} {figures.size(max(one.peak, one.loading or 0)):>10}"
    yield f"  {'whole':<12} {figures.size(probe.total):>10}   up to {figures.size(probe.high)}, by the probe"
    apart = probe.total / by_arithmetic - 1
    yield f"  {'':<12} {figures.size(by_arithmetic):>10}   by arithmetic alone; the probe says {apart:+.0%}"


def _places(estimated: Estimated) -> Iterator[str]:
    """Cards, the cap and this machine by class, the cards of one class by their memory."""
    from qlora_hal.memory.fitting import Verdict

    planned = estimated.planned
    found: dict[tuple[Verdict, str], list[str]] = {(one, ""): [] for one in Verdict}

    def put(size: int, name: str, devices: int = 1) -> None:
        verdict = estimated.verdict(size, devices)
        lacking = planned.lacking_dtype if verdict is Verdict.NO_DTYPE else ""
        found.setdefault((verdict, lacking), []).append(f"{name} ({figures.size(size)})")

    if (limit := estimated.memory_limit) is not None:
        put(limit, "training.memory_limit")
    if (machine := estimated.machine_bytes) is not None:
        put(machine, "the memory of this machine", estimated.plan.per_host)
    if (here := estimated.gpu_bytes) is not None:
        put(here, f"the {planned.gpu.name if planned.gpu else 'device'} of this machine")
    for card in sorted(estimated.cards, key=lambda card: card.memory_bytes):
        name = card.name if len(estimated.cards) == 1 else card.name.partition(" ")[2]  # one backend, one vendor
        key = estimated.verdict_on(card), estimated.lacking_on(card)
        found.setdefault(key, []).append(f"{name} ({figures.size(card.memory_bytes)})")
    for (verdict, lacking), names in found.items():
        if names:
            label = f"no {planned.config.quantization.compute_dtype}" if verdict is Verdict.NO_DTYPE else verdict.value
            why = f": {lacking}" if lacking else ""
            yield from _wrapped(f"{label + ':':<10} {', '.join(names)}{why}", " " * 11)


def _remedy_lines(remedy: Remedy, has: int, *, spreads: bool) -> Iterator[str]:
    """`spreads`: the base can lie on several devices."""
    if remedy.fits and not remedy.steps:
        yield from _wrapped(f"By arithmetic it fits {figures.size(has)}; what was measured does not.", "")
        return
    if remedy.fits:
        on_host = f"; {remedy.needs.on_host}" if remedy.needs.on_host else ""
        yield from _wrapped(
            f"It fits {figures.size(has)} with {remedy.words} (up to {figures.size(remedy.high)}{on_host}"
            f"{_at_what_speed(remedy.time)}):",
            "  ",
        )
        yield from _setting_lines(remedy.settings)
        for given_up in remedy.gives_up:
            yield from _wrapped(f"  gives up: {given_up}", "    ")
    else:
        others = "a smaller model or a larger card"
        if spreads:
            others = (
                "a smaller model, a larger card, or several that share the base (--devices N --parallel.mode shard)"
            )
        yield from _wrapped(
            f"No setting makes it fit {figures.size(has)}: with {remedy.words or 'these settings'} it needs up to "
            f"{figures.size(remedy.high)}. Take {others}.",
            "",
        )


def _at_what_speed(time: float) -> str:
    """A price in the tokens of a second, by what an H200 was measured at."""
    return f"; {1 / time:.2f} of the tokens/s, by an H200's figures" if time > 1.005 else ""


def _fit_lines(fits: Sequence[Fit], room: Room, lacking: str) -> Iterator[str]:
    from qlora_hal.memory.time_prices import DISK_RATE

    beside = f", and {figures.size(room.host)} of this host's memory" if room.host is not None else ""
    yield f"the most that fits {figures.size(room.device)}{beside}:"
    if not fits and lacking:
        yield from _wrapped(f"  nothing: it is of {lacking}", "  ")
        return
    if not fits:
        yield "  nothing, whatever is recomputed or on the host; what takes less stands above"
        return
    yield f"  {'rows x tokens':<14} {'tokens':>8} {'up to':>10}  {'tokens/s':<8}  settings"
    for one in fits:
        shape = f"{one.rows} x {one.length}"
        measured = " (measured)" if one.is_measured else ""
        speed = f"{fits[0].choice.time / one.choice.time:.2f}"
        line = f"  {shape:<14} {one.tokens:>8} {figures.size(one.high):>10}  {speed:<8}  "
        waits = {"host": one.host, "disk": one.disk}
        places = ", ".join(f"{place}: {figures.size(part)}" for place, part in waits.items() if part)
        on_host = f" ({places})" if places else ""
        yield from _wrapped(f"{line}{one.taken.words or 'as they are'}{on_host}{measured}", " " * 49)
    disk = f" and a disk of {figures.size(DISK_RATE)}/s" if any(one.disk for one in fits) else ""
    yield f"settings of the first (tokens/s beside it, by an H200's figures{disk}):"
    yield from _setting_lines(fits[0].settings)


def _setting_lines(settings: Mapping[str, object]) -> Iterator[str]:
    from qlora_hal.memory.fitting import flag

    for path, value in settings.items():
        if value is not None:
            yield f"  {flag(path, value)}"


def _inference_lines(answering: InferenceMemory) -> Iterator[str]:
    yield f"inference, {answering.sequences} x {answering.length} tokens:"
    for name, size in (("weights", answering.weights), ("KV cache", answering.cache), ("runtime", answering.runtime)):
        yield f"  {name:<12} {figures.size(size):>10}"
    yield f"  {'total':<12} {figures.size(answering.total):>10}"


def table_lines(rows: Sequence[CardRow], config: RunConfig) -> Iterator[str]:
    """A line for each card; below it what makes the last method fit, where it does not."""
    batch, length = config.full_batch_rows, config.data.max_seq_length
    methods = list(rows[0].verdicts) if rows else []
    yield from _wrapped(
        f"known cards, {batch} x {length} tokens (fits: with a margin of 15 %; tight: without it; -: too small"
        f"{'; no: it does not compute in the dtype' if _lacks_dtype(rows) else ''}):",
        "",
    )
    yield f"  {'card':<25} {'memory':>11} {'dtype':<9}" + "".join(f" {name:<6}" for name in methods)
    for row in rows:
        marks = "".join(f" {_MARK[row.verdicts[name].value]:<6}" for name in methods)
        size = figures.size(row.card.memory_bytes)
        memory = f"{row.card.devices} x {size}" if row.card.devices > 1 else size
        line = f"  {row.card.name:<25} {memory:>11} {row.compute_dtype:<9}{marks}"
        yield line.rstrip()
        if row.advice is not None:
            yield from _wrapped(f"      {advice_in_short(row, methods[-1])}", "      ")


def _lacks_dtype(rows: Sequence[CardRow]) -> bool:
    return any(found.value == "no dtype" for row in rows for found in row.verdicts.values())


def advice_in_short(row: CardRow, method: str) -> str:
    """What makes a method fit a card."""
    advice = row.advice
    if advice is None:
        return ""
    if advice.fits:
        speed = f" ({1 / advice.time:.2f} of the tokens/s)" if advice.time > 1.005 else ""
        return f"{method} fits with {advice.words}{speed}"
    return f"{method} needs {figures.size(advice.high)} at the least"


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
