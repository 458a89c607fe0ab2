"""Bringing a 16-bit model into a format that needs calibration, before anything loads it.

A backend names a `Quantizer` for such formats. It gets token ids and never text, and works on a staging folder; what it
made becomes a model folder of its own, with a manifest, by one rename. The folder is found again by everything that
could change its content: the model, the tokens, the settings and the libraries' versions.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import numpy as np

from qlora_hal.contract.backend import CalibrationJob
from qlora_hal.data import prepare
from qlora_hal.data.source.reading import blamed_on
from qlora_hal.detect.requirements import needs_calibration
from qlora_hal.errors import BackendContractError, ConfigError, DataError, UnsupportedFeatureError
from qlora_hal.files.refused_paths import expanded
from qlora_hal.quantize.folder import quantized_for, read_quantized, set_aside, staged, unverified_note

if TYPE_CHECKING:
    from qlora_hal.config.schema import QuantizationConfig, RunConfig
    from qlora_hal.contract.backend import BackendSpec, Quantization, Quantizer
    from qlora_hal.contract.world import World
    from qlora_hal.data.tokens.store import TokenStore
    from qlora_hal.model.source import ModelSource
    from qlora_hal.report.console import RunConsole
    from qlora_hal.run.prepare import PreparedRun, ResolvedBackend

Tell = Callable[[str], None]

CACHE_VARIABLE = "QLORA_HAL_CACHE"
"""The folder for what can be made again; by default the user's cache folder."""
_KEY_DIGITS = 20


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rows of token ids, in order. `digest` is the SHA-256 of ids and lengths."""

    rows: tuple[tuple[int, ...], ...]
    digest: str

    @property
    def token_count(self) -> int:
        return sum(map(len, self.rows))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is quantized: the storage, and what only the solver wants to know."""

    quantization: Quantization
    symmetric: bool = True
    act_order: bool = False
    seed: int = 0


def calibration_from(store: TokenStore, *, rows: int, context: int | None, where: str) -> Calibration:
    """At most `rows` rows, evenly spread over the store.

    Raises DataError: QH-D62 when there is none, QH-D63 when one is longer than the model's context.
    """
    if len(store) == 0:
        raise no_calibration(where)
    chosen = np.unique(np.linspace(0, len(store) - 1, min(rows, len(store))).round().astype(np.int64))
    return checked_calibration([store.row(int(index))[0].tolist() for index in chosen], context=context, where=where)


def checked_calibration(rows: Sequence[Sequence[int]], *, context: int | None, where: str) -> Calibration:
    """Rows as they can be calibrated on. Raises as `calibration_from`."""
    kept = tuple(tuple(map(int, row)) for row in rows if len(row))
    if not kept:
        raise no_calibration(where)
    longest = max(map(len, kept))
    if context is not None and longest > context:
        raise DataError(
            "QH-D63",
            f"A calibration row has {longest} tokens; this model has positions up to {context}.",
            where=where,
            cause="Past its positions a model's activations mean nothing; the weights would be fitted to them.",
            fix=f"Give --max-seq-length {context} or less, or set data.max_seq_length.",
            context={"longest": longest, "context": context},
        )
    digest = hashlib.sha256()
    for row in kept:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(np.asarray(row, dtype="<i4").tobytes())
    return Calibration(kept, digest.hexdigest())


def no_calibration(where: str) -> DataError:
    return DataError(
        "QH-D62",
        "There is no row with a token to calibrate on.",
        where=where,
        cause="GPTQ chooses each code by what the layer computes on real input; without any it has no basis.",
        fix="Name a file with rows like those the model will be used on.",
    )


# in train() ---------------------------------------------------------------------------------------------------------
def with_quantized_base(prepared: PreparedRun, run_dir: Path, console: RunConsole) -> PreparedRun:
    """The run on a base that its backend can load: quantized now or found again, or as it is where nothing is due."""
    resolved_backend, config = prepared.resolved_backend, prepared.config
    source, spec = resolved_backend.source, resolved_backend.choice.spec
    if not needs_calibration(source.facts, resolved_backend.quantization, spec.capabilities):
        return prepared
    store, where = prepared.data.train, "data.path"
    if config.quantization.calibration_path:
        store, where = _named_store(prepared, run_dir), "quantization.calibration_path"
    context = source.facts.max_position_embeddings
    calibration = calibration_from(store, rows=config.quantization.calibration_rows, context=context, where=where)
    recipe = Recipe(resolved_backend.quantization)
    base = cached(source, spec, recipe, calibration, config.backend.options, console.note)
    return replace(prepared, resolved_backend=replace(resolved_backend, source=base))


def _named_store(prepared: PreparedRun, run_dir: Path) -> TokenStore:
    """The rows of `quantization.calibration_path`, read as the training rows are."""
    config, facts = prepared.config, prepared.resolved_backend.source.facts
    path = config.quantization.calibration_path
    update = {"path": path, "sources": (), "validation_path": None, "validation_fraction": 0.0}
    with blamed_on("quantization.calibration_path"):
        return prepare(
            config.data.model_copy(update={**update, "train_on": "all", "mask_reasoning": False}),
            prepared.tokenizer,
            cache_dir=run_dir / "tokens",
            seed=prepared.seed,
            model_max_length=facts.max_position_embeddings,
            model_vocabulary_size=facts.vocabulary_size or None,
        ).train


def refuse_calibration_by_ranks(config: RunConfig, resolved_backend: ResolvedBackend, world: World) -> None:
    """Quantizing with calibration is the work of one process. Raises UnsupportedFeatureError QH-R06."""
    capabilities = resolved_backend.choice.spec.capabilities
    if world.size > 1 and needs_calibration(resolved_backend.source.facts, resolved_backend.quantization, capabilities):
        name, weight_format = config.model.name_or_path, resolved_backend.quantization.weight_format.value
        raise UnsupportedFeatureError(
            "QH-R06",
            f"{name} has yet to be quantized to {weight_format}, which several ranks cannot do together.",
            where="model.name_or_path",
            fix=f"Run qlora-hal quantize {quote(name)} FOLDER first, and train that folder.",
        )


def refuse_idle_calibration(config: RunConfig, resolved_backend: ResolvedBackend) -> None:
    """A calibration that nothing would use is a mistake of the user's. Raises ConfigError QH-U15."""
    facts, capabilities = resolved_backend.source.facts, resolved_backend.choice.spec.capabilities
    used = needs_calibration(facts, resolved_backend.quantization, capabilities)
    given = [name for name in ("calibration_path", "calibration_rows") if _is_given(config.quantization, name)]
    if used or not given:
        return
    stored = facts.prequantized is not None
    weight_format = resolved_backend.quantization.weight_format.value
    names = " and ".join(f"quantization.{name}" for name in given)
    raise ConfigError(
        "QH-U15",
        f"{names} {'is' if len(given) == 1 else 'are'} set, but nothing is calibrated: "
        + ("the model is quantized already." if stored else f"{weight_format} needs no calibration."),
        where=names.replace(" and ", ", "),
        fix="Remove it, or set quantization.weight_format: int4_gptq with a 16-bit model.",
    )


def _is_given(settings: QuantizationConfig, name: str) -> bool:
    given: object = getattr(settings, name)
    default: object = type(settings).model_fields[name].default
    return given != default


def base_of_run(resolved_backend: ResolvedBackend, run_dir: Path | None) -> ModelSource:
    """The base that a run's adapter was trained on: the model itself, or what was quantized out of it for the run.

    Raises ModelError QH-E63 when that folder is gone or another one.
    """
    source = resolved_backend.source
    if not needs_calibration(source.facts, resolved_backend.quantization, resolved_backend.choice.spec.capabilities):
        return source
    return quantized_for(source, run_dir)


# the work -----------------------------------------------------------------------------------------------------------
def cached(
    source: ModelSource,
    spec: BackendSpec,
    recipe: Recipe,
    calibration: Calibration,
    options: Mapping[str, object],
    tell: Tell,
) -> ModelSource:
    """The quantized model out of the cache, made first where it is not there, or not whole any more."""
    quantizer = open_quantizer(spec)
    identity = identity_of(source, spec, recipe, calibration, quantizer.versions(options))
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "quantized" / f"{_safe(source.name)}-{key[:_KEY_DIGITS]}"
    found = read_quantized(folder, source, identity)
    if found is not None:
        tell(f"the base was already quantized, found in {folder}")
        if note := unverified_note(folder):
            tell(note)
        return found
    if aside := set_aside(folder):
        tell(f"the base was already quantized, but {folder} is damaged: kept as {aside.name}, it can be removed")
    return quantize_into(folder, source, spec, recipe, calibration, options, tell)


def quantize_into(
    folder: Path,
    source: ModelSource,
    spec: BackendSpec,
    recipe: Recipe,
    calibration: Calibration,
    options: Mapping[str, object],
    tell: Tell,
) -> ModelSource:
    """Quantize a model into a folder that is not there yet. Nothing is left of an attempt that fails.

    Raises ModelError, DataError, BackendError and UnsupportedFeatureError of the quantizer, StorageError.
    """
    quantizer = open_quantizer(spec)
    identity = identity_of(source, spec, recipe, calibration, quantizer.versions(options))
    tell(
        f"quantizing {source.name} to {recipe.quantization.weight_format.value} with {len(calibration.rows)} rows "
        f"({calibration.token_count} tokens)"
    )
    if note := _too_little(source, calibration):
        tell(note)
    with staged(folder, source, identity) as staging:
        job = CalibrationJob(
            model=source.path,
            output=staging,
            rows=calibration.rows,
            quantization=recipe.quantization,
            symmetric=recipe.symmetric,
            act_order=recipe.act_order,
            seed=recipe.seed,
            options=options,
        )
        quantizer.quantize(job, tell)

    made = read_quantized(folder, source, identity, verify=False)
    if made is None:
        raise BackendContractError(
            "QH-B02",
            f"The quantizer of {spec.name} left no checkpoint that can be read in {folder}.",
            fix="This is a bug of the backend; report it with the versions that qlora-hal backends prints.",
        )
    tell(f"quantized into {folder}")
    return made


def open_quantizer(spec: BackendSpec) -> Quantizer:
    """The quantizer that a spec names. Raises BackendContractError QH-B02."""
    module, _, name = spec.quantizer.partition(":")
    try:
        quantizer: Quantizer = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise BackendContractError(
            "QH-B02",
            f"Backend {spec.name} names the quantizer {spec.quantizer!r}, which cannot be opened.",
            cause=f"{type(error).__name__}: {error}",
            fix="Update the backend's package.",
        ) from error
    return quantizer


def identity_of(
    source: ModelSource, spec: BackendSpec, recipe: Recipe, calibration: Calibration, versions: Mapping[str, str]
) -> dict[str, object]:
    """All that the result depends on, as JSON; its hash is the key of the cache."""
    return {
        "base_name": _shown(source.name),
        "base_revision": source.revision,
        "base_fingerprint": source.facts.fingerprint,
        "weight_format": recipe.quantization.weight_format.value,
        "group_size": recipe.quantization.block_size,
        "symmetric": recipe.symmetric,
        "act_order": recipe.act_order,
        "seed": recipe.seed,
        "calibration_rows": len(calibration.rows),
        "calibration_tokens": calibration.token_count,
        "calibration_sha256": calibration.digest,
        "backend": spec.name,
        "versions": dict(versions),
    }


def cache_folder() -> Path:
    """`QLORA_HAL_CACHE`, or the folder that the system keeps for caches."""
    if named := os.environ.get(CACHE_VARIABLE):
        return expanded(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qlora_hal"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "qlora_hal"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_hal"


def _too_little(source: ModelSource, calibration: Calibration) -> str:
    """The solver inverts, for each layer, a matrix of inputs x inputs that is summed over the tokens."""
    widest = max((shape.inputs for shape in source.facts.linear_modules.values()), default=0)
    if calibration.token_count >= widest:
        return ""
    return (
        f"{calibration.token_count} calibration tokens are fewer than the {widest} inputs of the widest layer: "
        "more rows would give better weights"
    )


def _shown(name: str) -> str:
    """A hub id as it is, a local path without the folders above."""
    return Path(name).name if Path(name).exists() else name


def _safe(name: str) -> str:
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in _shown(name))
    return kept.strip("-.")[:60] or "model"
