"""Whether an adapter belongs on a model: names, shapes, finite values, settings, and the base it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from qlora_hal.adapter.naming import lora_a_key, lora_b_key, module_of
from qlora_hal.contract.values import Adapter, AdapterConfig, LinearShape
from qlora_hal.errors import AdapterError, NumericsError

if TYPE_CHECKING:
    from qlora_hal.model.facts import ModelFacts


def check_fits(adapter: Adapter, linear_modules: Mapping[str, LinearShape], *, where: str) -> None:
    """Nothing when every tensor of the adapter has its place on the model; `where` names the adapter's origin.

    Raises AdapterError with all wrong tensors in the context: QH-C08 when no tensor matches, QH-C09 for missing,
    unexpected, misshapen or not-float32 ones, QH-C10 for NaN or infinity.
    """
    wrong: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshapen": [], "not finite": []}
    wrong["missing"] = [key for key in _expected_keys(adapter, linear_modules) if key not in adapter.tensors]
    matched, targets = 0, set(adapter.config.target_modules)
    for key, tensor in adapter.tensors.items():
        expected = _expected_shape(key, adapter.config.r, linear_modules)
        if expected is None:
            wrong["unexpected"].append(key)
            continue
        matched += 1
        if module_of(key)[0] not in targets:
            wrong["unexpected"].append(key)  # a tensor that no target uses would be trained on paper only
            continue
        if tensor.shape != expected or tensor.dtype != np.float32:
            wrong["misshapen"].append(f"{key} {tensor.dtype}{list(tensor.shape)}, expected float32{list(expected)}")
        elif not np.isfinite(tensor).all():
            wrong["not finite"].append(key)
    if matched == 0:
        _refuse_unmatched(adapter, linear_modules, where)
    if any(wrong.values()):
        _refuse_wrong(wrong, matched, where)


def check_base(
    provenance: Mapping[str, object], facts: ModelFacts, *, allow_mismatch: bool, name: str = ""
) -> str | None:
    """None when the adapter was trained on this very base, else a note; `name` is what the user called the base.

    Raises AdapterError QH-C05 when the fingerprints differ, unless `allow_mismatch`.
    """
    trained_on = str(provenance.get("base_fingerprint") or "")
    if trained_on == facts.fingerprint:
        return None
    then = f"{provenance.get('base_name') or 'an unnamed base'}" + (
        f" at revision {provenance['base_revision']}" if provenance.get("base_revision") else ""
    )
    if not trained_on:
        return f"The adapter does not record which weights it was trained on (it names {then}); that was not checked."
    now = f"{name or facts.architecture}, fingerprint {facts.fingerprint[:16]}"
    difference = f"the adapter was trained on {then}, fingerprint {trained_on[:16]}; the model here is {now}"
    if allow_mismatch:
        return f"Base mismatch allowed on request: {difference}."
    raise AdapterError(
        "QH-C05",
        f"The adapter belongs to another base: {difference}.",
        cause="Equal shapes do not mean equal weights; an adapter on another base silently gives wrong answers.",
        fix="Use the base it was trained on, or pass --allow-base-mismatch when the difference is known.",
        context={"adapter_base": trained_on, "model_base": facts.fingerprint, "base_name": then},
    )


def check_same_settings(saved: AdapterConfig, configured: AdapterConfig, *, where: str) -> None:
    """Nothing when a run may continue with this configuration. Raises AdapterError QH-C06 with a table, old and new."""
    old: dict[str, object] = {"r": saved.r, "alpha": saved.alpha, "use_rslora": saved.use_rslora}
    new: dict[str, object] = {"r": configured.r, "alpha": configured.alpha, "use_rslora": configured.use_rslora}
    old |= {"dropout": saved.dropout, "target_modules": set(saved.target_modules)}
    new |= {"dropout": configured.dropout, "target_modules": set(configured.target_modules)}
    differing = [key for key in old if old[key] != new[key]]
    if not differing:
        return
    rows = []
    for key in differing:
        if key == "target_modules":
            gone = sorted(set(saved.target_modules) - set(configured.target_modules))
            added = sorted(set(configured.target_modules) - set(saved.target_modules))
            rows.append(f"target_modules: {len(gone)} gone {gone[:3]}, {len(added)} added {added[:3]}")
        else:
            rows.append(f"{key}: saved {old[key]}, configured {new[key]}")
    raise AdapterError(
        "QH-C06",
        f"The saved adapter and the configuration differ in {len(differing)} settings: {'; '.join(rows)}.",
        where=where,
        cause="The adapter's product is scaled by alpha / r; continuing would change what the saved tensors mean.",
        fix="Resume with the saved settings, or start a new run in another folder.",
        context={"differing": differing},
    )


def check_changed(initial: Adapter, trained: Adapter, *, steps: int) -> tuple[str, ...]:
    """Modules whose B is still zero after training; empty when all learned.

    Raises NumericsError QH-C18 when no B left zero, or no tensor changed at all: then gradients never arrived.
    """
    still = []
    for module in trained.config.target_modules:
        tensor = trained.tensors[lora_b_key(module)]
        if not tensor.any():
            still.append(module)
    unchanged = all(
        key in initial.tensors and np.array_equal(initial.tensors[key], tensor)
        for key, tensor in trained.tensors.items()
    )
    if unchanged or len(still) == len(trained.config.target_modules):
        raise NumericsError(
            "QH-C18",
            f"The adapter did not change in {steps} steps: gradients never reached it "
            f"({len(still)} of {len(trained.config.target_modules)} modules still have B = 0).",
            cause="Likely: a frozen adapter, gradient checkpointing that cuts the graph, a learning rate of 0, or a "
            "kernel without a backward pass.",
            fix="Run qlora-hal doctor to see which check fails on this machine.",
            context={"steps": steps, "zero_modules": still},
        )
    return tuple(still)


def _expected_keys(adapter: Adapter, linear_modules: Mapping[str, LinearShape]) -> list[str]:
    # Modules that the model lacks show up as unexpected tensors; listing them as missing too would count them twice.
    modules = [module for module in adapter.config.target_modules if module in linear_modules]
    return [key for module in modules for key in (lora_a_key(module), lora_b_key(module))]


def _expected_shape(key: str, r: int, linear_modules: Mapping[str, LinearShape]) -> tuple[int, ...] | None:
    try:
        module, half = module_of(key)
    except ValueError:
        return None
    if module not in linear_modules:
        return None
    shape = linear_modules[module]
    return shape.lora_a(r) if half == "A" else shape.lora_b(r)


def _refuse_unmatched(adapter: Adapter, linear_modules: Mapping[str, LinearShape], where: str) -> NoReturn:
    found = next(iter(adapter.tensors), "no tensors at all")
    wanted = lora_a_key(next(iter(linear_modules), "<module>"))
    raise AdapterError(
        "QH-C08",
        f"0 of {len(adapter.tensors)} tensors matched: the adapter has {found!a}, the model expects names such as "
        f"{wanted}.",
        where=where,
        cause="Another model's adapter, or another tool's naming.",
        fix="Use an adapter in PEFT format that was trained on this architecture.",
        context={"tensors": sorted(adapter.tensors)},
    )


def _refuse_wrong(wrong: Mapping[str, list[str]], matched: int, where: str) -> NoReturn:
    shown = {"misshapen": "of the wrong shape or dtype"}
    counts = ", ".join(f"{len(items)} {shown.get(kind, kind)}" for kind, items in wrong.items() if items)
    first = [f"{shown.get(kind, kind)}: {item}" for kind, items in wrong.items() for item in sorted(items)][:5]
    only_values = not (wrong["missing"] or wrong["unexpected"] or wrong["misshapen"])
    raise AdapterError(
        "QH-C10" if only_values else "QH-C09",
        f"The adapter does not fit: {matched} tensors matched, {counts}. First: {'; '.join(first)}.",
        where=where,
        cause="It holds NaN or infinity." if only_values else "It was made for another model, rank or set of modules.",
        fix="Go back to an earlier checkpoint." if only_values else "Use the model and settings it was trained with.",
        context={kind: sorted(items) for kind, items in wrong.items()},
    )
