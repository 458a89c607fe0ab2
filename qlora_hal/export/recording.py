"""merge.json: what was merged into what, how close it came and what was allowed; and the same as rows for people."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import qlora_hal
from qlora_hal.errors.redaction import redacted
from qlora_hal.files.refused_paths import expanded

if TYPE_CHECKING:
    from qlora_hal.contract.backend import DeviceFacts
    from qlora_hal.export.comparing import ChosenCompute
    from qlora_hal.export.limits import Limits
    from qlora_hal.export.planning import MergePlan
    from qlora_hal.export.reference import Closeness, Spread

SCHEMA_VERSION = 1


def record_of(
    plan: MergePlan,
    *,
    base: str,
    closeness: Mapping[str, Closeness],
    effect: Closeness,
    spread: Spread,
    limits: Limits,
    chosen: ChosenCompute,
    device: DeviceFacts,
    merged_on: str,
    files: Mapping[str, str],
    notes: Sequence[str],
) -> dict[str, object]:
    """The content of merge.json, without paths of this machine."""
    resolved_backend, config = plan.resolved_backend, plan.subject.adapter.config
    source, quantization = resolved_backend.source, resolved_backend.quantization
    record: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": plan.request.dtype,
        "base": {
            "name": shown_name(source.name),
            "revision": source.revision,
            "fingerprint": source.facts.fingerprint,
            "trained_as": {
                "weight_format": quantization.weight_format.value,
                "block_size": quantization.block_size,
                "double_quant": quantization.double_quant,
            },
            "merged_into": base,
            "chosen": _reason(plan, base, closeness),
            "kl_mean": {name: found.kl_mean for name, found in closeness.items()},
        },
        "adapter": {
            "sha256": plan.subject.adapter_sha256,
            "r": config.r,
            "alpha": config.alpha,
            "use_rslora": config.use_rslora,
            "scale": config.scale,
            "modules": len(config.target_modules),
            "step": plan.subject.provenance.get("step"),
            "config_hash": plan.subject.provenance.get("config_hash"),
        },
        "comparison": {
            **closeness[base].as_json(),
            "adapter_loss": spread.loss,
            "base_loss": effect.loss,
            "kl_of_base": effect.kl_mean,
            "top1_of_base": effect.top1,
            "logit_deviation": spread.deviation,
        },
        "candidates": {name: found.as_json() for name, found in closeness.items()},
        "limits": limits.as_json(),
        "rows": dict(plan.rows.as_json()),
        "compute": {
            "backend": resolved_backend.choice.spec.name,
            "merged_backend": merged_on,
            "device": device.device,
            "dtype": chosen.compute.dtype,
            "why": chosen.reason,
        },
        "versions": {"qlora_hal": qlora_hal.__version__, "python": platform.python_version(), **device.versions},
        "files": dict(files),
        "notes": list(notes),
    }
    return redacted(record)  # type: ignore[return-value]


def report_rows(record: Mapping[str, object]) -> list[tuple[str, str]]:
    """The record as (name, value) for a terminal and for the model card."""
    base, found, limits, rows, compute, adapter = (
        _part(record, name) for name in ("base", "comparison", "limits", "rows", "compute", "adapter")
    )
    trained = _part(base, "trained_as")
    block = f" in blocks of {trained['block_size']}" if trained["block_size"] else ""
    nested = ", double quantization" if trained["double_quant"] else ""
    others = _part(base, "kl_mean")
    measured = ", ".join(f"{name} {_figure(value)}" for name, value in others.items())
    lines = [
        ("base", f"{base['name']}, trained on as {trained['weight_format']}{block}{nested}"),
        ("adapter", f"r {adapter['r']}, scale {adapter['scale']:g}, {adapter['modules']} modules"),
        ("merged into", f"the {base['merged_into']} base: {base['chosen']}"),
        ("KL by base", f"{measured} nats per token") if len(others) > 1 else ("", ""),
        ("written as", str(record["dtype"])),
        (
            "KL to the adapter",
            f"{_figure(found['kl_mean'])} nats per token, {_figure(found['kl_max'])} at most on one token",
        ),
        ("KL allowed", f"{_figure(limits['max_kl'])} ({limits['kl_reason']})"),
        ("top-1 agreement", f"{found['top1']:.2%}; allowed {limits['min_top1']:.2%} ({limits['top1_reason']})"),
        ("KL of the base", f"{_figure(found['kl_of_base'])} nats per token: what the adapter changes at all"),
        (
            "loss",
            f"base {found['base_loss']:.4f}, adapter {found['adapter_loss']:.4f}, merged {found['loss']:.4f} nats",
        ),
        ("compared on", f"{rows['scored_tokens']} tokens of {rows['rows']} rows ({rows['kind']}: {rows['name']})"),
        ("computed", f"{compute['backend']} on {compute['device']} in {compute['dtype']}; {compute['why']}"),
    ]
    requantized = record.get("requantized")
    if isinstance(requantized, Mapping):
        lines.append(
            (
                f"as {requantized['format']}",
                f"KL {_figure(requantized['kl_mean'])} nats per token, top-1 {requantized['top1']:.2%}, "
                f"loss {requantized['loss']:.4f}; in the folder {requantized['folder']}",
            )
        )
    return [(name, value) for name, value in lines if name]


def shown_name(name: str) -> str:
    """A base's name for a file that is made to be published: of a local folder only its last part."""
    path = expanded(name)
    return path.name if path.is_absolute() or path.is_dir() else name


def _reason(plan: MergePlan, base: str, closeness: Mapping[str, Closeness]) -> str:
    if len(closeness) > 1:
        return "measured: it is the closer one to the adapter model"
    if plan.trained_on_original:
        return "it was trained on unchanged"
    if plan.request.base == base:
        return "requested"
    return "the folder holds no other weights"


def _part(record: Mapping[str, object], name: str) -> Mapping[str, object]:
    part = record[name]
    assert isinstance(part, Mapping)
    return part


def _figure(value: object) -> str:
    return f"{float(str(value)):.3g}"
