"""What one run asks for: the suite's reading of it, and what its settings and its model say besides."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_hal.adapter.targets import require_no_dropout_on_experts, resolve_targets
from qlora_hal.config.resolve import resolve_settings
from qlora_hal.config.schema import RunConfig
from qlora_hal.memory.placement import FULL, NONE, OFFLOAD, SELECTIVE, asked_recompute
from qlora_hal.model.facts import ModelFacts
from qlora_hal.model.source import resolve_model
from qlora_hal.report.run_file import RUN_FILE, read_run_config, read_run_file
from qlora_hal_conformance.combination import Combination, judged_in_words, not_judged_in_words
from qlora_hal_conformance.judged_run import JudgedRun, judged_run
from qlora_hal_conformance.subject import Reference
from qlora_hal_conformance_runs.mixture import Mixture, number_of_experts
from qlora_hal_oracle.families import MIXTURES

AGAIN = (SELECTIVE, FULL, OFFLOAD)
"""What `training.recompute` says where activations are computed again."""
_LAYER = re.compile(r".*\.layers\.\d+\.")


@dataclass(frozen=True, slots=True)
class AskedRun:
    """`run` has the combination with its target modules as `lora.experts` leaves them: of a mixture that is drawn by
    their names in a layer (`mlp.experts.up_proj`), else by the last of them. `beside` are lines about what no case
    looks at."""

    run: JudgedRun
    mixture: Mixture | None
    beside: tuple[str, ...]

    def judged_in_words(self, dtype: str) -> list[str]:
        """What the cases are about, a line for each choice."""
        lines = judged_in_words(self.run.combination, dtype)
        return lines if self.mixture is None else [self._drawn_in_words(self.mixture), *lines[1:]]

    def not_judged_in_words(self) -> list[str]:
        """What of the run nobody looked at."""
        known = self.run.combination if self.mixture is None else replace(self.run.combination, family="llama")
        return [*self.beside, *not_judged_in_words(known)]

    def _drawn_in_words(self, mixture: Mixture) -> str:
        carries = any(".experts." in name for name in self.run.combination.target_kinds)
        adapters = "their adapters included" if carries else "without adapters of their own"
        return f"a drawn mixture of {mixture.family}, routing and experts, {adapters}; drawn Llamas besides"


def asked_run(path: Path, given: Reference | None = None) -> AskedRun:
    """What `train` would compute with these settings here, or what the run in this folder computed. `given` takes the
    place of the run's backend.

    Raises what `judged_run` raises, and UnsupportedFeatureError QH-U24 for dropout on the inputs of experts.
    """
    run = judged_run(path, given)
    config, resolved = _settings(path)
    model, lora = config.model, config.lora
    facts = resolve_model(model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code).facts
    targets = resolve_targets(lora.target_modules, facts.linear_modules, lora.experts)
    require_no_dropout_on_experts(lora.dropout, [facts.linear_modules[name] for name in targets])
    recompute = str(resolved.get("recompute") or asked_recompute(config.training))
    mixture = None if run.combination.fp8_products else Mixture.of(facts)
    combination = replace(
        run.combination,
        gradient_checkpointing=recompute in AGAIN,
        target_kinds=_kinds(targets, in_layer=mixture is not None),
    )
    beside = (*_of_model(facts, combination, mixture), *_of_memory(config, resolved, recompute))
    return AskedRun(replace(run, combination=combination), mixture, beside)


def _settings(path: Path) -> tuple[RunConfig, dict[str, object]]:
    """The settings, and of a run that began what they came to."""
    if not path.is_dir() and path.name != RUN_FILE:
        return resolve_settings(path).config, {}
    folder = path if path.is_dir() else path.parent
    resolved = read_run_file(folder).get("resolved")
    return read_run_config(folder), resolved if isinstance(resolved, dict) else {}


def _kinds(targets: Collection[str], *, in_layer: bool) -> tuple[str, ...]:
    return tuple(sorted({_LAYER.sub("", name) if in_layer else name.rpartition(".")[2] for name in targets}))


def _of_model(facts: ModelFacts, combination: Combination, mixture: Mixture | None) -> list[str]:
    if mixture is not None:
        return mixture.not_judged_in_words()
    if not facts.has_routed_experts:
        return []
    experts = f"{number_of_experts(facts)} experts in a layer, where tokens go, and the adapters of experts"
    if combination.fp8_products:
        return [f"{experts}: products in 8-bit floats are judged on dense models"]
    return [f"{experts}: the drawn mixtures are of {', '.join(MIXTURES)}"]


def _of_memory(config: RunConfig, resolved: dict[str, object], recompute: str) -> list[str]:
    """Where things are and what is computed again, beyond what a case can ask for."""
    lines = []
    if recompute not in (NONE, FULL):
        judged = "all activations computed anew" if recompute in AGAIN else "activations kept"
        lines.append(f"training.recompute {recompute}: {judged} was judged")
    offloaded = resolved.get("base_offload", config.training.base_offload)
    if offloaded:
        named = ", ".join(map(str, offloaded)) if isinstance(offloaded, (list, tuple)) else offloaded
        lines.append(f"training.base_offload {named}: the base was on the device")
    return lines
