"""What a model card tells of a run: data, settings, losses, versions, proofs; no place or secret of this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qlora_hal.adapter.peft_files import card_table
from qlora_hal.data.source.reading import is_dataset_id
from qlora_hal.errors import figures
from qlora_hal.errors.redaction import published
from qlora_hal.export.proofs import Proof
from qlora_hal.run.listing import RunSummary

_NOT_SHOWN = ("output_dir", "model.", "data.path", "data.validation_path", "data.sources", "training.sample_prompts",
              "training.report_to", "training.tracker_project")  # fmt: skip
"""Settings that say where things lie, or what somebody asks a model, and nothing of the adapter."""


def run_sections(run: Mapping[str, object], summary: RunSummary, proofs: Sequence[Proof]) -> list[str]:
    """Markdown lines about a run, from `run.json` and its log."""
    environment, versions = _part(run, "environment"), _part(_part(run, "resolved"), "versions")
    packages = {"qlora_hal": environment.get("qlora_hal"), **(versions or _part(run, "versions"))}
    return [
        *_section("Training", _training(run, summary)),
        *_section("Settings", _settings(run)),
        *(_section("Conformance", ((proof.words, f"sha256 {proof.sha256}") for proof in proofs)) if proofs else ()),
        *_section("Versions", ((name, value) for name, value in packages.items() if value)),
    ]


def _training(run: Mapping[str, object], summary: RunSummary) -> Iterator[tuple[str, object]]:
    yield "data", ", ".join(data_names(run)) or "rows in memory"
    train = _part(_part(run, "data_report"), "train")
    if "rows_used" in train:
        yield "rows", f"{train['rows_used']} used, with {train.get('trained_tokens')} trained tokens{_held_out(run)}"
    yield "steps", run.get("steps")
    first, last = figures.loss(summary.first_loss), figures.loss(summary.last_loss)
    yield "loss of the first step, average at the last", f"{first} -> {last}"
    if summary.eval_loss_after is not None:
        before, after = figures.loss(summary.eval_loss_before), figures.loss(summary.eval_loss_after)
        yield "loss on held-out rows, before and after", f"{before} -> {after}"
    resolved = _part(run, "resolved")
    in_fp8 = ", products with the base in fp8" if resolved.get("fp8_products") else ""
    yield "backend", f"{resolved.get('backend')} on {resolved.get('device')}, {resolved.get('compute_dtype')}{in_fp8}"


def _held_out(run: Mapping[str, object]) -> str:
    """What the count of tokens leaves out of the picture: rows that are held out of it train nothing."""
    share = _part(_part(run, "config"), "data").get("validation_fraction")
    return f"; a share of {share} of the rows was held out" if share else ""


def _settings(run: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Those that were set; the others have their defaults."""
    tree, origins = published(_part(run, "config")), _part(run, "origins")
    for key, origin in sorted(origins.items()):
        if origin != "default" and not key.startswith(_NOT_SHOWN):
            value: object = tree
            for name in key.split("."):
                value = value.get(name) if isinstance(value, Mapping) else None
            yield key, value
    if origins.get("training.seed", "default") == "default":
        yield "seed, drawn", _part(run, "resolved").get("seed")


def data_names(run: Mapping[str, object]) -> list[str]:
    """The data sets of a run: ids of the hub as they are, of files and folders the last name."""
    data = _part(_part(run, "config"), "data")
    sources = data.get("sources")
    named = (
        [source.get("path") for source in sources if isinstance(source, Mapping)] if isinstance(sources, list) else []
    )
    names = [str(name) for name in named or [data.get("path")] if name]
    return [str(published(name if is_dataset_id(name) else Path(name).name)) for name in names]


def _section(title: str, rows: Iterator[tuple[str, object]]) -> list[str]:
    return [f"## {title}", "", *card_table(rows), ""]


def _part(record: Mapping[str, object], name: str) -> Mapping[str, object]:
    part = record.get(name)
    return part if isinstance(part, Mapping) else {}
