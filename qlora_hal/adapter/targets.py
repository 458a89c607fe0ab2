"""Which modules carry LoRA: PEFT's rules for `target_modules`, with a refusal where PEFT would match too little."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Mapping
from typing import NoReturn

from qlora_hal.adapter.expressions import ExpressionError, matching
from qlora_hal.contract.values import LinearShape
from qlora_hal.errors import ConfigError, ModelError, UnsupportedFeatureError
from qlora_hal.model.expert_stacks import is_shared, missing_parts

ALL_LINEAR = "all-linear"


def resolve_targets(
    requested: str | tuple[str, ...], linear_modules: Mapping[str, LinearShape], experts: str = "all"
) -> tuple[str, ...]:
    """Full paths of the modules that `requested` means, sorted.

    `all-linear` is every one; names match a whole path or its end (`q_proj`, `self_attn.q_proj`); any other string is
    a regular expression that must match the whole path. `experts` is `lora.experts`. Raises ConfigError QH-N13 for an
    empty request or a model without linear layers, QH-S53 for a broken or a slow expression, QH-U22 for
    experts' gate or up projection without the others, QH-U23 for shared experts that the model lacks; ModelError QH-C07
    for a name or expression without a match.
    """
    found = _matching(requested, linear_modules)
    targets = tuple(path for path in found if _is_wanted(path, linear_modules[path], experts))
    if experts == "shared" and not any(map(is_shared, linear_modules)):
        raise ConfigError(
            "QH-U23",
            "lora.experts is shared; this model has no shared experts.",
            where="lora.experts",
            fix="Set lora.experts to all or none.",
        )
    if not targets:
        raise ConfigError(
            "QH-N13",
            f"Nothing would be trained: the {len(found)} modules that target_modules means are experts, and "
            f"lora.experts is {experts}.",
            where="lora.experts",
            fix="Set lora.experts: all, or name other modules.",
        )
    if missing := missing_parts(targets, linear_modules):
        leaves = sorted({path.rpartition(".")[2] for path in missing})
        raise ConfigError(
            "QH-U22",
            f"{len(missing)} stacks of experts would carry no LoRA while gate or up projection of their blocks do; the "
            f"first is {missing[0]}.",
            where="lora.target_modules",
            cause="Model libraries hold gate and up projection as one weight; PEFT opens an adapter on it whole, and "
            "beside one on the projection that follows.",
            fix=f"Add {' and '.join(leaves)} to target_modules.",
        )
    return targets


def _is_wanted(path: str, shape: LinearShape, experts: str) -> bool:
    """Whether `lora.experts` lets a module carry LoRA."""
    return (shape.experts == 1 or experts == "all") and (experts != "none" or not is_shared(path))


def _matching(requested: str | tuple[str, ...], linear_modules: Mapping[str, LinearShape]) -> tuple[str, ...]:
    if not requested or not linear_modules:
        _refuse_nothing_to_train(requested, linear_modules)
    if isinstance(requested, str):
        if asks_for_all(requested):
            return tuple(sorted(linear_modules))
        return _matching_expression(requested, linear_modules)
    matches = {name: [path for path in linear_modules if names_module(name, path)] for name in requested}
    unmatched = [name for name, paths in matches.items() if not paths]
    if unmatched:
        _refuse_unmatched(unmatched, linear_modules)
    return tuple(sorted({path for paths in matches.values() for path in paths}))


def require_rank(r: int, shapes: Collection[LinearShape]) -> None:
    """Raise ConfigError (QH-U01) for a rank above every side of every target: no product of that width has it."""
    widest = max((max(shape.inputs, shape.outputs) for shape in shapes), default=r)
    if r > widest:
        raise ConfigError(
            "QH-U01",
            f"lora.r is {r if r < 2**63 else 'above 2**63'}; the target modules have at most {widest} rows or columns.",
            where="lora.r",
            cause="A matrix has no rank above its smaller side; beyond, adapters only take memory.",
            fix="Set lora.r to 8, 16 or 64.",
        )


def require_no_dropout_on_experts(dropout: float, shapes: Collection[LinearShape]) -> None:
    """Raise UnsupportedFeatureError (QH-U24) for dropout on the input of stacked experts."""
    if dropout and (stacks := sum(shape.experts > 1 for shape in shapes)):
        raise UnsupportedFeatureError(
            "QH-U24",
            f"lora.dropout is {dropout:g}; {stacks} of the target modules are stacks of experts, which have no "
            "dropout.",
            where="lora.dropout",
            cause="PEFT opens no adapter with dropout on the experts' weights.",
            fix="Set lora.dropout: 0, or lora.experts: none.",
        )


def require_experts_served(
    experts: str, stored: Mapping[str, LinearShape], served: Mapping[str, LinearShape], backend: str
) -> None:
    """Raise UnsupportedFeatureError (QH-U25) where experts are to carry LoRA and the backend has no layer for them.
    `stored` are the modules that the checkpoint's headers show, `served` those of the backend's own outline."""
    missing = [path for path, shape in stored.items() if shape.experts > 1 and path not in served]
    if missing and experts == "all":
        raise UnsupportedFeatureError(
            "QH-U25",
            f"Backend {backend} does not train the experts of this kind of model; lora.experts is all. "
            f"{len(missing)} stacks of experts are stored; the first is {missing[0]}.",
            where="lora.experts",
            fix="Set lora.experts: none to train all other layers, or choose another backend.",
        )


def asks_for_all(requested: str | tuple[str, ...]) -> bool:
    """Whether `target_modules` is `all-linear`."""
    return isinstance(requested, str) and requested.lower() == ALL_LINEAR


def require_modules(paths: tuple[str, ...], linear_modules: Mapping[str, LinearShape]) -> tuple[str, ...]:
    """`paths` again, when each is the full path of a linear layer. Raises as `resolve_targets` does."""
    if not paths:
        _refuse_nothing_to_train(paths, linear_modules)
    unmatched = [path for path in paths if path not in linear_modules]
    if unmatched:
        _refuse_unmatched(unmatched, linear_modules)
    return paths


def names_module(name: str, path: str) -> bool:
    """Whether an entry of a `target_modules` list means this path (peft tuners_utils.check_target_module_exists)."""
    return bool(name) and (path == name or path.endswith(f".{name}"))


def shortest_names(targets: Collection[str], linear_modules: Collection[str] | None) -> list[str]:
    """The list to write as `target_modules`: leaf names where they mean exactly `targets`, else full paths.

    Without `linear_modules` nothing is known of the modules left out, and full paths are the only exact form.
    """
    if linear_modules is not None:
        leaves = {path.rpartition(".")[2] for path in targets}
        if {path for path in linear_modules if path.rpartition(".")[2] in leaves} == set(targets):
            return sorted(leaves)
    return sorted(targets)


def _matching_expression(expression: str, linear_modules: Mapping[str, LinearShape]) -> tuple[str, ...]:
    try:
        paths = tuple(sorted(matching(expression, linear_modules)))
    except ExpressionError as problem:
        raise ConfigError(
            "QH-S53",
            f"lora.target_modules is {expression!r}, an expression that {problem}.",
            where="lora.target_modules",
            fix="Correct the expression, or write a list of names such as [q_proj, v_proj].",
        ) from problem
    if not paths:
        _refuse_unmatched([expression], linear_modules)
    return paths


def _refuse_unmatched(names: list[str], linear_modules: Mapping[str, LinearShape]) -> NoReturn:
    leaves = Counter(path.rpartition(".")[2] for path in linear_modules)
    candidates = [*leaves, *linear_modules]
    closest = {name: difflib.get_close_matches(name, candidates, n=3, cutoff=0.5) for name in names}
    hints = [f"{name} (closest: {', '.join(found) or 'nothing similar'})" for name, found in closest.items()]
    present = ", ".join(f"{leaf} ({count})" for leaf, count in sorted(leaves.items())[:20])
    listed = next((n for n in names if any(names_module(n, path) for path in linear_modules)), None)
    raise ModelError(
        "QH-C07",
        f"{len(names)} of the requested target modules match no linear layer: {'; '.join(hints)}. "
        f"The model has: {present}.",
        where="lora.target_modules",
        cause=f"A single string is a regular expression over full paths such as {min(linear_modules)}."
        if listed
        else "Names match whole parts of a path; the output head and embeddings carry no adapter.",
        fix=f"Write it as a list: target_modules: [{listed}]."
        if listed
        else f"Use names from the list above, or target_modules: {ALL_LINEAR}.",
        context={"unmatched": names, "closest": closest, "present": dict(sorted(leaves.items()))},
    )


def _refuse_nothing_to_train(requested: str | tuple[str, ...], linear_modules: Mapping[str, LinearShape]) -> NoReturn:
    raise ConfigError(
        "QH-N13",
        f"Nothing would be trained: target_modules is {requested!r} and the model has {len(linear_modules)} linear "
        "layers; at least one module is expected.",
        where="lora.target_modules",
        fix=f"Set target_modules: {ALL_LINEAR}, or name at least one layer.",
    )
